"""`fasttax doctor`: versions; per op, which kernel runs here and why; what is missing.

It also tries what `fasttax.integrations.trl.patch` would replace in the TRL that is installed.

Each thing that is missing comes with the command that brings it. With --warm it compiles every
Triton kernel for the GPU instead, so that no first step of a training waits for that.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from fasttax import triton
from fasttax._base import json_results, library
from fasttax._base.version import __version__
from fasttax.cli import _extras, _options, _warm

SIMD = ("portable vectors", "AVX2", "AVX-512")
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
PEERS = (
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "lightning",
    "axolotl",
)
OP = "fasttax doctor"
TRL_TARGETS = "fasttax.integrations._trl_targets"  # importing it imports TRL


def version_of(package: str) -> str:
    """The version, "installed" where the package has no metadata, or "not installed"."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed"


def missing() -> list[tuple[str, str]]:
    """(what is missing, the command that brings it)."""
    rows = []
    if "_C" in library.problems and library.problems["_C"] != "FASTTAX_BACKEND=reference":
        command = f"{BUILD}   (in fasttax's source folder)"
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            command = f"apt-get install g++ && {command}"
        rows.append((f"C++ CPU kernels ({library.problems['_C']})", command))
    problem = driver_problem() if not torch.cuda.is_available() else ""
    if problem:
        wanted = f"a driver for CUDA {torch.version.cuda}, or torch for the CUDA of this driver"
        rows.append((f"the GPU ({problem})", f"install {wanted}: https://pytorch.org/get-started"))
    if torch.cuda.is_available() and "_C_cuda" in library.problems:
        rows.append(
            (
                f"CUDA C++ kernels ({library.problems['_C_cuda']})",
                f"FASTTAX_CUDA=1 {BUILD}   (needs nvcc; CUDA_HOME names its folder)",
            )
        )
    absent = [p for p in _extras.EXTRAS if importlib.util.find_spec(p) is None]
    return rows + [(f"{p} (optional)", _extras.install(p)) for p in absent]


def simd() -> str:
    """The widest vectors that the C++ CPU kernels use on this processor."""
    if "_C" in library.problems:
        return "none (no C++ kernels)"
    return SIMD[torch.ops.fasttax._simd_level(-1)]


