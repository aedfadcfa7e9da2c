"""token_kl's and token_stats' ops on the machine, CUDA's kernels or Triton's, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax.kl.call import tempering
from tests.gpu.ptx.simulation import Simulation
from tests.tools.kl_cases import INF, NAN, run_oracle
from tests.tools.utils import assert_within, own_result

STATS = 6  # values of a token


@dataclass(frozen=True)
class Rows:
    """Logits of two models.

    Attributes:
        words: the vocabulary.
        dtype: of both.
        tokens: rows.
        stride: entries from a row to the next one beyond `words`.
        shift: entries that the first row is off the allocator's alignment.
        size, apart: of the logits, and of what the models differ by.
        masked: whether one token counts nothing; its logits are NaN.
        ruled_out: whether entries are -inf, of either model.
        options: of the op.
    """

    words: int
    dtype: torch.dtype = torch.float32
    tokens: int = 3
    stride: int = 0
    shift: int = 0
    size: float = 2.0
    apart: float = 0.3
    masked: bool = False
    ruled_out: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def made(self) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.size * torch.randn(self.tokens, self.words)
        y = x + self.apart * torch.randn(self.tokens, self.words)
        if self.ruled_out:
            x[:, ::7], y[:, 3::5] = -INF, -INF
        mask = None
        if self.masked:
            mask = torch.arange(self.tokens) != 1
            x[1], y[1] = NAN, INF
        return self.strided(x), self.strided(y), mask

    def strided(self, t: Tensor) -> Tensor:
        step = self.words + self.stride
        room = torch.full((self.shift + self.tokens * step,), NAN, dtype=self.dtype)
        rows = room[self.shift :].view(self.tokens, step)[:, : self.words]
        rows.copy_(t)
        return rows


def give_rows(
    sim: Simulation, name: str, t: Tensor, readonly: bool = True, torn: bool = False
) -> None:
    """Each row where others do not follow at once: what is between them is out of bounds."""
    if t.dim() > 1 and t.stride(0) > t.shape[-1]:
        for k, row in enumerate(t):
            sim.memory.add(row, f"row {k} of {name}", readonly=readonly, torn=torn)
    else:
        sim.memory.add(t, name, readonly=readonly, torn=torn)


def live(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t[mask]


def check_kl(sim: Simulation, ops: Any, rows: Rows) -> None:
    """Every op of token_kl over these rows."""
    x, y, mask = rows.made()
    upstream = torch.linspace(-1.5, 2.0, rows.tokens)
    args = tempering("test", **rows.options).args()
    give_rows(sim, "logits", x)
    give_rows(sim, "ref_logits", y)
    sim.give(upstream, mask)
    kl, saved = ops.token_kl(x, y, mask, *args)
    dx, dy = ops.token_kl_backward(upstream, x, y, mask, saved, *args, True, True)
    _, only = ops.token_kl_backward(upstream, x, y, mask, saved, *args, False, True)
    fused, d_fused, _ = ops.token_kl_grad(upstream, x, y, mask, *args, True, False)
    in_place(sim, ops, rows, (upstream, x, y, mask, saved, *args), dx)
    for got in (kl, dx, dy, d_fused):
        assert sim.memory.unwritten(got) == 0
    close(only, dy)
    close(fused, kl)
    close(dx, d_fused)
    if mask is not None:
        for got in (kl, dx, dy):
            assert not got[~mask].any()
    a, b = (live(t, mask).contiguous() for t in (x, y))
    up = live(upstream, mask)
    truth = run_oracle(a, b, up, torch.float64, **rows.options)
    own = run_oracle(a, b, up, torch.float32, **rows.options)
    judge(rows, [live(t, mask) for t in (kl, dx, dy)], own, truth)


def in_place(sim: Simulation, ops: Any, rows: Rows, call: Any, want: Tensor) -> None:
    """token_kl_backward_, whatever the order of the threads is: off alignment vectors reach into
    entries that others write.
    """
    upstream, x, *rest = call
    aligned = all(row.data_ptr() % 16 == 0 for row in x)
    for sim.seed in (1,) if aligned else (1, 2, 3):
        place = rows.strided(x)
        give_rows(sim, "logits in place", place, readonly=False, torn=not aligned)
        ops.token_kl_backward_(upstream, place, *rest, False)
        close(place, want)


def close(got: Tensor, want: Tensor) -> None:
    """A roundings' difference, of two kernels."""
    size = float(want.double().abs().nan_to_num(0, 0, 0).max())
    eps = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=8 * eps * size, equal_nan=True)


def judge(rows: Rows, got: Any, own: Any, truth: Any) -> None:
    size = max(1.0, rows.size * 4) * rows.options.get("logit_scale", 1.0)
    magnitude = size / min(1.0, rows.options.get("temperature", 1.0))
    for o, w, t in zip(got, own, truth, strict=True):
        assert_within(o, own_result(w, t, o.dtype), t, ulps=4 * min(magnitude, 64.0))


def check_stats(sim: Simulation, ops: Any, rows: Rows, pair: bool) -> None:
    """token_stats and its backward over these rows, with a reference or without."""
    x, y, mask = rows.made()
    ids = torch.randint(rows.words, (rows.tokens,))
    grads = torch.randn(STATS, rows.tokens)
    args = tempering("test", **rows.options).sides()
    ref = y if pair else None
    give_rows(sim, "logits", x)
    give_rows(sim, "ref_logits", y)
    sim.give(ids, mask, grads)
    values, saved = ops.token_stats(x, ref, ids, mask, *args)
    dx, dy = ops.token_stats_backward(grads, x, ref, ids, mask, saved, *args, True, pair)
    assert sim.memory.unwritten(values) == 0
    assert sim.memory.unwritten(dx) == 0

    def sides(dtype: torch.dtype) -> list[Tensor]:
        a, b = (live(t, mask).to(dtype).requires_grad_() for t in (x, y))
        given = b if pair else None
        out, _ = reference.token_stats(a, given, live(ids, mask), None, *args)
        leaves = (a, b) if pair else (a,)
        up = grads if mask is None else grads[:, mask]
        return [out.detach(), *torch.autograd.grad(out, leaves, up.to(dtype))]

    kept = values if mask is None else values[:, mask]
    got = [kept, live(dx, mask), *([live(dy, mask)] if pair else [])]
    own, truth = sides(torch.float32), sides(torch.float64)
    judge(rows, [*kept, *got[1:]], [*own[0], *own[1:]], [*truth[0], *truth[1:]])
