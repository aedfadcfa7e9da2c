"""Every Triton kernel's PTX, compiled for sm_90 and executed on the machine of tests/gpu/ptx:
results against float64, races, bounds, unwritten and uninitialised memory; bytes against the floor
and instructions against budgets. No GPU and no driver.

`make test-ptx` runs the cases marked `full` too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import logits
from fasttax import reference
from fasttax.kl.call import tempering
from tests.gpu.ptx import budgets, measure
from tests.gpu.ptx.kl import Rows, check_kl, check_stats
from tests.gpu.ptx.lists import (
    MIXES,
    check_adamw,
    check_ewc,
    check_squares,
    check_weigh,
    close,
    doubles,
)
from tests.gpu.ptx.simulation import Simulation
from tests.tools.kl_cases import KINDS
from tests.tools.utils import assert_within

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
from tests.gpu.ptx.triton_driver import OPS, simulated

full = pytest.mark.full
DTYPES = measure.DTYPES
ROWS = {
    "odd": Rows(2051),
    "off": Rows(1203, stride=3, shift=1),
    "tail": Rows(9001, tokens=2, apart=0.02),
    "masked": Rows(1100, masked=True),
    "ruled out": Rows(1300, ruled_out=True, options={"inf": "mask"}),
    "softcap": Rows(2100, options={"softcap": 5.0, "ref_softcap": 5.0, "temperature": 0.8}),
}
# each compiles four kernels, which takes Triton seconds
ORDINARY = ("odd-policy_ref-bfloat16", "off-jsd-float32", "masked-ref_policy-float32")


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        pytest.param(*case, marks=() if "-".join(case) in ORDINARY else full)
        for case in ((name, kind, dtype) for name in ROWS for kind in KINDS for dtype in DTYPES)
    ],
)
def test_kl(name: str, kind: str, dtype: str) -> None:
    rows = ROWS[name]
    options = {**rows.options, "kind": kind}
    if kind in ("jsd", "renyi"):
        options["beta"] = 0.3
    with simulated() as sim:
        check_kl(sim, OPS, Rows(**{**vars(rows), "dtype": DTYPES[dtype], "options": options}))


@pytest.mark.parametrize("pair", [True, pytest.param(False, marks=full)], ids=["pair", "alone"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=full)])
def test_token_stats(dtype: str, pair: bool) -> None:
    with simulated() as sim:
        check_stats(sim, OPS, Rows(2051, dtype=DTYPES[dtype], masked=True), pair)


@pytest.mark.parametrize(
    "mix", ["packed", *(pytest.param(m, marks=full) for m in MIXES if m != "packed")]
)
def test_ewc_and_adamw(mix: str) -> None:
    with simulated() as sim:
        check_ewc(sim, OPS, MIXES[mix])
    with simulated() as sim:
        check_adamw(sim, OPS, MIXES[mix], True, True)


def test_squares() -> None:
    with simulated() as sim:
        check_squares(sim, OPS, torch.bfloat16)


@pytest.mark.parametrize("reduction", [0, 1])
def test_weigh(reduction: int) -> None:
    with simulated() as sim:
        check_weigh(sim, OPS, reduction, True)


# --- the Fisher's ops -----------------------------------------------------------------------------


def judged(sim: Simulation, name: str, shape: Any, *operands: Any) -> None:
    """An op that adds to its first argument, by the reference's own error."""
    start = torch.rand(shape)
    out, own, truth = start.clone(), start.clone(), start.double()
    sim.give(*operands)
    sim.give(out, readonly=False)
    getattr(OPS, name)(out, *operands)
    by_reference: Any = getattr(torch.ops.fasttax, "_reference_" + name)
    by_reference(own, *operands)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in operands]
    by_reference(truth, *wide)
    assert_within(out, own, truth, name=name)


