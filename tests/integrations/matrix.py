"""docs/versions.md: versions x features, each cell from a run on this machine.

    python -m tests.integrations.matrix [--envs .venv] [--only WORDS] [--write]

A pair of TRL and transformers has an environment of its own beside this one's packages (torch and
all that the pair is content with are this one's), as `make test-trl` makes it; `newest` is this
one. Launchers and frameworks have theirs. Ends with 1 where a cell failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "versions.md"
# the oldest that pyproject.toml takes; verl's, Axolotl's, unsloth's
PAIRS = (("0.27.2", "5.0.0"), ("0.27.2", "5.9.0"), ("1.9.0", "5.16.1"), ("1.15.0", "5.17.0"))
LAUNCHERS = ("DDP", "FSDP2", "FSDP1", "ZeRO-1", "ZeRO-2", "ZeRO-3")
SAID = {"ok": "ok", "refused": "refused", "absent": "-", "theirs": "TRL's own fails"}


@dataclass(frozen=True)
class Framework:
    """A framework with an environment of its own.

    Attributes:
        name: of its row.
        packages: what pip installs without their dependencies.
        needed: what pip installs with them.
        test: of pytest, which runs against its real classes there.
    """

    name: str
    packages: tuple[str, ...]
    needed: tuple[str, ...]
    test: tuple[str, ...]


DEEPSPEED = "deepspeed==0.19.8"
OF_DEEPSPEED = ("wheel", "setuptools<81", "hjson", "msgpack", "py-cpuinfo", "einops")
FRAMEWORKS = (
    Framework(
        "Axolotl 0.19.0",
        ("axolotl==0.19.0",),
        ("trl==1.9.0", "transformers==5.16.1", "addict", "colorama"),
        ("tests/integrations/test_axolotl.py",),
    ),
    Framework(
        "LLaMA-Factory 0.9.5",
        ("llamafactory==0.9.5", "trl==0.24.0", "peft==0.18.1", "torchaudio"),
        ("transformers==5.6.0", "fire", "omegaconf"),
        ("tests/integrations/test_llamafactory.py",),
    ),
    Framework(
        "verl 0.9.1",
        ("verl==0.9.1",),
        ("ray", "tensordict", "orjson", "hydra-core", "codetiming", "dill"),
        ("tests/integrations/test_rlhf.py",),
    ),
    Framework(
        "OpenRLHF 0.11.2",
        ("openrlhf==0.11.2", DEEPSPEED),
        (*OF_DEEPSPEED, "pylatexenc"),
        ("tests/integrations/test_rlhf.py",),
    ),
)


@dataclass
class Notes:
    """Numbered reasons, one for each that differs."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """A reference to a reason."""
        text = " ".join(text.split())
        if text not in self.texts:
            self.texts.append(text)
        return f" ({self.texts.index(text) + 1})"


@dataclass
class Cells:
    """What came of everything, as lines of Markdown."""

    notes: Notes = field(default_factory=Notes)
    failed: list[str] = field(default_factory=list)

    def cell(self, where: str, kind: str, why: str) -> str:
        """One cell's text."""
        if kind not in SAID:
            self.failed.append(f"{where}: {why}")
            return "FAILED" + self.notes.mark(why)
        return SAID[kind] + (self.notes.mark(why) if kind in ("refused", "theirs") else "")


# --- environments ---------------------------------------------------------------------------------


