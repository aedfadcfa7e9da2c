"""The Fisher's Triton kernels without a GPU: the ops against float64 in Triton's interpreter, and
their machine code for GPUs that are not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax  # noqa: F401  (registers the ops)
from tests.tools.utils import assert_within

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
from tests.tools.triton_tools import (
    TARGETS,
    check_in_the_interpreter,
    compiled,
    run_in_the_interpreter,
)

CASES: dict[str, tuple[tuple[int, ...], int, int]] = {  # lengths of the examples, in, out
    "tiles": ((32, 64), 64, 64),  # whole tiles of F and of tokens
    "large": ((70, 3), 300, 257),  # six large tiles, which the interpreter's GPU takes
    "ragged": ((5, 0, 41, 1), 70, 37),  # no multiple of any tile; an empty example
    "single": ((1,) * 40, 33, 65),  # the product of squares
    "as_many": ((2, 0, 1), 5, 3),  # as many examples as rows, but not one each
}


def check() -> None:
    torch.manual_seed(0)
    op: Any = torch.ops.fasttax
    for lengths, i, o in CASES.values():
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            a, d, x = (torch.randn(int(cu[-1]), w).to(dtype) for w in (i, o, o))
            for weight in (None, torch.rand(len(lengths), dtype=out_dtype)):
                calls: dict[str, tuple[tuple[int, ...], tuple[Tensor, ...]]] = {
                    "linear_sqgrad_": ((o, i), (a, d)),
                    "bias_sqgrad_": ((o,), (d,)),
                    "norm_sqgrad_": ((o,), (x, d)),
                }
                for name, (shape, operands) in calls.items():
                    start = torch.rand(shape, dtype=out_dtype)
                    out, own, truth = start.clone(), start.clone(), start.double()
                    getattr(op, name)(out, *operands, cu, weight)
                    getattr(op, "_reference_" + name)(own, *operands, cu, weight)
                    getattr(op, "_reference_" + name)(
                        truth,
                        *(t.double() for t in operands),
                        cu,
                        None if weight is None else weight.double(),
                    )
                    assert_within(out, own, truth, name=name)
                check_words(d, cu, weight)
    print("right")


def check_words(d: Tensor, cu: Tensor, weight: Tensor | None) -> None:
    """Few words, so that they repeat within examples and among them; one is skipped, and some are
    not there.
    """
    op: Any = torch.ops.fasttax
    for words, skip in ((9, 2), (1, -1)):
        ids = torch.randint(0, words, d.shape[:1])
        wide = torch.float64 if d.dtype == torch.float64 else torch.float32
        start = torch.rand(words + 3, d.shape[1], dtype=wide)
        out, own, truth = start.clone(), start.clone(), start.double()
        op.embedding_sqgrad_(out, ids, d, cu, weight, skip)
        op._reference_embedding_sqgrad_(own, ids, d, cu, weight, skip)
        op._reference_embedding_sqgrad_(
            truth, ids, d.double(), cu, None if weight is None else weight.double(), skip
        )
        assert_within(out, own, truth, name="embedding_sqgrad_")
        assert torch.equal(out[words:], start[words:])
        assert skip < 0 or torch.equal(out[skip], start[skip])


def test_results_in_the_interpreter() -> None:
    assert check_in_the_interpreter(__file__, "t.check()").strip() == "right"


@pytest.mark.parametrize("file", ["fisher/test_fisher_head.py", "fisher/test_accumulate_sqgrad.py"])
def test_the_ops_own_tests_in_the_interpreter(file: str) -> None:
    """But for what a direct call of C++ refuses: Triton's ops are called with what has been
    checked.
    """
    assert run_in_the_interpreter(file, "not opcheck and not any_row and not direct_op_call") >= 6


SIZES = dict.fromkeys(("examples", "inputs", "outputs", "a_stride", "d_stride"), "i32")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("products", "size"), [("bf16", 8192), ("bf16", 64), ("tf32", 8192), ("fp32", 64)]
)
def test_tiles_have_no_spills_and_use_tensor_cores(
    target: str, products: str, size: int, tmp_path: Path
) -> None:
    """Of the tile that a layer of that size takes there; what it shares fits the smallest GPU of
    its kind.
    """
    from fasttax.triton import fisher_linear as fisher

    major = 9 if target == "gfx942" else int(target.removeprefix("sm_")) // 10
    precision = "tf32" if products == "tf32" else "ieee"
    tile = fisher.tile_of(size, size, products == "bf16", precision, 132, major)
    if products == "bf16" and size == 8192:
        assert tile == (fisher.MIDDLE if target == "sm_120" else fisher.LARGE)
    operand = "*bf16" if products == "bf16" else "*fp32"
    types = {
        "out_ptr": "*fp32",
        "a_ptr": operand,
        "d_ptr": operand,
        "cu_ptr": "*i64",
        "ragged_ptr": "*i32",
        **SIZES,
    }
    constants = {
        "WIDE": False,
        "PRECISION": precision,
        "TILE_O": tile.outputs,
        "TILE_I": tile.inputs,
        "TILE_T": tile.tokens,
        "FOLD": fisher.FOLD,
    }
    warps = {"num_warps": tile.warps}
    binary = compiled(fisher.linear_kernel, target, types, constants, warps, tmp_path)
    assert binary.spills == 0
    lanes, file = (64, 1 << 17) if target == "gfx942" else (32, 1 << 16)
    assert binary.registers * tile.warps * lanes <= file
    assert binary.shared <= (64 << 10 if target == "gfx942" else 99 << 10)
    if products != "fp32":
        assert any(word in binary.code for word in ("HMMA", "GMMA", "UTCHMMA", "mfma")), (
            "no tensor-core instruction"
        )
    if target.startswith("sm_") and products == "bf16":
        # both operands go to shared memory beside the products of the tile before
        assert binary.code.count("LDGSTS") >= 4


@pytest.mark.parametrize("target", TARGETS)
def test_single_tokens_have_no_spills(target: str, tmp_path: Path) -> None:
    from fasttax.triton import fisher_linear as fisher

    tile = fisher.SINGLE
    types = {
        "out_ptr": "*fp32",
        "a_ptr": "*bf16",
        "d_ptr": "*bf16",
        "ragged_ptr": "*i32",
        **SIZES,
    }
    constants = {
        "TILE_O": tile.outputs,
        "TILE_I": tile.inputs,
        "TILE_T": tile.tokens,
        "FOLD": fisher.FOLD,
    }
    warps = {"num_warps": tile.warps}
    binary = compiled(fisher.single_kernel, target, types, constants, warps, tmp_path)
    assert binary.spills == 0


def test_tf32_is_torchs_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttax.triton import fisher_linear as fisher

    assert fisher.precision() == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert fisher.precision() == ("ieee" if torch.version.hip else "tf32")


def test_the_row_kernel_compiles(tmp_path: Path) -> None:
    from fasttax.triton import fisher

    types = {
        "out_ptr": "*fp32",
        "x_ptr": "*bf16",
        "d_ptr": "*bf16",
        "cu_ptr": "*i64",
        "weight_ptr": "*fp32",
        "examples": "i32",
        "width": "i32",
        "x_stride": "i32",
        "d_stride": "i32",
    }
    binary = compiled(
        fisher.elementwise_kernel,
        "sm_90",
        types,
        {"COLUMNS": fisher.COLUMNS, "TOKENS": fisher.TOKENS},
        {"num_warps": 4},
        tmp_path,
    )
    assert binary.spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_words_rows_and_lists_compile(target: str, tmp_path: Path) -> None:
    """No spills, and accesses of 16 bytes where a row's entries lie side by side."""
    import triton.language as tl

    from fasttax.triton import fisher, tables

    pointers = {
        name: "*i64" for name in ("order_ptr", "word_ptr", "end_ptr", "last_ptr", "example_ptr")
    }
    kernels: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
        "words": (
            fisher.words_kernel,
            {
                "out_ptr": "*fp32",
                "d_ptr": "*fp32",
                **pointers,
                "width": "i32",
                "d_stride": "i32",
                "skip": "i32",
            },
            {"COLUMNS": fisher.WORD_COLUMNS, "TOKENS": fisher.WORD_TOKENS},
            4,
        ),
        "variance": (
            fisher.variance_kernel,
            {"x_ptr": "*fp32", "V": "i32", "stride": "i32"},
            {"BLOCK": fisher.ROW_BLOCK},
            8,
        ),
        "squares": (
            fisher.squares_kernel,
            {"table_ptr": "*i64", "weight": "fp32", "rows": "i32"},
            {"GRAD": tl.float32, "ALIGNED": True, "BLOCK": tables.BLOCK},
            4,
        ),
    }
    for name, (kernel, types, constants, warps) in kernels.items():
        binary = compiled(kernel, target, types, constants, {"num_warps": warps}, tmp_path)
        assert binary.spills == 0, name
        assert binary.registers <= 128, (name, binary.registers)
        assert any(wide in binary.code for wide in (".128", "dwordx4")), (
            f"{name}: no 16-byte access"
        )
