"""Every CUDA kernel's PTX, executed: the library of csrc/cuda, whole, on the machine of
tests/gpu/ptx. Results against float64, races, bounds, unwritten and uninitialised memory; bytes
against the floor and instructions against budgets.

`make test-ptx` runs the cases marked `full` too, and those of sm_80.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fasttax.kl.call import tempering
from tests.gpu.ptx import budgets, measure
from tests.gpu.ptx.cuda import GPUS, SMALL, CudaSimulation, Gpu, simulated
from tests.gpu.ptx.kl import Rows, check_kl, check_stats
from tests.gpu.ptx.lists import (
    MIXES,
    check_adamw,
    check_ewc,
    check_squares,
    check_weigh,
)
from tests.gpu.ptx.simulation import Simulation, of
from tests.tools.kl_cases import KINDS

full = pytest.mark.full
DTYPES = measure.DTYPES
# a GPU whose shared memory holds no row: kl_both takes two sweeps
TWO_SWEEPS = GPUS["90"]._replace(block_limit=50000, sm_limit=51024, multiprocessors=1)
CLUSTERS = GPUS["90"]._replace(block_limit=50000, sm_limit=101024)


def cases(names: dict[str, Rows], ordinary: dict[str, str]) -> list[Any]:
    """(name, kind, dtype) of each; in every run those of `ordinary`: a kind's names by a space."""
    return [
        pytest.param(
            rows,
            kind,
            dtype,
            id=f"{name}-{kind}-{dtype}",
            marks=() if f"{name}-{dtype}" in ordinary.get(kind, "").split() else full,
        )
        for name, rows in names.items()
        for kind in KINDS
        for dtype in DTYPES
        if (name, kind) not in LEFT_OUT
    ]


# models that agree in nothing, or all but so: the gradients are 1e-9, less than p's own rounding
LEFT_OUT = (("far", "jsd"),)
ROWS = {
    "odd": Rows(2051),
    "one": Rows(1),
    "off": Rows(1203, stride=3, shift=1),
    "tail": Rows(9001, tokens=2, apart=0.02),
    "far": Rows(9001, tokens=2, size=300.0, apart=30.0),
    "masked": Rows(1100, masked=True),
    "ruled out": Rows(1300, ruled_out=True, options={"inf": "mask"}),
    "softcap": Rows(2100, options={"softcap": 5.0, "ref_softcap": 5.0, "temperature": 0.8}),
    "tempered": Rows(1300, options={"temperature": 0.7, "ref_temperature": 1.3}),
}
ORDINARY = {
    "policy_ref": "odd-float32 off-bfloat16 tail-bfloat16 odd-float16 masked-float32 "
    "softcap-bfloat16 one-float32",
    "ref_policy": "odd-float32 off-bfloat16 far-bfloat16 tempered-float16",
    "jsd": "odd-float32 off-bfloat16 softcap-float32 odd-float16",
    "renyi": "odd-float32 off-bfloat16 tempered-float16",
}


def run_kl(rows: Rows, kind: str, dtype: str, arch: str, gpu: Gpu) -> Simulation:
    options = {**rows.options, "kind": kind}
    if kind in ("jsd", "renyi"):
        options["beta"] = 0.3
    given = Rows(**{**vars(rows), "dtype": DTYPES[dtype], "options": options})
    with simulated(arch, gpu) as sim:
        check_kl(sim, sim.ops, given)
    return sim


@pytest.mark.parametrize(("rows", "kind", "dtype"), cases(ROWS, ORDINARY))
def test_kl(rows: Rows, kind: str, dtype: str) -> None:
    """On a GPU that takes a block a row, and on one that splits rows among blocks."""
    whole = run_kl(rows, kind, dtype, "90", SMALL)
    # the gradients alone, and kl_both's kernel or a forward and a gradient
    assert len(of(whole.reports, "kl_gradient_kernel")) >= 3
    if rows.words > 4000 or dtype == "float32":
        run_kl(rows, kind, dtype, "90", GPUS["90"])


@pytest.mark.parametrize("size", [30.0, 1.0], ids=["frames apart", "frames alike"])
def test_a_policy_of_one_token_has_a_gradient_of_zero(size: float) -> None:
    """Its log-ratio is the KL, to the bit where each row has a frame of its own, to a unit in its
    last place where they share one; in the forward and in each kernel that makes gradients.
    """
    with simulated("90", SMALL) as sim:
        x, y = torch.full((2, 700), -300.0), torch.randn(2, 700) * size
        x[:, 3] = 100 if size > 1 else 2
        upstream = torch.ones(2)
        sim.give(x, y, upstream)
        for temperature in (0.7, 0.01):
            args = tempering("test", kind="policy_ref", temperature=temperature).args()
            kl, saved = sim.ops.token_kl(x, y, None, *args)
            dx, _ = sim.ops.token_kl_backward(upstream, x, y, None, saved, *args, True, False)
            _, fused, _ = sim.ops.token_kl_grad(upstream, x, y, None, *args, True, False)
            assert (kl > 1).all()
            allowed = 0.0 if size > 1 else torch.finfo(kl.dtype).eps * kl / temperature
            for gradient in (dx, fused):
                assert bool((gradient[:, 3].abs() <= allowed).all()), (temperature, gradient[:, 3])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=full)])
