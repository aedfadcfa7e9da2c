"""The ways that a checked call of a linear op can go: see `LinearCall.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttax._base import checks
from fasttax._base.gemm import pieces
from fasttax._base.modes import without_autocast
from fasttax._base.optional import given
from fasttax.kl.gradients import (
    FLOAT16,
    NO_GRAD,
    held_gradients,
    hold_gradients,
    obstacle_to_gradients,
)
from fasttax.kl.linear_ops import linear_token_rows, linear_token_total
from fasttax.kl.linear_product import linear_head, linear_logits
from fasttax.kl.linear_sweep import Inputs, Projection, Sweep, Tensors
from fasttax.kl.token_kl import kl_of_rows
from fasttax.kl.token_stats import StatsRows, stats_of_rows
from fasttax.kl.vocab_parallel import combine_parts, to_group
from fasttax.kl.weigh import Weighing
from fasttax.reference.rows import LINEAR
from fasttax.reference.weigh import NONE

# at a time under tp_group, whose shards of the vocabulary are small
CPU_TOKENS, GPU_TOKENS = 256, 1024


@dataclass(frozen=True)
class LinearCall:
    """A checked call: the inputs with tokens flattened, and what becomes of the tokens' values.

    The weighing's mask has the tokens' `shape`; inputs.mask is the same, flattened.
    """

    op: str
    inputs: Inputs
    shape: torch.Size
    weighing: Weighing
    grad_mode: str
    tp_group: Any

    def run(self, outputs: Mapping[str, str], several: str) -> dict[str, Tensor]:
        """The outputs, of which each is a row of LINEAR, weighed and reduced.

        Gradients are made in the forward where they can be: `several` says why those of more than
        one output can't. Elsewhere the values come from ranks' shards, from tiles of the
        vocabulary, or from whole rows.
        """
        if self._in_forward(several if len(outputs) > 1 else ""):
            [(name, row)] = outputs.items()
            return {name: self._made_in_forward(LINEAR.index(row))}
        given, factors = self.inputs, {"token_weight": self.weighing.weight}
        kept = {**given.tensors._asdict(), "ids": given.ids, "mask": given.mask, **factors}
        checks.for_backward(self.op, **kept)
        if self.tp_group is not None:
            rows = StatsRows.of(self._over_ranks(tuple(outputs.values())))
        elif self.tiles > 1:
            rows = StatsRows.of(self._over_tiles(set(outputs.values())))
        else:
            places = {name: place for place, name in enumerate(LINEAR)}
            rows = StatsRows([linear_token_rows(self.inputs)], places)
        tensors = [t.reshape(len(t), *self.shape) for t in rows.tensors]
        weighed = replace(rows, tensors=tensors).weighed(tuple(outputs.values()), self.weighing)
        return dict(zip(outputs, weighed, strict=True))

    @property
    def tiles(self) -> int:
        """Of the vocabulary, that are gone over one by one."""
        return self.inputs.asked.tiles(self.inputs.tensors.weight.shape[0])

    def _in_forward(self, several: str) -> bool:
        """Whether to make the gradients in the forward; an error where they would be wrong."""
        if self.grad_mode == "recompute":
            return False
        obstacle = self._obstacle(several)
        if self.grad_mode == "forward" and obstacle not in ("", NO_GRAD):
            raise checks.fail(
                self.op,
                "grad_mode",
                "'auto' or 'recompute'",
                "'forward'",
                f"the forward can't make the gradients: {obstacle}",
            )
        return not obstacle

    def _obstacle(self, several: str) -> str:
        tensors, known = self.inputs.tensors, self.weighing.reduces
        heads = (tensors.weight, tensors.ref_weight, tensors.bias, tensors.ref_bias)
        if not known and any(head is not None and head.requires_grad for head in heads):
            return (
                "with reduction='none' the tokens' weights are not known, and a head requires grad"
            )
        if several:
            return several
        if self.tp_group is not None:
            return "under tp_group it takes the other ranks' logits"
        if self.tiles > 1:
            return "with vocab_chunk < V a gradient takes the other chunks' logits"
        obstacle = obstacle_to_gradients(tensors, self.weighing.weight, stateless=known)
        if not obstacle and self.inputs.asked.gemm_dtype == torch.float16:
            return FLOAT16
        return obstacle

    def _made_in_forward(self, row: int) -> Tensor:
        if torch.compiler.is_compiling():
            hidden = self.inputs.tensors.hidden
            like = hidden.new_empty(hidden.shape[0], dtype=self.inputs.tensors.dtype)
            return linear_token_total(self.weighing.flat().by_token(like), self.inputs, row)
        value: Tensor = _GradientInForward.apply(*self.inputs.tensors, self, row)
        return value if self.weighing.reduces else value.reshape(self.shape)

    def _over_tiles(self, wanted: set[str]) -> dict[str, Tensor]:
        """The `wanted` of every token from tiles of the vocabulary."""
        asked, V, ids = self.inputs.asked, self.inputs.tensors.weight.shape[0], self.inputs.ids
        needed = {*wanted, "lse"}
        if asked.pair:
            needed.add("ref_lse")
        rows = dict(zip(LINEAR, linear_token_rows(self.inputs), strict=True))
        parts = {name: rows[name] for name in needed}
        if ids is not None:
            tiles = pieces(0, V, asked.columns(V))
            parts["mine"] = torch.stack([(ids >= c.start) & (ids < c.stop) for c in tiles])
        return combine_parts(parts, wanted, self.inputs.mask)

    def _over_ranks(self, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Chunks of the tokens under activation checkpointing.

        A chunk's ops talk to the other ranks, so autograd runs them as they are.
        """
        (hidden, weight, ref_hidden, ref_weight, bias, ref_bias), ids, mask, _, asked = self.inputs
        dtype, group = self.inputs.tensors.dtype, self.tp_group
        hidden = to_group(self.op, hidden, self.inputs.t, group)
        operands = [linear_head(weight, bias, dtype, asked.gemm_dtype)]
        if ref_hidden is not None and ref_weight is not None:
            ref_hidden = to_group(self.op, ref_hidden, self.inputs.t, group)
            operands.append(linear_head(ref_weight, ref_bias, dtype, asked.gemm_dtype))
        # widened once, so that the chunks' gradients meet in float32
        heads = [
            given(head, lambda head: head.to(dtype))
            for head in (weight, ref_weight, bias, ref_bias)
        ]
        # the same on every rank, whatever its shard: a collective more on one of them would hang
        # the others
        own = CPU_TOKENS if hidden.device.type == "cpu" else GPU_TOKENS
        tokens = max(1, hidden.shape[0])  # of none, one empty chunk: its sums have a graph
        chunks = []
        for at in pieces(0, tokens, asked.token_chunk or own):
            by_token = [None if t is None else t[at] for t in (hidden, ref_hidden, ids, mask)]
            chunks.append(
                checkpoint(
                    self._of_chunk,
                    outputs,
                    operands,
                    *by_token,
                    *heads,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        whole = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        return dict(zip(outputs, whole, strict=True))

    def _of_chunk(
        self,
        outputs: tuple[str, ...],
        operands: list[Projection],
        hidden: Tensor,
        ref_hidden: Tensor | None,
        ids: Tensor | None,
        mask: Tensor | None,
        weight: Tensor,
        ref_weight: Tensor | None,
        bias: Tensor | None,
        ref_bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x, y = linear_logits(self.op, hidden, weight, bias, operands[0]), None
        if ref_hidden is not None and ref_weight is not None:
            y = linear_logits(self.op, ref_hidden, ref_weight, ref_bias, operands[1])
        t, group = self.inputs.t, self.tp_group
        if y is not None and outputs == ("kl",):
            return (kl_of_rows(self.op, x, y, mask, t, group),)
        stats = stats_of_rows(self.op, x, y, ids, mask, t, outputs, group)
        plain = Weighing(self.op, mask, None, NONE, 1.0)
        return tuple(stats.weighed(outputs, plain))


class _GradientInForward(torch.autograd.Function):
    """Values whose forward makes the gradients, which its backward multiplies.

    One value a token, or their sum or mean; the factor from above is one number, or with reduction
    "none" one a token, for the hidden states alone.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *leaves, call, row = args
        ctx.op, ctx.known, w = call.op, call.weighing.reduces, call.weighing.flat()
        tensors = Tensors(*[given(t, Tensor.detach) for t in leaves])  # type: ignore[arg-type]
        with without_autocast(tensors.hidden.device):
            needs = ctx.needs_input_grad[: len(tensors)]
            sweep = Sweep(call.inputs._replace(tensors=tensors), needs)
            by_token = w.by_token(sweep.rows.new_empty(tensors.hidden.shape[0]))
            d_rows = by_token.new_zeros((len(LINEAR), 1, by_token.shape[0]))
            d_rows[row, 0] = by_token
            sweep.run(d_rows)
            hold_gradients(ctx, sweep.gradients(), by_token)
            return w.of(sweep.results()[0][row, 0])

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return *held_gradients(ctx, ctx.op, factor), None, None
