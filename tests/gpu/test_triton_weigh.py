"""The Triton kernels of the tokens' results and of held gradients without a GPU: the ops' tests in
Triton's interpreter, and machine code for GPUs that are not there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fasttax.reference.weigh import K1, K2, K3
from fasttax.triton import weigh
from tests.tools.triton_tools import TARGETS, Binary, compiled, run_in_the_interpreter

ROWS = ("*fp32",) * 7
NUMBERS = {"n": "i32", "scale": "fp32", "clip": "fp32", "top": "fp32"}
OUTPUTS = (0, 2, 6, K1, K2, K3)
META = {"OUTPUTS": OUTPUTS, "PAIR": (0, 1, 3), "MEAN": True, "BLOCK": weigh.BLOCK}
OF_TOKENS = {"mask_ptr": "*i1", "weight_ptr": "*fp32"}
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "tokens": (
        weigh.tokens_kernel,
        {"rows": ROWS, "results": ROWS[:6], **OF_TOKENS, **NUMBERS},
        META,
    ),
    "sums": (weigh.sums_kernel, {"rows": ROWS, "results": ROWS[:6], **OF_TOKENS, **NUMBERS}, META),
    "weights": (
        weigh.weights_kernel,
        {"by_token_ptr": "*fp32", **OF_TOKENS, "n": "i32", "scale": "fp32"},
        META,
    ),
    "backward": (
        weigh.backward_kernel,
        {"rows": ROWS, "grads": ROWS[:6], "by_row_ptr": "*fp32", **OF_TOKENS, **NUMBERS},
        {**META, "STEPS": (1, 0, 1, 1, 0, 1), "REVERSE": False},
    ),
    "scale": (
        weigh.scale_kernel,
        {"held_ptr": "*bf16", "factor_ptr": "*fp32", "rows": "i32", "width": "i32"},
        {"ENTRIES": weigh.ENTRIES},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def build(name: str, target: str, folder: Path, without: tuple[str, ...] = ()) -> Binary:
    kernel, types, constants = KERNELS[name]
    types = {key: of for key, of in types.items() if key not in without}
    ones = {key: 1 for key in without if key in ("n", "rows")}
    warps = 4 if name == "scale" else weigh.WARPS
    return compiled(kernel, target, types, {**constants, **ones}, {"num_warps": warps}, folder)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, target: str, folder: Path) -> None:
    binary = build(name, target, folder)
    assert binary.spills == 0
    if name == "scale" and target.startswith("sm"):
        assert re.search(r"LDG\.E.*\.128", binary.code)
        assert re.search(r"STG\.E.*\.128", binary.code)


@pytest.mark.parametrize("name", KERNELS)
def test_one_token_and_no_mask(name: str, folder: Path) -> None:
    """Triton makes a constant of an integer that is 1; a mask that is None is left out."""
    absent = ("n", "rows", "mask_ptr", "weight_ptr") if name != "backward" else ("n", "mask_ptr")
    keep = {"tokens": ("rows",), "sums": ("rows",)}.get(name, ())
    assert build(name, "sm_90", folder, tuple(x for x in absent if x not in keep)).spills == 0


def test_ops_in_the_interpreter() -> None:
    # whose bfloat16 is cut off, not rounded
    cut = "not (test_scale_held and bfloat16 and not powers) and not is_not_rounded"
    assert run_in_the_interpreter("kl/test_weigh.py", cut) >= 60