FISHER = {  # lengths of the examples, in, out
    "tiles": ((32, 64), 64, 64),
    "ragged": ((5, 0, 41, 1), 70, 37),
    "single": ((1,) * 40, 33, 65),
}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=full)])
@pytest.mark.parametrize("case", FISHER)
def test_fisher(case: str, dtype: str) -> None:
    lengths, inputs, outputs = FISHER[case]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tokens = int(cu[-1])
    a, d = (torch.randn(tokens, width).to(DTYPES[dtype]) for width in (inputs, outputs))
    weight = torch.rand(len(lengths))
    with simulated() as sim:
        judged(sim, "linear_sqgrad_", (outputs, inputs), a, d, cu, weight)
        judged(sim, "bias_sqgrad_", (outputs,), d, cu, None)
        judged(sim, "norm_sqgrad_", (outputs,), d.clone(), d, cu, weight)


def test_words_and_labels() -> None:
    d, ids = torch.randn(47, 37).bfloat16(), torch.randint(0, 9, (47,))
    cu, weight = torch.tensor([0, 5, 5, 46, 47]), torch.rand(4)
    logits = torch.randn(5, 3001)
    want = logits.double()
    with simulated() as sim:
        start = torch.rand(9, 37)
        out, truth = start.clone(), start.double()
        sim.give(d, ids, cu, weight)
        sim.give(out, logits, readonly=False)
        OPS.embedding_sqgrad_(out, ids, d, cu, weight, 2)
        reference.embedding_sqgrad_(truth, ids, d.double(), cu, weight.double(), 2)
        close([out], [truth])
        OPS.label_variance_(logits)
        reference.label_variance_(want)
        close([logits], [want])


@pytest.mark.parametrize("gradient", [True, pytest.param(False, marks=full)])
def test_lora(gradient: bool) -> None:
    a, b, fisher = torch.randn(3, 65), torch.randn(33, 3), torch.rand(33, 65)
    none = torch.empty(0)
    with simulated() as sim:
        sim.give(a, b, fisher)
        got = OPS.lora_ewc_penalty(a, b, fisher, none, 0.25, 3.0, gradient)
    wide = doubles([a, b, fisher])
    by_reference: Any = reference.lora_ewc_penalty
    want = by_reference(*wide, none, 0.25, 3.0, gradient)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=3e-5, atol=1e-4)


# --- bytes and instructions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if (kind, dtype) == ("policy_ref", "bfloat16") else full)
        for kind in KINDS
        for dtype in ("bfloat16", "float32")
    ],
)
def test_kl_moves_what_it_must(kind: str, dtype: str) -> None:
    with simulated() as sim:
        found = measure.kl(sim, OPS, kind, dtype)
    for op, (moved, _) in found.items():
        floor = budgets.kl_bytes(kind, op, DTYPES[dtype].itemsize, True)
        if op == "both":  # a forward and then a gradient, of rows that L2 holds
            floor += 2 * DTYPES[dtype].itemsize
        assert moved <= budgets.SLACK * floor, (op, moved, floor)
    assert not budgets.over(f"Triton {kind} {dtype}", measure.steps(found))


@pytest.mark.parametrize("kind", ["policy_ref", pytest.param("ref_policy", marks=full)])
@pytest.mark.parametrize(
    ("data", "most"),
    [("moved .3", 1.5), ("confident", 1.5), ("equal", 1.5), pytest.param("far", 1.85, marks=full)],
)
def test_a_softcap_costs_half_as_much_again(data: str, most: float, kind: str) -> None:
    """Of bfloat16 rows under one cap, none of which is read twice; those far apart take two
    exponentials for the two tanhs of an entry.
    """
    x, y = logits.pair(data, 1, 4 * measure.WORDS, torch.bfloat16)
    taken = []
    for options in ({}, {"softcap": 30.0, "ref_softcap": 30.0}):
        args = tempering("test", kind=kind, **options).args()
        with simulated() as sim:
            sim.give(x, y)
            OPS.token_kl(x, y, None, *args)
            taken.append(sim.reports[-1])
    plain, capped = taken
    assert capped.instructions <= most * plain.instructions
    assert capped.read <= 1.02 * x.numel() * 2 * x.element_size()


@pytest.mark.parametrize("mix", ["float32", pytest.param("packed", marks=full)])
def test_lists_move_what_they_must(mix: str) -> None:
    with simulated() as sim:
        found = measure.lists(sim, OPS, mix)
    for op, (moved, _) in found.items():
        assert moved <= budgets.SLACK * budgets.LIST_BYTES[mix][op], (op, moved)
    assert not budgets.over(f"Triton lists {mix}", measure.steps(found))
