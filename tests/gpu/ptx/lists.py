"""Ops over lists of tensors on the machine (EWC, AdamW, the Fisher's squares) and those of tokens'
results, by CUDA's kernels or Triton's, against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base.packed import SPLIT, decode_anchor, encode, encode_anchor
from fasttax.reference.weigh import K1, K2, K3
from fasttax.reference.weigh import weigh_tokens as reference_weigh
from tests.gpu.ptx.simulation import Simulation

SIZES = (0, 1, 257, 1023, 4096, 2051, 7)
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


class Mix(NamedTuple):
    theta: torch.dtype
    grad: torch.dtype
    anchor: torch.dtype | str
    storage: str  # of the Fisher


MIXES = {
    "float32": Mix(FLOAT, FLOAT, FLOAT, "fp32"),
    "bfloat16": Mix(BFLOAT, BFLOAT, BFLOAT, "bf16"),
    "packed": Mix(FLOAT, BFLOAT, SPLIT, "u8log"),
    "half": Mix(HALF, HALF, FLOAT, "bf16"),
}


class Lists:
    """Parameters and what EWC and AdamW hold of them; every third starts off 16 bytes."""

    def __init__(self, mix: Mix, sizes: Sequence[int] = SIZES) -> None:
        stored = [encode(torch.randn(n).exp(), mix.storage) for n in sizes]
        self.params = self.shifted([torch.randn(n).to(mix.theta) for n in sizes])
        self.grads = self.shifted([torch.randn(n).to(mix.grad) for n in sizes])
        self.anchors = [encode_anchor(torch.randn(n), mix.anchor) for n in sizes]
        self.fishers = [s.values for s in stored]
        self.scales = [s.scales for s in stored if s.scales is not None]
        self.first = [torch.randn(n).to(mix.theta) for n in sizes]
        self.second = [torch.rand(n).add(0.1).to(mix.theta) for n in sizes]
        self.steps = [torch.tensor(float(k)) for k in range(len(sizes))]
        self.wide_anchors = [
            decode_anchor(a, p.shape).double()
            for a, p in zip(self.anchors, self.params, strict=True)
        ]
        self.wide_fishers = [s.decode().double() for s in stored]

    @staticmethod
    def shifted(tensors: list[Tensor]) -> list[Tensor]:
        return [
            torch.cat((t[:1], t))[1:] if k % 3 == 2 and t.numel() else t
            for k, t in enumerate(tensors)
        ]

    @property
    def held(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.anchors, self.fishers, self.scales

    @property
    def wide(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.wide_anchors, self.wide_fishers, []

    def elements(self) -> int:
        return sum(p.numel() for p in self.params)


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def close(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        eps = torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.double(), w.double(), rtol=2 * eps + 2e-5, atol=2e-5)


def check_ewc(sim: Simulation, ops: Any, mix: Mix) -> None:
    """The penalty, its backward, add_grad_ and prox_."""
    x = Lists(mix)
    wide = doubles(x.params)
    sim.give(*x.params, *x.anchors, *x.fishers, *x.scales)
    got = ops.ewc_penalty(x.params, *x.held, 3.0)
    close([got], [reference.ewc_penalty(wide, *x.wide, 3.0)])
    upstream = torch.tensor(0.7)
    sim.give(upstream)
    d = ops.ewc_penalty_backward(upstream, x.params, *x.held, 3.0)
    close(d, reference.ewc_penalty_backward(upstream.double(), wide, *x.wide, 3.0))
    assert all(sim.memory.unwritten(t) == 0 for t in d if t.numel())
    sim.give(*x.grads, readonly=False)
    want = doubles(x.grads)
    value = ops.ewc_add_grad_(x.params, x.grads, *x.held, 0.5, 0.3, None)
    close([value], [reference.ewc_add_grad_(wide, want, *x.wide, 0.5, 0.3)])
    close(x.grads, want)
    sim.give(*x.params, readonly=False)
    ops.ewc_prox_(x.params, *x.held, 0.3, None)
    reference.ewc_prox_(wide, *x.wide, 0.3)
    close(x.params, wide)


def check_adamw(sim: Simulation, ops: Any, mix: Mix, prox: bool, amsgrad: bool = False) -> None:
    """One step, one parameter not held."""
    x = Lists(mix)
    rest = (prox, 0.4, 0.0)
    options = (0.9, 0.999, 1e-8, 0.01, True)
    lr, scale, fine = torch.tensor(0.01), torch.tensor(8.0), torch.tensor(0.0)
    x.anchors[3], x.wide_anchors[3] = torch.empty(0), torch.empty(0)
    most = [v.clone() for v in x.second] if amsgrad else []
    written = (x.params, x.first, x.second, most, x.steps)
    wide = [doubles(tensors) for tensors in written]
    by_reference: Any = reference.ewc_adamw_
    want = by_reference(
        wide[0],
        doubles(x.grads),
        *wide[1:],
        *x.wide,
        *rest,
        lr.double(),
        *options,
        scale.double(),
        fine.double(),
    )
    sim.give(*x.grads, *x.anchors, *x.fishers, *x.scales, lr, scale, fine)
    for tensors in written:
        sim.give(*tensors, readonly=False)
    got = ops.ewc_adamw_(
        x.params,
        x.grads,
        x.first,
        x.second,
        most,
        x.steps,
        *x.held,
        *rest,
        lr,
        *options,
        scale,
        fine,
    )
    close([got], [want])
    for mine, theirs in zip(written, wide, strict=True):
        close(mine, theirs)


def check_squares(sim: Simulation, ops: Any, dtype: torch.dtype) -> None:
    sums = Lists.shifted([torch.rand(n) for n in SIZES])
    grads = Lists.shifted([torch.randn(n).to(dtype) for n in SIZES])
    want = doubles(sums)
    reference.accumulate_sqgrad_(want, doubles(grads), 0.5)
    sim.give(*grads)
    sim.give(*sums, readonly=False)
    ops.accumulate_sqgrad_(sums, grads, 0.5)
    close(sums, want)


def check_weigh(sim: Simulation, ops: Any, reduction: int, masked: bool) -> None:
    """Estimates, weights and their backward, and a gradient that a forward has left."""
    values = [torch.randn(k, 70) - 3 for k in (1, 2, 1)]
    outputs, pair = (3, K3, K1, K2, 3, 0), (0, 1, 2)
    mask = torch.rand(70) > 0.3 if masked else None
    weight = torch.randn(70)
    numbers = (reduction, -0.3, 3.0, False)
    sim.give(*values, mask, weight)
    out = ops.weigh_tokens(values, outputs, pair, mask, weight, *numbers)
    leaves = [v.double().requires_grad_() for v in values]
    want = reference_weigh(leaves, outputs, pair, mask, weight.double(), *numbers)
    close(out, [w.detach() for w in want])
    grads = [torch.randn(w.shape) for w in want]
    sim.give(*grads)
    d = ops.weigh_tokens_backward(
        grads, list(range(len(grads))), values, outputs, pair, mask, weight, *numbers
    )
    close([d], [torch.cat(torch.autograd.grad(want, leaves, doubles(grads)))])
    by_token = ops.token_weights(values[0], mask, weight, reduction, -0.3)
    assert by_token.numel() == 70
    assert sim.memory.unwritten(by_token.contiguous()) == 0
    for dtype in (FLOAT, BFLOAT):
        held, factor = torch.randn(5, 301).to(dtype), torch.rand(5)
        scaled = held.double() * factor.double()[:, None]
        sim.give(factor)
        sim.give(held, readonly=False)
        ops.scale_held_(held, factor)
        close([held], [scaled])
