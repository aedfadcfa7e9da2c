"""Rows of `token_kl` and `token_stats` from hidden states and heads.

Logits exist for a chunk of tokens (and of columns) at a time.

A chunk's logits lie in one buffer; their gradient is written over them, and goes into the gradients
of hidden states and head by GEMMs into buffers of their own. On a CPU nothing of a chunk's size is
allocated twice, for a fresh page costs more than the KL's arithmetic on it: the reference's logits
are made for half of a chunk's tokens at a time, where the head is not shared. Not on huge pages:
where a virtual machine has given its free ones back to the host, 176 MB of them took 0.4 to 0.9 s,
small ones 0.09 s.

Operands of bfloat16 and float16, given so or rounded for autocast, are multiplied as they are where
the machine can; sums are float32. On NVIDIA GPUs logits are rounded to the operands' dtype as
torch's are, and their gradient is written over them in it: 10 bytes beside the GEMMs for a logit of
the policy and one of the reference. On CPUs logits stay float32. Where the CPU multiplies bfloat16
faster their gradient is rounded to it, into a buffer of its own in half the bytes: so the products
take many tokens at once, and each goes over the head's gradient, the logits few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax._base import waits
from fasttax._base.gemm import bf16_gemm, gemm, mixed_gemm, narrow_gemm, pieces, project
from fasttax._base.modes import HALVES
from fasttax._base.optional import given
from fasttax._base.workspace import Workspace
from fasttax.kl.call import OPTIONS, Tempering
from fasttax.kl.gradients import only_needed
from fasttax.kl.linear_chunks import Asked, ChunkSize, Layout, chunk_size
from fasttax.reference.numbers import wide_dtype
from fasttax.reference.rows import KL, LINEAR, LSE, REF_LSE, SAVED_KL, SAVED_STATS, STATS

WORKSPACE = Workspace()  # for the logits of a chunk and their gradients


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
        asked = (a.kl, a.stats, a.pair, a.token_chunk, a.vocab_chunk, a.gemm_dtype)
        return (*self.tensors, self.ids, self.mask, *self.t.args(), *asked)

    @classmethod
    def of_args(cls, args: Sequence[Any]) -> Inputs:
        """The inverse of `args`."""
        tensors, (ids, mask), options, asked = args[:6], args[6:8], args[8:-6], args[-6:]
        return cls(Tensors(*tensors), ids, mask, Tempering.of_args(options), Asked(*asked))


SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? ref_hidden, Tensor? ref_weight, Tensor? bias, "
    f"Tensor? ref_bias, Tensor? ids, Tensor? mask, {OPTIONS}, "
    "bool kl, bool stats, bool pair, int? token_chunk, int? vocab_chunk, "
    "ScalarType? gemm_dtype"
)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are one memory read in one way."""
    if a is None or b is None:
        return a is b
    storages = (t.untyped_storage()._cdata for t in (a, b))  # meta and fake tensors have one, too
    views = ((t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b))
    return len({*storages}) == len({*views}) == 1


