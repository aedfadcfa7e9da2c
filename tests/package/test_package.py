"""What is installed: public names, backends, no library, the library's ABI, the repo's rules."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax import functional
from fasttax._base import library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fasttax.__file__).resolve().parent
LIBRARY = next(iter(PACKAGE.glob("_C.*so")), None)
# of Python 3.10's limited API: the module itself, and signals while an op computes
LIMITED = {"PyModule_Create2", "Py_IsInitialized", "Py_AddPendingCall"} | {
    *("PyErr_CheckSignals", "PyErr_Clear", "PyErr_Fetch", "PyErr_Restore", "PyErr_SetInterrupt"),
    *("PyGILState_Ensure", "PyGILState_Release"),
}
needs_library = pytest.mark.skipif(
    "_C" in library.problems, reason=f"_C: {library.problems.get('_C')}"
)

# Prints the numbers that any backend and any torch must agree on.
NUMBERS = """
import json, sys, torch, fasttax
from fasttax import functional as F, reference as R
x = torch.linspace(-3, 3, 7 * 37).reshape(7, 37)
y, d = x.flip(0) * 0.5, (x * 1.7).sin()[:, :13].contiguous()
theta, anchor, fisher = (z.flatten().contiguous() for z in (x, y, x.abs()))
def both(native):
    grad, out, cu = torch.ones_like(theta), torch.zeros(13, 37), torch.tensor([0, 3, 3, 7])
    if native:
        kl = fasttax.token_kl(x, y)
        value = F.ewc_add_grad_([theta], [grad], [anchor], [fisher], 2.0)
        F.linear_sqgrad(x, d, cu_seqlens=cu, out=out)
    else:
        kl = R.token_kl(x, y, None, 0, 0.5, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, False)[0]
        value = R.ewc_add_grad_([theta], [grad], [anchor], [fisher], [], 2.0, 1.0)
        R.linear_sqgrad_(out, x, d, cu, None)
    found = {"kl": kl, "penalty": value.reshape(1), "grad": grad, "fisher": out.flatten()}
    return {name: tensor.tolist() for name, tensor in found.items()}
