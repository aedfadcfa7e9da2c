"""Rows of `token_kl` and `token_stats` from hidden states and heads.

Logits exist for a chunk of tokens (and of columns) at a time.

A chunk's logits lie in one buffer; their gradient is written over them, and goes into the gradients
of hidden states and head by GEMMs into buffers of their own, so that nothing of a chunk's size is
allocated twice. A fresh page costs more than the KL's arithmetic on it: the reference's logits are
made for half of a chunk's tokens at a time, where the head is not shared. Not on huge pages: where
a virtual machine has given its free ones back to the host, 176 MB of them took 0.4 to 0.9 s, small
ones 0.09 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax._base.gemm import gemm, mixed_gemm, narrow_gemm, pieces, project
from fasttax.kl.token_kl import Tempering

# the first six as token_stats gives them
ROWS = (
    "logp",
    "ref_logp",
    "entropy",
    "lse",
    "kl_policy_ref",
    "kl_ref_policy",
    "kl",
    "ref_lse",
)
LSE, KL, REF_LSE = 3, 6, 7
# of logits at a time: 208 tokens of SmolLM2's vocabulary and 104 of the reference's
CPU_BYTES = 60 << 20
# 1,168 tokens of Qwen's; a GPU's GEMM wants a thousand, and its caching allocator keeps the buffer
GPU_BYTES = 1 << 30
MIN_TOKENS = 128  # below it a GEMM no longer runs at its rate
# tokens, of the reference; 512 of them took 1.04 of their GEMMs' time by 176 and 88, 1.05 by 128
# and 128, 1.09 by 256 and 56
MIN_PART = 56


@dataclass(frozen=True)
class Work:
    """What is asked of a chunk: `kl` by token_kl, which takes whole rows.

    `stats` by token_stats of the policy's, or with `pair` of both rows, and then the reference's
    lse too: all that `merge_parts` wants of a tile of the vocabulary.
    """

    kl: bool
    stats: bool
    pair: bool
    token_chunk: int | None
    vocab_chunk: int | None

    def columns(self, V: int) -> int:
        return V if self.kl or self.vocab_chunk is None else min(self.vocab_chunk, V)

    def args(self) -> tuple[Any, ...]:
        return self.kl, self.stats, self.pair, self.token_chunk, self.vocab_chunk

    def tokens(self, N: int, V: int, shared: bool, like: Tensor) -> tuple[int, int]:
        """Of a chunk, and of the part of it whose reference logits (or whose gradient beside the
        logits) exist at a time.
        """
        two = self.kl or self.pair
        columns, rows_a_token = self.columns(V), 2.0 if two and shared else 1.5 if two else 1.0
        if self.token_chunk is not None:
            tokens = self.token_chunk
        else:
            budget = CPU_BYTES if like.device.type == "cpu" else GPU_BYTES
            most = max(
                MIN_TOKENS, int(budget / (like.element_size() * columns * rows_a_token)) // 16 * 16
            )
            even = -(-N // max(1, -(-N // most)))  # chunks of one size
            tokens = max(1, -(-even // 16) * 16)
        if (
            self.kl and self.vocab_chunk is not None and self.vocab_chunk < V
        ):  # whole rows, of so many tokens fewer
            tokens = max(1, tokens * self.vocab_chunk // V)
        part = tokens if two and shared else -(-tokens // 16) * 8 if two else 0
        return tokens, min(tokens, max(MIN_PART, part))


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What logits and gradients are summed in: float32, or float64 where any tensor has it."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


class Head:
    """One model's hidden states and head.

    Logits of a chunk, and the gradients, added up chunk by chunk.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        dtype: torch.dtype,
    ) -> None:
        wide, halves = (
            dtype == torch.float32,
            hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16),
        )
        mixed, self.narrow = (
            wide and mixed_gemm(weight.device),
            wide and halves and narrow_gemm(weight.device),
        )
        self.given = (hidden, weight, bias)
        self.hidden, self.weight = (
            (hidden, weight) if mixed or self.narrow else (hidden.to(dtype), weight.to(dtype))
        )
        self.bias = None if bias is None else bias.to(dtype)
        empty = torch.empty if hidden.shape[0] else torch.zeros
        self.d_hidden = empty(hidden.shape, dtype=dtype, device=hidden.device) if needs[0] else None
        self.d_weight = empty(weight.shape, dtype=dtype, device=hidden.device) if needs[1] else None
        self.d_bias = (
            torch.zeros(weight.shape[0], dtype=dtype, device=hidden.device) if needs[2] else None
        )
        self.trains = any(needs)

    def project(self, hidden: Tensor, columns: slice, buffer: Tensor) -> Tensor:
        weight = self.weight[columns]
        logits = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
        return project(hidden, weight, None if self.bias is None else self.bias[columns], logits)

    def add(self, tokens: slice, columns: slice, d_logits: Tensor) -> None:
        """The chunk's part of every gradient; the first of a sum writes it."""
        d = d_logits.to(self.weight.dtype) if self.narrow else d_logits
        if self.d_hidden is not None:
            gemm(d, self.weight[columns], self.d_hidden[tokens], add=columns.start > 0)
        if self.d_weight is not None:
            gemm(d.T, self.hidden[tokens], self.d_weight[columns], add=tokens.start > 0)
        if self.d_bias is not None:
            self.d_bias[columns] += d_logits.sum(0)

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight, bias, in their dtypes."""
        wide = (self.d_hidden, self.d_weight, self.d_bias)
        return [
            None if d is None or t is None else d.to(t.dtype)
            for d, t in zip(wide, self.given, strict=True)
        ]


class Sweep:
    """All chunks of a call in turn.

    `run` without `d_rows` fills `rows` and what a backward wants of them (`kept`); with `d_rows`
    and those of an earlier run it adds up the gradients of sum(d_rows * rows); with `d_rows` on a
    fresh sweep it does both at once.

    On a CPU masked tokens are left out of the GEMMs; a GPU's host would have to wait to learn how
    many there are.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        ids: Tensor | None,
        mask: Tensor | None,
        t: Tempering,
        work: Work,
        needs: Sequence[bool] = (False,) * 6,
    ) -> None:
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias = tensors
        assert hidden is not None
        assert weight is not None
        self.t, self.work, self.dtype, self.given_N = t, work, wide_dtype(*tensors), hidden.shape[0]
        self.live = None if mask is None or mask.device.type != "cpu" else mask.nonzero()[:, 0]
        self.mask = mask if self.live is None else None
        self.ids = None if ids is None else self._take(ids, 0)
        hidden, ref_hidden = (
            self._take(hidden, 0),
            None if ref_hidden is None else self._take(ref_hidden, 0),
        )
        self.policy = Head(hidden, weight, bias, (needs[0], needs[1], needs[4]), self.dtype)
        self.ref = None
        if ref_hidden is not None and ref_weight is not None:
            self.ref = Head(
                ref_hidden, ref_weight, ref_bias, (needs[2], needs[3], needs[5]), self.dtype
            )
        self.N, self.V = hidden.shape[0], weight.shape[0]
        self.shared = same(weight, ref_weight) and same(bias, ref_bias)
        self.columns = work.columns(self.V)
        self.rows = hidden.new_zeros(
            (len(ROWS), -(-self.V // self.columns), self.N), dtype=self.dtype
        )
        self.kept = empty_kept(self.rows, work)

    def _take(self, t: Tensor, dim: int) -> Tensor:
        return t if self.live is None else t.index_select(dim, self.live)

    def _spread(self, t: Tensor, dim: int) -> Tensor:
        if self.live is None or not t.dim() > dim:
            return t
        shape = (*t.shape[:dim], self.given_N, *t.shape[dim + 1 :])
        return t.new_zeros(shape).index_copy_(dim, self.live, t)

    def results(self) -> tuple[Tensor, ...]:
        """(rows, what a backward wants of them), of every token."""
        return self._spread(self.rows, 2), *(self._spread(kept, 1) for kept in self.kept)

    def resume(self, kept: Sequence[Tensor]) -> Sweep:
        """With what an earlier sweep kept."""
        self.kept = [k if k.dim() == 1 else self._take(k, 1) for k in kept]
        return self

    def run(self, d_rows: Tensor | None, fresh: bool = True) -> None:
        d_rows = None if d_rows is None else self._take(d_rows, 2)
        step, part = self.work.tokens(self.N, self.V, self.shared, self.rows)
        step, part = min(step, self.N), min(part, self.N)
        both = self.ref is not None and self.shared
        buffer = self.rows.new_empty((2 if both else 1) * step * self.columns)
        ref_buffer = self.rows.new_empty(
            part * self.columns if self.ref is not None and not both else 0
        )
        for tokens in pieces(0, self.N, max(1, step)):
            for tile, columns in enumerate(pieces(0, self.V, self.columns)):
                x, ys = self._logits(tokens, columns, buffer)
                for part_tokens in pieces(tokens.start, tokens.stop, part):
                    inside = slice(
                        part_tokens.start - tokens.start, part_tokens.stop - tokens.start
                    )
                    y = (
                        ys[inside]
                        if ys is not None
                        else None
                        if self.ref is None
                        else self.ref.project(self.ref.hidden[part_tokens], columns, ref_buffer)
                    )
                    chunk = _Chunk(self, tile, columns, part_tokens, x[inside], y)
                    if fresh:
                        chunk.forward()
                    if d_rows is not None:
                        d_y = chunk.backward(d_rows[:, tile, part_tokens])
                        if self.ref is not None and d_y is not None:
                            self.ref.add(part_tokens, columns, d_y)
                if d_rows is not None and self.policy.trains:
                    self.policy.add(tokens, columns, x)

    def _logits(
        self, tokens: slice, columns: slice, buffer: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Of the policy, and where one GEMM over a shared head gives both, of the reference."""
        hidden = self.policy.hidden[tokens]
        if self.ref is None or not self.shared:
            return self.policy.project(hidden, columns, buffer), None
        x, y = self.policy.project(
            torch.cat((hidden, self.ref.hidden[tokens])), columns, buffer
        ).chunk(2)
        return x, y

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight, ref_hidden, ref_weight, bias, ref_bias."""
        d_hidden, d_weight, d_bias = self.policy.gradients()
        d_ref_hidden, d_ref_weight, d_ref_bias = (
            (None, None, None) if self.ref is None else self.ref.gradients()
        )
        d_hidden, d_ref_hidden = (
            d if d is None else self._spread(d, 0) for d in (d_hidden, d_ref_hidden)
        )
        return [d_hidden, d_weight, d_ref_hidden, d_ref_weight, d_bias, d_ref_bias]


class _Chunk:
    """A part's logits, and the ops over them."""

    def __init__(
        self, sweep: Sweep, tile: int, columns: slice, tokens: slice, x: Tensor, y: Tensor | None
    ) -> None:
        self.sweep, self.tile, self.tokens, self.x, self.y = sweep, tile, tokens, x, y
        self.mask = None if sweep.mask is None else sweep.mask[tokens]
        self.ids = None
        if (
            sweep.ids is not None
        ):  # where the id is another tile's, merge_parts takes nothing from here
            ids = sweep.ids[tokens] - columns.start
            self.ids = (
                ids if sweep.columns == sweep.V else ids.where((ids >= 0) & (ids < x.shape[1]), 0)
            )
        scale, ref_scale, cap, ref_cap, inv_t, ref_inv_t = self.options = sweep.t.args()[2:8]
        self.of_policy, self.of_ref = (
            (scale, scale, cap, cap, inv_t, inv_t),
            (ref_scale, ref_scale, ref_cap, ref_cap, ref_inv_t, ref_inv_t),
        )

    def _kept(self, which: int) -> Tensor:
        return self.sweep.kept[which][self.tile, self.tokens]

    def forward(self) -> None:
        work, rows, ops = (
            self.sweep.work,
            self.sweep.rows[:, self.tile, self.tokens],
            torch.ops.fasttax,
        )
        if work.kl:
            rows[KL], self._kept(0)[:] = ops.token_kl(
                self.x, self.y, self.mask, *self.sweep.t.args()
            )
        if work.pair:
            rows[:6], self._kept(1)[:] = ops.token_stats(
                self.x, self.y, self.ids, self.mask, *self.options
            )
            of_ref, self._kept(2)[:] = ops.token_stats(self.y, None, None, self.mask, *self.of_ref)
            rows[REF_LSE] = of_ref[LSE]
            # as the reference's: equal rows, equal bits
            rows[LSE] = ops.token_stats(self.x, None, None, self.mask, *self.of_policy)[0][LSE]
        elif work.stats:
            rows[:6], self._kept(1)[:] = ops.token_stats(
                self.x, None, self.ids, self.mask, *self.of_policy
            )

    def backward(self, d_rows: Tensor) -> Tensor | None:
        """Writes the policy's gradient over its logits; returns the reference's where that trains."""
        sweep, ops = self.sweep, torch.ops.fasttax
        need_x, need_y = sweep.policy.trains, sweep.ref is not None and sweep.ref.trains
        d_x, d_y = None, None
        if sweep.work.stats:
            d, y = d_rows[:6].contiguous(), self.y if sweep.work.pair else None
            options = self.options if sweep.work.pair else self.of_policy
            d_x, d_y = ops.token_stats_backward(
                d,
                self.x,
                y,
                self.ids,
                self.mask,
                self._kept(1),
                *options,
                need_x,
                need_y and sweep.work.pair,
            )
        if sweep.work.pair and need_y:
            d = torch.zeros_like(d_rows[:6])
            d[LSE] = d_rows[REF_LSE]
            d_y += ops.token_stats_backward(
                d, self.y, None, None, self.mask, self._kept(2), *self.of_ref, True, False
            )[0]
        if sweep.work.kl:
            by_token = d_rows[KL].contiguous()
            d_y = ops.token_kl_backward_(
                by_token, self.x, self.y, self.mask, self._kept(0), *sweep.t.args(), need_y
            )
            if d_x is not None and need_x:
                self.x.add_(d_x)
        elif d_x is not None and need_x:
            self.x.copy_(d_x)
        return d_y if need_y else None


def empty_kept(rows: Tensor, work: Work) -> list[Tensor]:
    """What the ops keep of every tile and token for their backwards.

    token_kl 8 numbers, token_stats 11 of each call.
    """
    return [
        rows.new_empty((*rows.shape[1:], width) if used else (0,))
        for width, used in ((8, work.kl), (11, work.stats), (11, work.pair))
    ]
