"""Bytes and instructions an entry of every op, by CUDA's kernels and by Triton's.

`python -m tests.gpu.ptx.measure` prints budgets.INSTRUCTIONS: a tenth more than they take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fasttax.kl.call import tempering
from tests.gpu.ptx import cuda, triton_driver
from tests.gpu.ptx.lists import MIXES, Lists
from tests.gpu.ptx.simulation import Simulation
from tests.tools.kl_cases import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Found = dict[str, tuple[float, float]]  # op -> bytes and instructions an entry
WORDS = 16384


def taken(sim: Simulation, calls: Mapping[str, Callable[[], object]], elements: int) -> Found:
    found = {}
    for op, call in calls.items():
        before = len(sim.reports)
        call()
        reports = sim.reports[before:]
        moved = sum(report.read + report.written for report in reports)
        instructions = 32 * sum(report.instructions for report in reports)
        found[op] = (moved / elements, instructions / elements)
    return found


def steps(found: Found) -> dict[str, float]:
    return {op: instructions for op, (_, instructions) in found.items()}


def kl(sim: Simulation, ops: Any, kind: str, dtype: str, words: int = WORDS) -> Found:
    """Every op on two rows of models that are 0.1 apart."""
    x = 2 * torch.randn(2, words)
    y = (x + 0.1 * torch.randn(2, words)).to(DTYPES[dtype])
    x = x.to(DTYPES[dtype])
    up = torch.ones(2)
    args = tempering("test", kind=kind).args()
    sim.give(x, y, up)
    saved = ops.token_kl(x, y, None, *args)[1]
    back = (up, x, y, None, saved, *args)
    calls = {
        "forward": lambda: ops.token_kl(x, y, None, *args),
        "gradient": lambda: ops.token_kl_backward(*back, True, False),
        "gradients": lambda: ops.token_kl_backward(*back, True, True),
        "both": lambda: ops.token_kl_grad(up, x, y, None, *args, True, False),
    }
    return taken(sim, calls, 2 * words)


def lists(sim: Simulation, ops: Any, mix: str) -> Found:
    """Every op on two parameters."""
    x = Lists(MIXES[mix], (65536, 8192))
    lr = torch.tensor(0.01)
    sim.give(*x.anchors, *x.fishers, *x.scales, lr)
    sim.give(*x.params, *x.grads, *x.first, *x.second, *x.steps, readonly=False)
    adamw: tuple[Any, ...] = (
        x.params,
        x.grads,
        x.first,
        x.second,
        [],
        x.steps,
        *x.held,
        True,
        0.4,
        0.0,
        lr,
    )
    sums = [torch.rand(t.shape) for t in x.grads]
    sim.give(*sums, readonly=False)
    calls = {
        "penalty": lambda: ops.ewc_penalty(x.params, *x.held, 1.0),
        "add_grad_": lambda: ops.ewc_add_grad_(x.params, x.grads, *x.held, 1.0, 1.0, None),
        "prox_": lambda: ops.ewc_prox_(x.params, *x.held, 1.0, None),
        "adamw_": lambda: ops.ewc_adamw_(*adamw, 0.9, 0.99, 1e-8, 0.0, False, None, None),
        "squares_": lambda: ops.accumulate_sqgrad_(sums, x.grads, 0.5),
    }
    return taken(sim, calls, x.elements())


def main() -> None:
    print("INSTRUCTIONS: dict[str, dict[str, float]] = {")

    def show(case: str, found: Found) -> None:
        budget = {op: math.ceil(1.1 * one) for op, one in steps(found).items()}
        print(f'    "{case}": {budget},'.replace("'", '"'), flush=True)

    for dtype in ("bfloat16", "float32", "float16"):
        for kind in KINDS:
            with cuda.simulated("90", cuda.SMALL) as sim:
                show(f"CUDA {kind} {dtype}", kl(sim, sim.ops, kind, dtype))
            if dtype != "float16":
                with triton_driver.simulated() as other:
                    show(f"Triton {kind} {dtype}", kl(other, triton_driver.OPS, kind, dtype))
    for mix in ("float32", "packed"):
        with cuda.simulated() as sim:
            show(f"CUDA lists {mix}", lists(sim, sim.ops, mix))
        with triton_driver.simulated() as other:
            show(f"Triton lists {mix}", lists(other, triton_driver.OPS, mix))
    print("}")


if __name__ == "__main__":
    main()
