"""Embeddings: the gradient of a row is the sum of d where the row was looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import dtensor
from fasttax.fisher import sharding
from fasttax.fisher.passes import Pass, in_backward
from fasttax.fisher.pieces import Piece
from fasttax.fisher.tap import Call, Kept, Tap, computing_with


class EmbeddingTap(Tap):
    """nn.Embedding and its subclasses.

    Whatever they do to the ids and whatever number they multiply a row by.
    """

    role = "embedding"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Not those whose gradient is no plain sum: max_norm, scale_grad_by_freq, sparse."""
        if not isinstance(module, nn.Embedding):
            return False
        own = {name for name, _ in module.named_parameters(recurse=False)}
        plain_sum = not (module.max_norm is not None or module.scale_grad_by_freq or module.sparse)
        return plain_sum and own == {"weight"}

    @property
    def plain(self) -> bool:
        """Whether it is nn.Embedding's own forward, from ids to rows."""
        return type(self.module).forward is nn.Embedding.forward

    def check(self, call: Call) -> None:
        """Refuses a subclass that is split over ranks, whose ids cannot be read off its table.

        A subclass may take anything in place of ids.
        """
        if self.plain:
            super().check(call)
        elif dtensor.is_sharded(call.output):
            raise self.refusal("a subclass of nn.Embedding split over ranks has no rule")
        elif not isinstance(call.output, Tensor):
            raise self.refusal("expected a tensor of ids in and one row each out")

    def keep(self, call: Call) -> Kept:
        """The ids, an example a row, and the factors of vectors that are scaled or do not count."""
        module: Any = self.module
        layout = call.current.layout
        ids, factors = call.input, []
        if not self.plain:
            ids, factor = self._lookup(call)
            factors.append(factor)
        if call.output.shape[:-1] != ids.shape:
            raise self.refusal("expected a tensor of ids in and one row each out")
        y, ids = layout.per_example(call.output, sharding.whole_ids(ids, self.where).detach())
        factors = [factor.expand(ids.shape) for factor in factors]
        if module.padding_idx is not None:
            factors.append(ids != module.padding_idx % module.num_embeddings)
        if dtensor.is_sharded(call.output):
            ids, here = sharding.own_rows(ids, module.weight)
            factors += [mask for mask in (here,) if mask is not None]
        if not in_backward() and layout.only is None:
            call.current.ids[self.names["weight"]] = ids
        return Kept(y, ids, tuple(factors))

    def leading(self, x: Tensor) -> int:
        """All: ids have no features."""
        return x.dim()

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """`d` (..., H), x the ids (...)."""
        piece = Piece("embedding", bounds, d.reshape(-1, d.shape[-1]), x.flatten())
        self.give(current, "weight", piece)

    @torch.no_grad()
    def _lookup(self, call: Call) -> tuple[Tensor, Tensor]:
        """(ids, factor) of a subclass's forward.

        Read off its own output with two tables in place of the weight: (1, row) and 1.
        """
        module: Any = self.module
        rows = torch.arange(module.num_embeddings, dtype=torch.float64, device=module.weight.device)
        ones = torch.ones(len(rows), 1, dtype=module.weight.dtype, device=rows.device)
        try:
            with computing_with(module, {"weight": torch.stack((torch.ones_like(rows), rows), -1)}):
                out = module.forward(*call.args, **call.kwargs)
            with computing_with(module, {"weight": ones}):
                factor = module.forward(*call.args, **call.kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = f"its own forward takes no table of another width ({str(error)[:100]})"
            raise self.refusal(reason) from error
        if out.shape[-1:] != (2,) or factor.shape != (*out.shape[:-1], 1):
            raise self.refusal("what it makes of its table is no row times a number")
        ids = torch.where(out[..., 0] != 0, out[..., 1] / out[..., 0], 0.0).round().long()
        return ids, factor[..., 0]
