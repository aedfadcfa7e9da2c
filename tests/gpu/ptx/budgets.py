"""What the kernels may take: bytes by their floor, instructions an entry by a tenth more than they
take. One place for both, so that a change of a kernel is a change of a line here:

    python -m tests.gpu.ptx.budgets      # runs the kernels and prints INSTRUCTIONS anew
"""

from __future__ import annotations

from collections.abc import Mapping

# how often an op's kernels read or write an entry of a row pair
KL_PASSES = {"forward": 2, "gradient": 3, "gradients": 4, "both": 3}
# bytes an element
LIST_BYTES = {
    "float32": {"penalty": 12, "add_grad_": 20, "prox_": 16, "adamw_": 36, "squares_": 12},
    # 4 of theta, 3 of the anchor, 1 + 8 / 256 of the Fisher; the gradient in bfloat16
    "packed": {
        "penalty": 8.03,
        "add_grad_": 12.03,
        "prox_": 12.03,
        "adamw_": 30.03,
        "squares_": 10,
    },
}
TWO_SWEEPS = ("jsd", "renyi")  # whose second sweep needs what the first has summed
INSTRUCTIONS: dict[str, dict[str, float]] = {}
measured: dict[str, dict[str, float]] = {}


def more_passes(kind: str, op: str, dtype: str) -> int:
    """Of a divergence of two sweeps; and of float16, which has no kernel of both."""
    again = 2 if kind in TWO_SWEEPS and op == "forward" else 0
    if op == "both" and dtype == "float16":
        again += 2 + (2 if kind in TWO_SWEEPS else 0)
    return again


def hold(case: str, found: Mapping[str, float]) -> None:
    """That no op takes more instructions an entry than its budget has."""
    measured[case] = dict(found)
    over = {op: (n, INSTRUCTIONS.get(case, {}).get(op)) for op, n in found.items()}
    over = {op: pair for op, pair in over.items() if pair[1] is None or pair[0] > pair[1]}
    assert not over, f"{case}: instructions an entry, and the budget: {over}"
