"""What the kernels may take: bytes by their floor, PTX instructions an entry by a tenth more than
they take. All in one place, so that a change of a kernel is a change of lines here, which

    python -m tests.gpu.ptx.measure

prints anew.
"""

from __future__ import annotations

from collections.abc import Mapping

SLACK = 1.05  # of bytes
# how often an op's kernels read or write an entry of a row pair
KL_PASSES = {"forward": 2, "gradient": 3, "gradients": 4, "both": 3}
TWO_SWEEPS = ("jsd", "renyi")  # whose second sweep needs what the first has summed
# bytes an element
LIST_BYTES: dict[str, dict[str, float]] = {
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
INSTRUCTIONS: dict[str, dict[str, float]] = {
    "CUDA policy_ref bfloat16": {"forward": 47, "gradient": 26, "gradients": 54, "both": 71},
    "Triton policy_ref bfloat16": {"forward": 48, "gradient": 25, "gradients": 49, "both": 68},
    "CUDA ref_policy bfloat16": {"forward": 50, "gradient": 44, "gradients": 53, "both": 92},
    "Triton ref_policy bfloat16": {"forward": 51, "gradient": 40, "gradients": 49, "both": 86},
    "CUDA jsd bfloat16": {"forward": 70, "gradient": 34, "gradients": 44, "both": 100},
    "Triton jsd bfloat16": {"forward": 180, "gradient": 85, "gradients": 103, "both": 257},
    "CUDA renyi bfloat16": {"forward": 191, "gradient": 139, "gradients": 142, "both": 324},
    "Triton renyi bfloat16": {"forward": 147, "gradient": 92, "gradients": 107, "both": 229},
    "CUDA policy_ref float32": {"forward": 50, "gradient": 29, "gradients": 57, "both": 81},
    "Triton policy_ref float32": {"forward": 51, "gradient": 25, "gradients": 50, "both": 70},
    "CUDA ref_policy float32": {"forward": 54, "gradient": 46, "gradients": 56, "both": 102},
    "Triton ref_policy float32": {"forward": 54, "gradient": 41, "gradients": 50, "both": 90},
    "CUDA jsd float32": {"forward": 75, "gradient": 36, "gradients": 49, "both": 114},
    "Triton jsd float32": {"forward": 187, "gradient": 92, "gradients": 113, "both": 264},
    "CUDA renyi float32": {"forward": 208, "gradient": 145, "gradients": 152, "both": 339},
    "Triton renyi float32": {"forward": 155, "gradient": 105, "gradients": 114, "both": 238},
    "CUDA policy_ref float16": {"forward": 48, "gradient": 27, "gradients": 55, "both": 75},
    "CUDA ref_policy float16": {"forward": 51, "gradient": 45, "gradients": 54, "both": 96},
    "CUDA jsd float16": {"forward": 71, "gradient": 35, "gradients": 45, "both": 106},
    "CUDA renyi float16": {"forward": 193, "gradient": 140, "gradients": 144, "both": 332},
    "CUDA lists float32": {
        "penalty": 13,
        "add_grad_": 19,
        "prox_": 22,
        "adamw_": 84,
        "squares_": 11,
    },
    "Triton lists float32": {
        "penalty": 12,
        "add_grad_": 16,
        "prox_": 20,
        "adamw_": 49,
        "squares_": 7,
    },
    "CUDA lists packed": {
        "penalty": 37,
        "add_grad_": 47,
        "prox_": 46,
        "adamw_": 126,
        "squares_": 15,
    },
    "Triton lists packed": {
        "penalty": 31,
        "add_grad_": 36,
        "prox_": 40,
        "adamw_": 72,
        "squares_": 9,
    },
}
# registers of a thread, by kernel, on the architecture that takes most: 2 blocks of 256 on an SM
# or more; sm_90 takes 56 for EWC and 32 for the small ones
REGISTERS = {
    "kl_forward_kernel": 128,
    "kl_second_kernel": 128,
    "kl_resident_kernel": 128,
    "kl_two_sweeps_kernel": 128,
    "kl_gradient_kernel": 80,
    "kl_gradient_kernel float32": 128,  # of both rows: two blocks on an SM, else three
    "ewc_kernel": 64,
    "ewc_finish": 40,
    "adamw_kernel": 80,
    "adamw_finish": 40,
    "square_kernel": 40,
    "scale_held_kernel": 48,
    "weigh_weights_kernel": 40,
    "weigh_backward_kernel": 40,
    "weigh_tokens_kernel": 32,
    "weigh_sum_kernel": 64,
}
# KB that an SM must have under way: 40 are 90 % of an H100's bandwidth. A row of one model alone is
# half of a pair.
KB_UNDER_WAY = {
    "kl_forward_kernel": 40,
    "kl_resident_kernel": 40,
    "kl_two_sweeps_kernel": 40,
    "kl_gradient_kernel": 40,
    "ewc_kernel": 40,
    "adamw_kernel": 40,
    "square_kernel": 40,
    "scale_held_kernel": 40,
}


def kl_bytes(kind: str, op: str, item: int, again: bool) -> float:
    """Of an entry of a row pair. `again`: a divergence of two sweeps reads both rows twice; so does
    every op that has a forward and a gradient in the place of one kernel of both.
    """
    passes = KL_PASSES[op]
    if kind in TWO_SWEEPS and again and op in ("forward", "both"):
        passes += 2
    return passes * item


def over(case: str, found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The ops that take more instructions an entry than their budget, and it."""
    budget = INSTRUCTIONS.get(case, {})
    return {
        op: (round(steps, 1), budget.get(op, 0.0))
        for op, steps in found.items()
        if steps > budget.get(op, 0.0)
    }