def environment(folder: Path, name: str, alone: Sequence[str], needed: Sequence[str] = ()) -> str:
    """The python of an environment that has `alone` before this one's packages."""
    made = folder / name
    python = str(made / "bin" / "python")
    if not (made / "made").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
        place = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(place) / "base.pth").write_text(site.getsitepackages()[0] + "\n")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        if needed:
            subprocess.run([*pip, *needed], check=True)
        settings = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
        if alone:
            isolated = ["--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, *isolated, *alone], check=True, env=settings)
        # verl's wheel and OpenRLHF's have a package of this name, which would hide this one
        shutil.rmtree(Path(place) / "tests", ignore_errors=True)
        (made / "made").touch()
    return python


def run(python: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module of these tests in an environment; what it said is kept."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory's, of packages that are newer here
    }
    return subprocess.run(
        [python, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )


# --- the tables -----------------------------------------------------------------------------------


def pair_columns(envs: Path, words: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """By column's title the answers of `tests.integrations.features`."""
    columns: dict[str, dict[str, tuple[str, str]]] = {}
    pythons = [
        environment(envs, f"trl-{v}-{hf}", (), (f"trl=={v}", f"transformers=={hf}"))
        for v, hf in PAIRS
    ]
    for python in (*pythons, sys.executable):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            begun = time.monotonic()
            said = run(python, "tests.integrations.features", str(out), *words)
            if not out.is_file():
                raise RuntimeError(f"{python}: {said.stderr[-4000:]}")
            found = json.loads(out.read_text())
        versions = found["versions"]
        title = f"TRL {versions['trl']}, transformers {versions['transformers']}"
        columns[title] = {name: (kind, why) for name, (kind, why) in found["features"].items()}
        print(f"{title}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
        if any(kind == "failed" for kind, _ in columns[title].values()):
            print(said.stderr[-4000:], file=sys.stderr)
    return columns


def pairs_table(cells: Cells, columns: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """Features down, pairs across."""
    names = list(next(iter(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        found = [cells.cell(f"{t}: {name}", *answers[name]) for t, answers in columns.items()]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return lines


def launched(envs: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """EWC and the KL under `accelerate launch` on two gloo processes, by launcher."""
    python = environment(envs, "deepspeed", (DEEPSPEED,), OF_DEEPSPEED)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        said = run(python, "tests.integrations.launchers", str(out), *LAUNCHERS)
        if not out.is_file():
            raise RuntimeError(said.stderr[-4000:])
        print(said.stderr[-4000:], file=sys.stderr)
        found: dict[str, dict[str, tuple[str, str]]] = json.loads(out.read_text())
        return found


def launchers_table(cells: Cells, found: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """Launchers down."""
    lines = [f"| `accelerate launch` ({DEEPSPEED}) | EWC | KL |", "|---|---|---|"]
    for name in LAUNCHERS:
        answers = [cells.cell(f"{name}: {what}", *found[name][what]) for what in ("ewc", "kl")]
        lines.append(f"| {name} | " + " | ".join(answers) + " |")
    return lines


def frameworks_table(cells: Cells, envs: Path) -> list[str]:
    """Tests against the frameworks' real classes."""
    lines = ["| framework | its tests against the real classes |", "|---|---|"]
    for framework in FRAMEWORKS:
        folder = framework.name.split()[0].lower()
        python = environment(envs, folder, framework.packages, framework.needed)
        said = run(python, "pytest", "-q", "-p", "no:cacheprovider", *framework.test)
        last = said.stdout.strip().splitlines()[-1]
        passed = re.search(r"(\d+) passed", last)
        if said.returncode or passed is None:
            answer = cells.cell(framework.name, "failed", last)
            print(said.stdout[-4000:], file=sys.stderr)
        else:
            answer = f"ok, {passed[1]} tests"
        lines.append(f"| {framework.name} | {answer} |")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Fills the tables; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv")
    parser.add_argument("--only", nargs="*", default=[], help="features with one of these words")
    parser.add_argument("--pairs", action="store_true", help="leave launchers and frameworks out")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    cells = Cells()
    with ThreadPoolExecutor(2) as both:
        others = both.submit(lambda: None if options.pairs else launched(options.envs))
        lines = pairs_table(cells, pair_columns(options.envs, options.only))
        found = others.result()
    if found is not None:
        lines += ["", *launchers_table(cells, found)]
        lines += ["", *frameworks_table(cells, options.envs)]
    lines += ["", *(f"{i}. {text}" for i, text in enumerate(cells.notes.texts, 1))]
    head = [
        "# Versions and features",
        "",
        "Written by `make matrix`, not by hand: each cell is a run on a CPU, compared with the",
        "same numbers by another way (`tests/integrations/features.py`, `launchers.py`). A - is",
        "a trainer that the version lacks.",
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    if options.write:
        TABLE.write_text(text)
    else:
        print(text)
    for failure in cells.failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if cells.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