class Projection:
    """One model's hidden states and head: a chunk's logits, and gradients added up by chunks.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        needs: whether they need a gradient.
        dtype: of the sums, float32 or float64.
        gemm_dtype: what float32 sums' operands are rounded to, or None.
        head: another's whose `weight` is this one, or None.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        dtype: torch.dtype,
        gemm_dtype: torch.dtype | None,
        head: Projection | None,
    ) -> None:
        self.given, self.gemm_dtype = (hidden, weight, bias), gemm_dtype
        wide = dtype == torch.float32
        operands = gemm_dtype if wide else None
        self.hidden, self.weight = hidden.to(operands or hidden.dtype), weight
        if head is not None:
            self.weight = head.weight
        elif operands is not None:
            self.weight = weight.to(operands)
        halves = self.hidden.dtype == self.weight.dtype and self.weight.dtype in HALVES
        self.narrow = wide and halves and narrow_gemm(weight.device)
        if not self.narrow and not (wide and mixed_gemm(weight.device)):
            self.hidden, self.weight = self.hidden.to(dtype), self.weight.to(dtype)
        self.bias = given(bias, lambda bias: bias.to(dtype))
        self.trains, self.needs, self.dtype = any(needs), needs, dtype
        self.d_dtype = dtype  # of the logits' gradient as it is multiplied
        bf16 = halves and self.weight.dtype == torch.bfloat16 and bf16_gemm(weight.device)
        if self.narrow or (wide and bf16):
            self.d_dtype = self.weight.dtype
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def begin(self, all_tokens: bool, all_columns: bool) -> None:
        """Makes room for the gradients, which GEMMs of half-width results may round once.

        Args:
            all_tokens: one `add` is to have them all.
            all_columns: the same.
        """
        hidden, weight, _ = self.given
        # GEMMs write the first part over what is there; of no tokens there is none
        empty = torch.empty if hidden.shape[0] else torch.zeros

        def buffer(like: Tensor, at_once: bool) -> Tensor:
            rounded = at_once and like.dtype == self.d_dtype == self.weight.dtype
            return empty(
                like.shape, dtype=like.dtype if rounded else self.dtype, device=like.device
            )

        if self.needs[0]:
            self.d_hidden = buffer(hidden, all_columns)
        if self.needs[1]:
            self.d_weight = buffer(weight, all_tokens)
        if self.needs[2]:
            self.d_bias = torch.zeros(weight.shape[0], dtype=self.dtype, device=hidden.device)

    def project(self, hidden: Tensor, columns: slice, buffer: Tensor) -> Tensor:
        """Logits of some hidden states at `columns`, in the buffer."""
        weight = self.weight[columns]
        bias = given(self.bias, lambda bias: bias[columns])
        tokens, width = hidden.shape[0], weight.shape[0]
        return project(hidden, weight, bias, buffer[: tokens * width].view(tokens, width))

    def add(self, tokens: slice, columns: slice, d_logits: Tensor) -> None:
        """The chunk's part of every gradient; the first of a sum writes it."""
        d = d_logits.to(self.d_dtype)
        if self.d_hidden is not None:
            gemm(d, self.weight[columns], self.d_hidden[tokens], add=columns.start > 0)
        if self.d_weight is not None:
            gemm(d.T, self.hidden[tokens], self.d_weight[columns], add=tokens.start > 0)
        if self.d_bias is not None:
            self.d_bias[columns] += d_logits.sum(0, dtype=self.dtype)

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
        if mask is not None and not waits.waits(mask):
            self.live, mask = mask.nonzero()[:, 0], None
        self.mask = mask
        self.ids = given(ids, lambda ids: self._take(ids, 0))
        hidden = self._take(hidden, 0)
        of_policy, of_ref = (needs[0], needs[1], needs[4]), (needs[2], needs[3], needs[5])
        dtypes = dtype, self.asked.gemm_dtype
        self.policy = Projection(hidden, weight, bias, of_policy, *dtypes, None)
        self.ref: Projection | None = None
        if ref_hidden is not None and ref_weight is not None:
            ref_hidden = self._take(ref_hidden, 0)
            head = self.policy if same(weight, ref_weight) else None
            self.ref = Projection(ref_hidden, ref_weight, ref_bias, of_ref, *dtypes, head)
        self.N, self.V = hidden.shape[0], weight.shape[0]
        self.shared = same(weight, ref_weight) and same(bias, ref_bias)
        self.columns = self.asked.columns(self.V)
        shape = (len(LINEAR), self.asked.tiles(self.V), self.N)
        self.rows = hidden.new_zeros(shape, dtype=dtype)
        self.saved = empty_saved(self.rows, self.asked)

    @property
    def logits_dtype(self) -> torch.dtype:
        """That of the operands where torch's GEMMs take both models' as they are."""
        models = [self.policy] if self.ref is None else [self.policy, self.ref]
        dtypes = {model.weight.dtype if model.narrow else self.rows.dtype for model in models}
        return dtypes.pop() if len(dtypes) == 1 else self.rows.dtype

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
        with self._room(d_rows is not None, fresh) as room:
            for tokens in pieces(0, self.N, room.size.tokens):
                for tile, columns in enumerate(pieces(0, self.V, self.columns)):
                    d = self._gradient(room, tile, columns, tokens, d_rows, fresh)
                    if d is not None and self.policy.trains:
                        self.policy.add(tokens, columns, d)

    @contextmanager
    def _room(self, gradients: bool, fresh: bool) -> Iterator[_Room]:
        """The buffers, and those of the gradients where they are to be made."""
        dtype, d_dtype = self.logits_dtype, None
        if gradients and self.policy.trains and self.policy.d_dtype != dtype:
            d_dtype = self.policy.d_dtype
        # half-width logits are so few bytes that one op may leave their gradient beside them
        at_once = gradients and fresh and dtype in HALVES
        trains = gradients and self.ref is not None and self.ref.trains
        beside = dtype if at_once and self.asked.kl else d_dtype
        layout = Layout(self.rows.device, dtype, self.shared, beside, trains)
        size = chunk_size(self.asked, layout, self.N, self.V).at_most(self.N)
        if gradients:
            all_columns = self.columns >= self.V
            self.policy.begin(size.tokens >= self.N, all_columns)
            if self.ref is not None:
                self.ref.begin(size.part_tokens >= self.N, all_columns)
        together = 2 if self.ref is not None and self.shared else 1
        apart = 0 if self.ref is None or self.shared else 1

        counts = (together * size.logits_tokens, apart * size.ref_tokens)
        wanted = [(count * self.columns, dtype) for count in counts]
        if d_dtype is not None:
            wanted.append((size.tokens * self.columns, d_dtype))
        with self._memory(wanted) as (logits, ref_logits, *gradient):
            d = gradient[0] if gradient else None
            yield _Room(size, logits, ref_logits, d, beside=at_once or d is not None)

    @contextmanager
    def _memory(self, wanted: Sequence[tuple[int, torch.dtype]]) -> Iterator[list[Tensor]]:
        if self.rows.device.type == "cpu":
            with WORKSPACE.lent(wanted) as memory:
                yield memory
        else:  # whose allocator keeps memory
            yield [self.rows.new_empty(count, dtype=dtype) for count, dtype in wanted]

    def _gradient(
        self,
        room: _Room,
        tile: int,
        columns: slice,
        tokens: slice,
        d_rows: Tensor | None,
        fresh: bool,
    ) -> Tensor | None:
        """What `run` does with some tokens: with a d_rows, the gradient of their logits."""
        width, size, d = columns.stop - columns.start, room.size, None
        if room.gradient is not None:
            count = tokens.stop - tokens.start
            d = room.gradient[: count * width].view(count, width)
        whole: Tensor | None = None
        for some in pieces(tokens.start, tokens.stop, size.logits_tokens):
            x, y = self._logits(some, columns, room)
            for part in pieces(0, x.shape[0], size.part_tokens):
                at = slice(some.start + part.start, some.start + part.stop)
                of_ref = self._ref_logits(y, part, at, columns, room)
                chunk = _Chunk(self, tile, columns, at, x[part], of_ref)
                if d_rows is None:
                    chunk.forward()
                    continue
                d_x = chunk.gradient(d_rows[:, tile, at], fresh, room.beside)
                if d is not None and d_x is not None:
                    d[at.start - tokens.start : at.stop - tokens.start] = d_x
                elif d_x is not None:
                    whole = d_x if at == tokens else _put(x, part, d_x)
        return whole if d is None else d

    def _logits(self, tokens: slice, columns: slice, room: _Room) -> tuple[Tensor, Tensor | None]:
        """Of the policy, and where there is room for all of them, of the reference."""
        hidden = self.policy.hidden[tokens]
        if self.ref is not None and self.shared:  # one GEMM over one head gives both
            both = torch.cat((hidden, self.ref.hidden[tokens]))
            x, y = self.policy.project(both, columns, room.logits).chunk(2)
            return x, y
        x = self.policy.project(hidden, columns, room.logits)
        if self.ref is None or room.size.ref_tokens < room.size.logits_tokens:
            return x, None
        return x, self.ref.project(self.ref.hidden[tokens], columns, room.ref_logits)

    def _ref_logits(
        self, y: Tensor | None, part: slice, at: slice, columns: slice, room: _Room
    ) -> Tensor | None:
        """Of the reference's tokens `at`: the `part` of y, or made anew."""
        if self.ref is None:
            return None
        if y is not None:
            return y[part]
        return self.ref.project(self.ref.hidden[at], columns, room.ref_logits)

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


