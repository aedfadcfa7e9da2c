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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax._base.gemm import gemm, mixed_gemm, narrow_gemm, pieces, project
from fasttax._base.optional import given
from fasttax.kl.call import OPTIONS, Tempering
from fasttax.reference.numbers import wide_dtype
from fasttax.reference.rows import KL, LINEAR, LSE, REF_LSE, SAVED_KL, SAVED_STATS, STATS

# of logits at a time: 208 tokens of SmolLM2's vocabulary and 104 of the reference's
CPU_BYTES = 60 << 20
# 1,168 tokens of Qwen's; a GPU's GEMM wants a thousand, and its caching allocator keeps the buffer
GPU_BYTES = 1 << 30
MIN_TOKENS = 128  # below it a GEMM no longer runs at its rate
# tokens, of the reference; 512 of them took 1.04 of their GEMMs' time by 176 and 88, 1.05 by 128
# and 128, 1.09 by 256 and 56
MIN_REF_TOKENS = 56
STEP = 16  # chunks are multiples of so many tokens


def up(n: int, to: int) -> int:
    """`n` rounded up to a multiple of `to`."""
    return -(-n // to) * to


class ChunkSize(NamedTuple):
    """How many tokens' logits exist at a time."""

    policy_tokens: int
    ref_tokens: int  # a part of them: whose reference logits, or gradient beside the logits, exist


@dataclass(frozen=True)
class Asked:
    """What a sweep is to give of every token, and how much of the logits may exist at a time.

    `kl` is token_kl's, which takes whole rows. `stats` are token_stats' of the policy's rows, or
    with `pair` of both, and then the reference's lse too: all that `combine_parts` wants of a tile
    of the vocabulary.
    """

    kl: bool = False
    stats: bool = False
    pair: bool = False
    token_chunk: int | None = None
    vocab_chunk: int | None = None

    def columns(self, V: int) -> int:
        """Of the logits that exist at a time."""
        return V if self.kl else self._vocab_chunk(V)

    def tiles(self, V: int) -> int:
        """Into how many tiles of columns a vocabulary falls."""
        return -(-V // self.columns(V))

    def _vocab_chunk(self, V: int) -> int:
        return min(self.vocab_chunk or V, V)

    def chunk_size(self, N: int, V: int, shared: bool, like: Tensor) -> ChunkSize:
        """Of N tokens, with both models' logits `shared`: made by one GEMM over one head."""
        both = self.kl or self.pair
        rows_a_token = 1.0
        if both:
            rows_a_token = 2.0 if shared else 1.5
        policy_tokens = self.token_chunk or self._even_chunk(N, V, rows_a_token, like)
        if self.kl:  # whole rows, of so many tokens fewer
            policy_tokens = max(1, policy_tokens * self._vocab_chunk(V) // V)
        ref_tokens = MIN_REF_TOKENS
        if both:
            half = up(policy_tokens, STEP) // 2
            ref_tokens = policy_tokens if shared else max(MIN_REF_TOKENS, half)
        return ChunkSize(policy_tokens, min(policy_tokens, ref_tokens))

    def _even_chunk(self, N: int, V: int, rows_a_token: float, like: Tensor) -> int:
        """Tokens of chunks of one size, within the bytes that are allowed them."""
        budget = CPU_BYTES if like.device.type == "cpu" else GPU_BYTES
        within = int(budget / (like.element_size() * self.columns(V) * rows_a_token))
        most = max(MIN_TOKENS, within // STEP * STEP)
        chunks = max(1, -(-N // most))
        return max(1, up(-(-N // chunks), STEP))


class Tensors(NamedTuple):
    """Both models' hidden states, heads and biases, tokens flattened, in the ops' order."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    bias: Tensor | None = None
    ref_bias: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What logits and gradients are summed in: float32, or float64 where any tensor has it."""
        return wide_dtype(*self)


class Inputs(NamedTuple):
    """What the linear ops take; the order is known here alone."""

    tensors: Tensors
    ids: Tensor | None
    mask: Tensor | None
    t: Tempering
    asked: Asked

    def args(self) -> tuple[Any, ...]:
        """As SCHEMA has them."""
        a = self.asked
        asked = (a.kl, a.stats, a.pair, a.token_chunk, a.vocab_chunk)
        return (*self.tensors, self.ids, self.mask, *self.t.args(), *asked)

    @classmethod
    def of_args(cls, args: Sequence[Any]) -> Inputs:
        """The inverse of `args`."""
        tensors, (ids, mask), options, asked = args[:6], args[6:8], args[8:-5], args[-5:]
        return cls(Tensors(*tensors), ids, mask, Tempering.of_args(options), Asked(*asked))


SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? ref_hidden, Tensor? ref_weight, Tensor? bias, "
    f"Tensor? ref_bias, Tensor? ids, Tensor? mask, {OPTIONS}, "
    "bool kl, bool stats, bool pair, int? token_chunk, int? vocab_chunk"
)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are one memory read in one way."""
    if a is None or b is None:
        return a is b
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


class Projection:
    """One model's hidden states and head: a chunk's logits, and gradients added up by chunks."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        dtype: torch.dtype,
    ) -> None:
        halves = hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16)
        wide = dtype == torch.float32
        self.narrow = wide and halves and narrow_gemm(weight.device)
        self.given = (hidden, weight, bias)
        if self.narrow or (wide and mixed_gemm(weight.device)):
            self.hidden, self.weight = hidden, weight
        else:
            self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = given(bias, lambda bias: bias.to(dtype))
        self.trains = any(needs)
        # GEMMs write the first chunk's part over what is there; of no tokens there is none
        empty = torch.empty if hidden.shape[0] else torch.zeros
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        if needs[0]:
            self.d_hidden = empty(hidden.shape, dtype=dtype, device=hidden.device)
        if needs[1]:
            self.d_weight = empty(weight.shape, dtype=dtype, device=hidden.device)
        if needs[2]:
            self.d_bias = torch.zeros(weight.shape[0], dtype=dtype, device=hidden.device)

    def project(self, hidden: Tensor, columns: slice, buffer: Tensor) -> Tensor:
        """Logits of some hidden states at `columns`, in the buffer."""
        weight = self.weight[columns]
        bias = given(self.bias, lambda bias: bias[columns])
        tokens, width = hidden.shape[0], weight.shape[0]
        return project(hidden, weight, bias, buffer[: tokens * width].view(tokens, width))

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

    `run` without `d_rows` fills `rows` and what a backward wants of them (`saved`); with `d_rows`
    and those of an earlier run it adds up the gradients of sum(d_rows * rows); with `d_rows` on a
    fresh sweep it does both at once.

    On a CPU masked tokens are left out of the GEMMs; a GPU's host would have to wait to learn how
    many there are.
    """

    def __init__(self, inputs: Inputs, needs: Sequence[bool] = (False,) * 6) -> None:
        tensors, ids, mask, self.t, self.asked = inputs
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias = tensors
        dtype = tensors.dtype
        self.given_tokens = hidden.shape[0]
        self.live: Tensor | None = None
        if mask is not None and mask.device.type == "cpu":
            self.live, mask = mask.nonzero()[:, 0], None
        self.mask = mask
        self.ids = given(ids, lambda ids: self._take(ids, 0))
        hidden = self._take(hidden, 0)
        self.policy = Projection(hidden, weight, bias, (needs[0], needs[1], needs[4]), dtype)
        self.ref: Projection | None = None
        if ref_hidden is not None and ref_weight is not None:
            of_ref = (needs[2], needs[3], needs[5])
            self.ref = Projection(self._take(ref_hidden, 0), ref_weight, ref_bias, of_ref, dtype)
        self.N, self.V = hidden.shape[0], weight.shape[0]
        self.shared = same(weight, ref_weight) and same(bias, ref_bias)
        self.columns = self.asked.columns(self.V)
        shape = (len(LINEAR), self.asked.tiles(self.V), self.N)
        self.rows = hidden.new_zeros(shape, dtype=dtype)
        self.saved = empty_saved(self.rows, self.asked)

    def _take(self, t: Tensor, dim: int) -> Tensor:
        """The live tokens of `t`."""
        return t if self.live is None else t.index_select(dim, self.live)

    def _spread(self, t: Tensor, dim: int) -> Tensor:
        """The inverse of `_take`, 0 for the others; what has no such dimension stays as it is."""
        if self.live is None or t.dim() <= dim:
            return t
        shape = (*t.shape[:dim], self.given_tokens, *t.shape[dim + 1 :])
        return t.new_zeros(shape).index_copy_(dim, self.live, t)

    def results(self) -> tuple[Tensor, ...]:
        """(rows, what a backward wants of them), of every token."""
        return self._spread(self.rows, 2), *(self._spread(saved, 1) for saved in self.saved)

    def resume(self, saved: Sequence[Tensor]) -> Sweep:
        """With what an earlier sweep saved."""
        self.saved = [s if s.dim() == 1 else self._take(s, 1) for s in saved]
        return self

    def run(self, d_rows: Tensor | None, fresh: bool = True) -> None:
        """Goes over all chunks, forward where `fresh`, backward where there is a `d_rows`."""
        if d_rows is not None:
            d_rows = self._take(d_rows, 2)
        size = self.asked.chunk_size(self.N, self.V, self.shared, self.rows)
        step, ref_step = min(size.policy_tokens, self.N), min(size.ref_tokens, self.N)
        together = 2 if self.ref is not None and self.shared else 1
        apart = 0 if self.ref is None or self.shared else 1
        buffer = self.rows.new_empty(together * step * self.columns)
        ref_buffer = self.rows.new_empty(apart * ref_step * self.columns)
        for tokens in pieces(0, self.N, max(1, step)):
            for tile, columns in enumerate(pieces(0, self.V, self.columns)):
                x, y = self._logits(tokens, columns, buffer)
                for part in pieces(0, x.shape[0], ref_step):
                    at = slice(tokens.start + part.start, tokens.start + part.stop)
                    of_ref = self._ref_logits(y, part, at, columns, ref_buffer)
                    chunk = _Chunk(self, tile, columns, at, x[part], of_ref)
                    if fresh:
                        chunk.forward()
                    if d_rows is not None:
                        chunk.backward(d_rows[:, tile, at])
                if d_rows is not None and self.policy.trains:
                    self.policy.add(tokens, columns, x)

    def _logits(
        self, tokens: slice, columns: slice, buffer: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Of the policy, and where one GEMM over a shared head gives both, of the reference."""
        hidden = self.policy.hidden[tokens]
        if self.ref is None or not self.shared:
            return self.policy.project(hidden, columns, buffer), None
        both = torch.cat((hidden, self.ref.hidden[tokens]))
        x, y = self.policy.project(both, columns, buffer).chunk(2)
        return x, y

    def _ref_logits(
        self, y: Tensor | None, part: slice, at: slice, columns: slice, buffer: Tensor
    ) -> Tensor | None:
        """Of the reference's tokens `at`: the `part` of y, or made in the buffer."""
        if self.ref is None:
            return None
        if y is not None:
            return y[part]
        return self.ref.project(self.ref.hidden[at], columns, buffer)

    def gradients(self) -> list[Tensor | None]:
        """Of `Tensors`, None for those not needed."""
        d_hidden, d_weight, d_bias = self.policy.gradients()
        d_ref_hidden, d_ref_weight, d_ref_bias = None, None, None
        if self.ref is not None:
            d_ref_hidden, d_ref_weight, d_ref_bias = self.ref.gradients()
        d_hidden, d_ref_hidden = (
            given(d, lambda d: self._spread(d, 0)) for d in (d_hidden, d_ref_hidden)
        )
        return [d_hidden, d_weight, d_ref_hidden, d_ref_weight, d_bias, d_ref_bias]


class _Chunk:
    """The logits of some tokens at some columns, and the ops over them."""

    def __init__(
        self, sweep: Sweep, tile: int, columns: slice, tokens: slice, x: Tensor, y: Tensor | None
    ) -> None:
        self.sweep, self.asked, self.t = sweep, sweep.asked, sweep.t
        self.columns, self.tokens, self.x, self.y = columns, tokens, x, y
        self.rows = sweep.rows[:, tile, tokens]
        self.saved = [s if s.dim() == 1 else s[tile, tokens] for s in sweep.saved]
        self.mask = given(sweep.mask, lambda mask: mask[tokens])
        self.ids = None
        if sweep.ids is not None:
            self.ids = sweep.ids[tokens] - columns.start
        if self.ids is not None and sweep.columns < sweep.V:
            # where the id is another tile's, combine_parts takes nothing from here
            self.ids = self.ids.where((self.ids >= 0) & (self.ids < x.shape[1]), 0)

    def forward(self) -> None:
        """Fills the chunk's rows and what its backward wants of them."""
        t, ops, stats = self.t, torch.ops.fasttax, slice(0, len(STATS))
        kl_saved, saved, ref_saved = self.saved
        if self.asked.kl:
            self.rows[KL], kl_saved[:] = ops.token_kl(self.x, self.y, self.mask, *t.args())
        if self.asked.pair:
            self.rows[stats], saved[:] = ops.token_stats(
                self.x, self.y, self.ids, self.mask, *t.sides()
            )
            # each lse of one row alone: equal rows, equal bits
            of_ref, ref_saved[:] = self._alone(self.y, None, t.alone(t.ref))
            of_policy, _ = self._alone(self.x, None, t.alone(t.policy))
            self.rows[REF_LSE], self.rows[LSE] = of_ref[LSE], of_policy[LSE]
        elif self.asked.stats:
            self.rows[stats], saved[:] = self._alone(self.x, self.ids, t.alone(t.policy))

    def _alone(
        self, z: Tensor | None, ids: Tensor | None, sides: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        values, saved = torch.ops.fasttax.token_stats(z, None, ids, self.mask, *sides)
        return values, saved

    def backward(self, d_rows: Tensor) -> None:
        """Writes the policy's gradient over its logits, and adds the reference's up."""
        policy, ref = self.sweep.policy, self.sweep.ref
        needs = policy.trains, ref is not None and ref.trains
        d_x, d_y = self._stats_backward(d_rows, *needs)
        if self.asked.kl:
            by_token, saved = d_rows[KL].contiguous(), self.saved[0]
            d_y = torch.ops.fasttax.token_kl_backward_(
                by_token, self.x, self.y, self.mask, saved, *self.t.args(), needs[1]
            )
        if d_x is not None and policy.trains:
            if self.asked.kl:
                self.x.add_(d_x)
            else:
                self.x.copy_(d_x)
        if ref is not None and ref.trains and d_y is not None:
            ref.add(self.tokens, self.columns, d_y)

    def _stats_backward(
        self, d_rows: Tensor, need_x: bool, need_y: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of token_stats' rows by both logits, None where there are none."""
        if not self.asked.stats:
            return None, None
        backward, t, d = torch.ops.fasttax.token_stats_backward, self.t, d_rows[: len(STATS)]
        _, saved, ref_saved = self.saved
        y, sides = None, t.alone(t.policy)
        if self.asked.pair:
            y, sides = self.y, t.sides()
        need_y = need_y and self.asked.pair
        d_x, d_y = backward(
            d.contiguous(), self.x, y, self.ids, self.mask, saved, *sides, need_x, need_y
        )
        if need_y:
            of_ref = torch.zeros_like(d)
            of_ref[LSE] = d_rows[REF_LSE]
            d_y += backward(
                of_ref, self.y, None, None, self.mask, ref_saved, *t.alone(t.ref), True, False
            )[0]
        return d_x, d_y


def empty_saved(rows: Tensor, asked: Asked) -> list[Tensor]:
    """What the ops save of every tile and token for their backwards, or nothing.

    That is token_kl's, token_stats', and with `pair` token_stats' of the reference alone.
    """
    widths = ((SAVED_KL, asked.kl), (SAVED_STATS, asked.stats), (SAVED_STATS, asked.pair))
    return [rows.new_empty((*rows.shape[1:], width) if used else (0,)) for width, used in widths]