@pytest.mark.parametrize("kind", KINDS)
def test_kl_with_rows_on_chip_or_not(kind: str, dtype: str) -> None:
    """kl_both in one block, in a cluster, and in two sweeps where no cluster holds a row."""
    wide = Rows(20000 if dtype == "bfloat16" else 9001, tokens=2, apart=0.05)
    small = run_kl(Rows(1027), kind, dtype, "90", SMALL)
    assert len(of(small.reports, "kl_resident_kernel")) == 1
    cluster = run_kl(wide, kind, dtype, "90", CLUSTERS)
    assert len(of(cluster.reports, "kl_resident_kernel")) == 1
    longer = Rows(210_001 if dtype == "bfloat16" else 110_001, tokens=1, apart=0.05)
    sweeps = run_kl(longer, kind, dtype, "90", TWO_SWEEPS)
    assert len(of(sweeps.reports, "kl_two_sweeps_kernel")) == 1


STATS = {
    "odd": Rows(2051),
    "off": Rows(1203, stride=3, shift=1),
    "masked": Rows(1100, masked=True),
    "softcap": Rows(2100, options={"softcap": 5.0, "ref_softcap": 4.0, "temperature": 0.8}),
}


@pytest.mark.parametrize("pair", [True, False], ids=["pair", "alone"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=()
            if f"{name}-{dtype}" in ("odd-float32", "off-bfloat16", "masked-float16")
            else full,
        )
        for name in STATS
        for dtype in DTYPES
    ],
)
def test_token_stats(name: str, dtype: str, pair: bool) -> None:
    for gpu in (SMALL, GPUS["90"]):
        with simulated("90", gpu) as sim:
            check_stats(sim, sim.ops, Rows(**{**vars(STATS[name]), "dtype": DTYPES[dtype]}), pair)


@pytest.mark.parametrize("mix", MIXES)
def test_ewc(mix: str) -> None:
    with simulated() as sim:
        check_ewc(sim, sim.ops, MIXES[mix])


@pytest.mark.parametrize("mix", MIXES)
def test_adamw(mix: str) -> None:
    for prox, amsgrad in ((True, True), (False, False)):
        with simulated() as sim:
            check_adamw(sim, sim.ops, MIXES[mix], prox, amsgrad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares(dtype: str) -> None:
    with simulated() as sim:
        check_squares(sim, sim.ops, DTYPES[dtype])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_weigh(reduction: int, masked: bool) -> None:
    with simulated() as sim:
        check_weigh(sim, sim.ops, reduction, masked)


# --- faults put into the kernels

PLANTED: dict[
    str, tuple[str, str, str, str]
] = {  # which op; what is put in which place; what is said
    "no barrier": ("lists", r"bar\.sync\s+0;", "", "race in shared memory"),
    "no sums left": ("lists", r"st\.shared\.f64[^;]*;", "", "uninitialised read"),
    "a vector further": (
        "lists",
        r"(ld\.global\S*v4\.\w+\s[^;]*\[%rd\d+)\]",
        r"\1+16]",
        "out of bounds",
    ),
    "half a vector further": (
        "lists",
        r"(ld\.global\S*v4\.\w+\s[^;]*\[%rd\d+)\]",
        r"\1+8]",
        "misaligned",
    ),
    "no fence": ("rows", r"membar\.gl;", "", "race in global memory"),
    "a cluster that does not wait": (
        "rows",
        r"barrier\.cluster\.(arrive|wait);",
        "",
        "race in shared memory",
    ),
    "results that are left out": ("rows", r"st\.global\.f32[^;]*;", "", "AssertionError"),
}


def run_with(name: str, sim: CudaSimulation) -> None:
    what, pattern, by, _ = PLANTED[name]
    sim.edit = lambda text: re.sub(pattern, by, text)
    if what == "rows":
        check_kl(sim, sim.ops, Rows(9001, tokens=2))
    else:
        check_ewc(sim, sim.ops, MIXES["float32"])
    sim.check()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_seen(name: str) -> None:
    """A wrong result may come first: then the launches have said why."""
    says = PLANTED[name][-1]
    words = ""
    try:
        with simulated("90", CLUSTERS) as sim:
            run_with(name, sim)
    except AssertionError as error:
        words = f"AssertionError {error} {[report.faults for report in sim.reports]}"
    assert says in words


# --- bytes and instructions -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", pytest.param("float16", marks=full)])
@pytest.mark.parametrize("kind", KINDS)
def test_kl_moves_what_it_must(kind: str, dtype: str) -> None:
    """At most 1.05 of the declared bytes, also of rows off alignment, and so many instructions."""
    # a row pair on chip is swept twice there
    again = {"forward": True, "both": dtype == "float16"}
    for words in (measure.WORDS, measure.WORDS + 3):
        with simulated("90", SMALL) as sim:
            found = measure.kl(sim, sim.ops, kind, dtype, words)
        for op, (moved, _) in found.items():
            floor = budgets.kl_bytes(kind, op, DTYPES[dtype].itemsize, again.get(op, False))
            if op == "both" and dtype == "float16":  # which has no kernel of both
                floor += 2 * DTYPES[dtype].itemsize
            assert moved <= budgets.SLACK * floor, (op, words, moved, floor)
        if words == measure.WORDS:
            assert not budgets.over(f"CUDA {kind} {dtype}", measure.steps(found))


@pytest.mark.parametrize("mix", ["float32", "packed"])
def test_lists_move_what_they_must(mix: str) -> None:
    with simulated() as sim:
        found = measure.lists(sim, sim.ops, mix)
    for op, (moved, _) in found.items():
        assert moved <= budgets.SLACK * budgets.LIST_BYTES[mix][op], (op, moved)
    assert not budgets.over(f"CUDA lists {mix}", measure.steps(found))