ops = ("token_kl", "ewc_add_grad_", "linear_sqgrad_")
print(json.dumps({
    "torch": torch.__version__,
    "active": [fasttax._base.library.active(n, "cpu")[0] for n in ops],
    "ops": both(True),
    "reference": both(False),
}))
"""


def python(
    code: str, *, executable: str | Path = sys.executable, path: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("FASTTAX_BACKEND", "PYTHONWARNINGS")
    } | env
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [str(executable), "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        timeout=300,
    )


def numbers(**options: Any) -> dict[str, Any]:
    done = python(NUMBERS, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def assert_agree(a: Mapping[str, list[float]], b: Mapping[str, list[float]]) -> None:
    assert set(a) == set(b) == {"kl", "penalty", "grad", "fisher"}
    for name in a:
        torch.testing.assert_close(
            torch.tensor(a[name]),
            torch.tensor(b[name]),
            rtol=1e-5,
            atol=1e-6,
            msg=partial("{}: {}".format, name),
        )


# --- public names (design, section 2) -------------------------------------------------------------

NAMES = {
    "EWC",
    "DiagonalFisher",
    "FisherEstimate",
    "TokenStats",
    "estimate_fisher",
    "functional",
    "kl_estimate",
    "linear_token_kl",
    "linear_token_logprobs",
    "token_kl",
    "token_stats",
    "topk_kl",
    "topk_logprobs",
}
KL = (
    "kind beta temperature ref_temperature softcap ref_softcap logit_scale ref_logit_scale "
    "mask weight reduction inf inplace_backward tp_group"
)
KEYWORDS: dict[str, tuple[Callable[..., Any], str]] = {
    "token_kl": (fasttax.token_kl, f"logits ref_logits {KL}"),
    "token_stats": (fasttax.token_stats, "logits ref_logits ids outputs kind temperature mask"),
    "linear_token_kl": (
        fasttax.linear_token_kl,
        "hidden weight ref_hidden ref_weight bias ref_bias token_weight return_entropy grad_mode",
    ),
    "linear_token_logprobs": (fasttax.linear_token_logprobs, "hidden weight ids bias outputs"),
    "kl_estimate": (
        fasttax.kl_estimate,
        "logp ref_logp kind old_logp grad clip mask weight reduction",
    ),
    "topk_kl": (fasttax.topk_kl, "logits ref_topk_logp ref_topk_ids kind tail"),
    "topk_logprobs": (fasttax.topk_logprobs, "ref_logits k"),
    "estimate_fisher": (fasttax.estimate_fisher, "model batches labels unit max_examples progress"),
    "DiagonalFisher": (fasttax.DiagonalFisher, "model labels unit params tied lora generator"),
    "DiagonalFisher.update": (fasttax.DiagonalFisher.update, "batch"),
    "DiagonalFisher.reduce": (fasttax.DiagonalFisher.reduce, "group"),
    "DiagonalFisher.finalize": (fasttax.DiagonalFisher.finalize, "normalize storage"),
    "FisherEstimate.to": (fasttax.FisherEstimate.to, "storage"),
    "FisherEstimate.from_adam": (fasttax.FisherEstimate.from_adam, "optimizer"),
    "EWC": (
        fasttax.EWC,
        "model fisher strength anchor storage anchor_dtype offload clamp normalize",
    ),
    "EWC.add_grad_": (fasttax.EWC.add_grad_, "scale"),
    "EWC.prox_": (fasttax.EWC.prox_, "lr"),
    "EWC.attach": (fasttax.EWC.attach, "optimizer mode every"),
    "EWC.consolidate": (fasttax.EWC.consolidate, "fisher decay"),
    "EWC.load": (fasttax.EWC.load, "path model"),
    "ewc_penalty": (functional.ewc_penalty, "params anchors fishers strength"),
    "ewc_add_grad_": (functional.ewc_add_grad_, "params grads anchors fishers strength"),
    "ewc_prox_": (functional.ewc_prox_, "params anchors fishers strength_times_lr"),
    "lora_ewc_penalty": (functional.lora_ewc_penalty, "lora_A lora_B fisher scale strength"),
    "linear_sqgrad": (
        functional.linear_sqgrad,
        "inputs grad_outputs cu_seqlens example_weight out",
    ),
    "embedding_sqgrad": (functional.embedding_sqgrad, "ids grad_outputs num_embeddings"),
    "lm_head_fisher": (functional.lm_head_fisher, "hidden weight"),
}


def test_public_names() -> None:
    assert set(fasttax.__all__) >= NAMES
    assert all(getattr(fasttax, n, None) is not None for n in fasttax.__all__)
    squares = {"bias_sqgrad", "embedding_sqgrad", "linear_sqgrad", "lm_head_fisher", "norm_sqgrad"}
    assert set(functional.__all__) >= squares | {
        "ewc_add_grad_",
        "ewc_penalty",
        "ewc_prox_",
        "lora_ewc_penalty",
    }
    assert importlib.metadata.version("fasttax") == fasttax.__version__
    with pytest.raises(AttributeError, match=r"token_k1.*token_kl"):
        getattr(fasttax, "token_k1")  # noqa: B009 (the point is the error)


@pytest.mark.parametrize("name", KEYWORDS)
def test_signatures_keep_the_contract(name: str) -> None:
    function, words = KEYWORDS[name]
    missing = [w for w in words.split() if w not in inspect.signature(function).parameters]
    assert not missing, f"{name} lacks {missing}"
    assert inspect.getdoc(function)


# --- backends ---


def test_reference_backend_gives_the_same_numbers() -> None:
    forced, default = numbers(FASTTAX_BACKEND="reference"), numbers()
    assert forced["active"] == ["reference"] * 3
    assert "_C" in library.problems or default["active"] == ["C++"] * 3
    assert_agree(forced["ops"], default["ops"])
    assert "RuntimeWarning" not in forced["stderr"]


def test_wrong_backend_names_all_choices() -> None:
    done = python("import fasttax", FASTTAX_BACKEND="tpu")
    assert done.returncode != 0
    for word in (
        "ImportError",
        "FASTTAX_BACKEND",
        "auto",
        "reference",
        "cpp",
        "cuda",
        "triton",
        "'tpu'",
    ):
        assert word in done.stderr


ACTIVE = """
import fasttax
from fasttax._base import library
print(library.active("token_kl", "cpu")[0], *library.active("token_kl", "cuda"), sep=", ")
"""
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_backend() -> None:
    assert (
        python(ACTIVE, FASTTAX_BACKEND="triton")
        .stdout.strip()
        .endswith(", Triton, FASTTAX_BACKEND=triton")
    )
    assert (
        python(ACTIVE, FASTTAX_BACKEND="triton", TRITON_INTERPRET="1").stdout.strip()
        == "Triton, Triton, FASTTAX_BACKEND=triton"
    )
    if torch.version.cuda:  # where nvcc was missing at install, GPUs get Triton's kernels
        no_cuda = "import sys; sys.modules['fasttax._C_cuda'] = None\n" + ACTIVE
        assert ", Triton, CUDA C++: " in python(no_cuda).stdout


def test_triton_backend_without_triton() -> None:
    done = python(NO_TRITON + "import fasttax", FASTTAX_BACKEND="triton")
    assert (
        "ImportError: fasttax: FASTTAX_BACKEND=triton, but triton is not installed; `pip install "
        "triton`" in done.stderr
    )
    assert python(NO_TRITON + ACTIVE).returncode == 0


def test_without_the_built_library_it_warns_once_and_works(tmp_path: Path) -> None:
    shutil.copytree(
        PACKAGE, tmp_path / "fasttax", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # an editable install's finder would offer the library of the source folder
    isolated = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    )
    isolated += (
        f"sys.path.insert(0, {str(tmp_path)!r}); import fasttax; assert "
        f"fasttax.__file__.startswith({str(tmp_path)!r})\n"
    )
    done = python(
        isolated + "import importlib; importlib.import_module('fasttax.fisher')\n" + NUMBERS
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["active"] == ["reference"] * 3
    assert_agree(result["ops"], result["reference"])
    assert done.stderr.count("RuntimeWarning") == 1
    assert "pip install --no-build-isolation ." in done.stderr
    done = python(isolated, FASTTAX_BACKEND="cpp")
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr


# --- the built library ---


@needs_library
def test_library_uses_only_stable_symbols() -> None:
    assert LIBRARY is not None
    assert ".abi3." in LIBRARY.name
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split(" U ")[-1].strip() for line in done.stdout.splitlines() if " U " in line]
    assert any("aoti_torch" in s or "torch_" in s for s in symbols), (
        "no torch symbol at all: nm read something else"
    )
    unstable = [s for s in symbols if any(part in s for part in ("at::", "c10::", "torch::"))]
    assert not unstable, f"symbols outside torch's stable ABI: {unstable[:5]}"
    interpreter = {s.partition("@")[0] for s in symbols if s.startswith(("Py", "_Py"))}
    assert interpreter <= LIMITED, (
        f"not in Python 3.10's limited API, or not looked up: {interpreter}"
    )


def _other_torch(version: str) -> Path:
    """A cached environment with that torch.

    `done` is written last, so that a broken install is never reused.
    """
    home = Path.home() / ".cache" / "fasttax-tests"
    place = home / f"torch-{version}"
    if not (place / "done").is_file():
        shutil.rmtree(place, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        command = [
            str(place / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "-q",
            f"torch=={version}",
            "numpy",
            "safetensors",
            "tqdm",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            reason = f"pip could not install torch=={version}: {done.stderr.strip()[-300:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        (place / "done").touch()
    return place / "bin" / "python"


@pytest.mark.slow
@needs_library
def test_library_loads_under_another_torch(tmp_path: Path) -> None:
    """One build, two torch versions: the same three ops, against the reference under each."""
    executable = _other_torch("2.14.1" if torch.__version__.startswith("2.13.0") else "2.13.0")
    shutil.copytree(
        PACKAGE, tmp_path / "fasttax", ignore=shutil.ignore_patterns("__pycache__", "_C_cuda*")
    )
    here, there = numbers(), numbers(executable=executable, path=tmp_path)
    assert there["torch"].partition("+")[0] != here["torch"].partition("+")[0]
    assert there["active"] == ["C++"] * 3
    assert_agree(there["ops"], there["reference"])
    assert_agree(there["ops"], here["ops"])


# --- the repo's own rules ---


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_sizes() -> None:
    long = {
        p.name: n
        for p in tracked()
        if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and p.is_relative_to(ROOT)
        if p.parts[len(ROOT.parts)] in ("fasttax", "csrc")
        and (n := len(p.read_text().splitlines())) > 500
    }
    assert not long, f"over 500 lines: {long}"
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 100


def test_nothing_names_the_shared_folder() -> None:
    word = ".." + "/shared"
    named = [str(p.relative_to(ROOT)) for p in tracked() if word.encode() in p.read_bytes()]
    assert not named, f"{word} is not part of the repo: {named}"