def gpu() -> str:
    """The first GPU's name, or "none" with what torch says where a driver is there all the same."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    problem = driver_problem()
    return f"none ({problem})" if problem else "none"


def driver_problem() -> str:
    """Why torch does not use a GPU whose driver is there: it is too old, say; "" for no driver."""
    if torch.version.cuda is None or shutil.which("nvidia-smi") is None:
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def peers() -> dict[str, str]:
    """The versions of the packages that fasttax works in or beside."""
    return {package: version_of(package) for package in PEERS}


def patchable() -> list[dict[str, Any]]:
    """What `fasttax.integrations.trl.patch` would do of each name in the installed TRL, and why.

    Each is looked up, and gives its numbers on a few tokens, which nothing is replaced for.
    """
    from fasttax.integrations._trl_targets import TARGETS, Unfit

    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        tried = target.tried(())
        row = {"target": target.label, "trainers": list(target.trainers), "fits": True, "why": ""}
        if isinstance(tried, Unfit):
            row |= {"fits": False, "why": str(tried)}
        else:
            row["target"] = tried.label
        rows.append(row)
    return rows


def patch_of_trl() -> dict[str, Any]:
    """The targets of `patch`; or, where TRL can't be imported or is not there, why there are none.

    A TRL beside a transformers that it does not fit raises anything as it is imported. What raises
    after that is an error of fasttax's own, and stays one.
    """
    if importlib.util.find_spec("trl") is None:
        return {"works": False, "why": "trl is not installed", "targets": []}
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(TRL_TARGETS)
    except Exception as error:  # noqa: BLE001 (said to the user)
        said = f"{type(error).__name__}: {_options.brief(error)}"
        return {"works": False, "why": f"trl does not import ({said})", "targets": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = patchable()
    works = any(row["fits"] for row in targets)
    why = "" if works else "nothing in this TRL is what fasttax knows"
    return {"works": works, "why": why, "targets": targets}


def found() -> dict[str, Any]:
    """All that the command says, as JSON has it."""
    ops = []
    for name in sorted(library.OPS):
        row = {"op": name}
        for device in ("cpu", "cuda"):
            row[device], row[f"{device}_why"] = library.active(name, device)
        ops.append(row)
    return {
        "fasttax": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": os.environ.get("FASTTAX_BACKEND", "auto (not set)"),
        "simd": simd(),
        "threads": torch.get_num_threads(),
        "gpu": gpu(),
        "cuda": torch.version.cuda or "none",
        "triton": version_of("triton"),
        "peers": peers(),
        "ops": ops,
        "patch": patch_of_trl(),
        "missing": [{"what": what, "command": command} for what, command in missing()],
    }


def report(facts: Mapping[str, Any]) -> str:
    """The facts in words: versions, a line an op, a line a target of `patch`, what is missing."""
    peers = "   ".join(f"{name} {version}" for name, version in facts["peers"].items())
    lines = [
        f"fasttax {facts['fasttax']}   torch {facts['torch']}   python {facts['python']}   "
        f"{facts['system']}",
        f"FASTTAX_BACKEND={facts['backend']}   SIMD: {facts['simd']}   threads: {facts['threads']}",
        f"GPU: {facts['gpu']}   torch's CUDA: {facts['cuda']}   triton: {facts['triton']}",
        peers,
        "",
        f"{'op':28} {'cpu':10} {'cuda':10} why",
    ]
    for row in facts["ops"]:
        why = f"cpu: {row['cpu_why']}; cuda: {row['cuda_why']}"
        lines.append(f"{row['op']:28} {row['cpu']:10} {row['cuda']:10} {why}")
    lines += ["", *_patch_lines(facts["patch"])]
    if not facts["missing"]:
        return "\n".join([*lines, "", "nothing is missing"])
    lines += ["", "missing:"]
    lines += [f"  {row['what']:44} {row['command']}" for row in facts["missing"]]
    return "\n".join(lines)


def _patch_lines(patch: Mapping[str, Any]) -> list[str]:
    """What `patch` replaces for whom, what it leaves alone, and why."""
    if not patch["targets"]:
        return [f"fasttax.integrations.trl.patch: {patch['why']}"]
    rows = patch["targets"]
    fitting = sum(row["fits"] for row in rows)
    lines = [f"fasttax.integrations.trl.patch: {fitting} of {len(rows)} targets fit this TRL"]
    for row in rows:
        said = "fits" if row["fits"] else f"left alone: {row['why']}"
        lines.append(f"  {row['target']} ({', '.join(row['trainers'])}): {said}")
    return lines


def warm_up() -> int:
    """Compiles the Triton kernels for the current GPU and says what and how long; 1 without one."""
    if not torch.cuda.is_available():
        where = "Triton's kernels are compiled on the GPU that they run on"
        return _refuse(f"torch sees no GPU here ({gpu()}); {where}")
    if not triton.available():
        return _refuse("triton is not installed; `pip install triton`")
    name = torch.cuda.get_device_name()
    device = torch.device("cuda", torch.cuda.current_device())
    done = _warm.warm(device, _say)
    total = sum(of.seconds for of in done)
    print(f"{len(done)} kinds of calls in {total:.1f} s for {name}; Triton keeps what it compiled")
    return 0


def _say(of: _warm.Warmed) -> None:
    print(f"{of.what:60} {of.seconds:6.1f} s", flush=True)


def _refuse(why: str) -> int:
    print(f"fasttax doctor --warm: {why}", file=sys.stderr)
    return 1


def main(argv: Sequence[str]) -> int:
    """Prints the report or its JSON, or warms Triton's cache."""
    args = _options.parsed(parser(), argv)
    if args.warm:
        return warm_up()
    facts = found()
    if args.json != json_results.STDOUT:
        print(report(facts))
    _options.write_json(OP, args.json, facts)
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(prog=OP, description=__doc__)
    parser.add_argument(
        "--warm",
        action="store_true",
        help="compile every Triton kernel for this machine's GPU; they stay in Triton's cache",
    )
    parser.add_argument(
        "--json",
        type=_options.Output,
        nargs="?",
        const=json_results.STDOUT,
        metavar="FILE",
        help="write what it found as JSON, or without FILE print that alone",
    )
    return parser