class _Room(NamedTuple):
    """The buffers of a sweep, each flat, as long as its most tokens take."""

    size: ChunkSize
    logits: Tensor
    ref_logits: Tensor
    gradient: Tensor | None  # of the policy's logits, in another dtype than theirs
    beside: bool  # a gradient need not be written over its logits


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
            self.ids = sweep.ids[tokens]
        if self.ids is not None and sweep.columns < sweep.V:
            self.ids = self.ids - columns.start
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

    def gradient(self, d_rows: Tensor, fresh: bool, beside: bool) -> Tensor | None:
        """The policy's logits' gradient, None where it has none; the reference's is added up.

        Args:
            d_rows: the gradient of the chunk's rows.
            fresh: the rows are yet to be filled.
            beside: the gradient need not be written over the logits; of token_stats' rows it never
                is.
        """
        if fresh and beside and self.asked.kl and not self.asked.stats:
            return self._at_once(d_rows)
        if fresh:
            self.forward()
        policy, ref = self.sweep.policy, self.sweep.ref
        needs = policy.trains, ref is not None and ref.trains
        d_x, d_y = self._stats_backward(d_rows, *needs)
        if self.asked.kl:
            by_token, saved = d_rows[KL].contiguous(), self.saved[0]
            d_y = torch.ops.fasttax.token_kl_backward_(
                by_token, self.x, self.y, self.mask, saved, *self.t.args(), needs[1]
            )
            d_x = self.x if d_x is None else self.x.add_(d_x)
        if ref is not None and ref.trains and d_y is not None:
            ref.add(self.tokens, self.columns, d_y)
        return d_x if policy.trains else None

    def _at_once(self, d_rows: Tensor) -> Tensor | None:
        """token_kl's rows and gradients by one op, which goes over each row once."""
        policy, ref = self.sweep.policy, self.sweep.ref
        by_token, needs_ref = d_rows[KL].contiguous(), ref is not None and ref.trains
        self.rows[KL], d_x, d_y = torch.ops.fasttax.token_kl_grad(
            by_token, self.x, self.y, self.mask, *self.t.args(), policy.trains, needs_ref
        )
        if ref is not None and ref.trains:
            ref.add(self.tokens, self.columns, d_y)
        return d_x if policy.trains else None

    def _stats_backward(
        self, d_rows: Tensor, need_x: bool, need_y: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of token_stats' rows by both logits, None where there are none."""
        need_y = need_y and self.asked.pair
        if not self.asked.stats or not (need_x or need_y):
            return None, None
        backward, t, d = torch.ops.fasttax.token_stats_backward, self.t, d_rows[: len(STATS)]
        _, saved, ref_saved = self.saved
        y, sides = None, t.alone(t.policy)
        if self.asked.pair:
            y, sides = self.y, t.sides()
        both = backward(
            d.contiguous(), self.x, y, self.ids, self.mask, saved, *sides, need_x, need_y
        )
        d_x, d_y = only_needed(both, (need_x, need_y))
        if d_y is not None:
            of_ref = torch.zeros_like(d)
            of_ref[LSE] = d_rows[REF_LSE]
            d_y += backward(
                of_ref, self.y, None, None, self.mask, ref_saved, *t.alone(t.ref), True, False
            )[0]
        return d_x, d_y


def _put(x: Tensor, part: slice, d_x: Tensor) -> Tensor:
    """`x` with a part's gradient in the place of its logits, where it may be already."""
    if d_x.data_ptr() != x[part].data_ptr():
        x[part] = d_x
    return x


def empty_saved(rows: Tensor, asked: Asked) -> list[Tensor]:
    """What the ops save of every tile and token for their backwards, or nothing.

    That is token_kl's, token_stats', and with `pair` token_stats' of the reference alone.
    """
    widths = ((SAVED_KL, asked.kl), (SAVED_STATS, asked.stats), (SAVED_STATS, asked.pair))
    return [rows.new_empty((*rows.shape[1:], width) if used else (0,)) for width, used in widths]
