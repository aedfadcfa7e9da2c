"""A head's logits and gradients, some tokens at a time, in the dtypes that TRL computes in.

TRL (1.16, trl/kernels) folds tiles of tokens x 32768 columns into running sums. Here a chunk of
tokens has its whole row of logits for as long as one sweep reads it: log-prob, entropy and
divergences come out of that sweep, and the backward's out of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fasttax._base.gemm import gemm, pieces, project
from fasttax._base.library import prefer_huge_pages

# of one model's logits at a time; on an accelerator TRL's own tile, 4096 x 32768 floats
CHUNK_BYTES = {"cpu": 64 << 20}
ACCELERATOR_BYTES = 512 << 20
MIN_ROWS = 64  # below it a GEMM no longer runs at its rate


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """TRL's rule: autocast's dtype where it is on, else the hidden states'."""
    device = hidden.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else hidden.dtype


def rows_at_a_time(hidden: Tensor, V: int, models: int = 1) -> int:
    """Tokens of a chunk, whose logits by `models` models exist at once."""
    rows = CHUNK_BYTES.get(hidden.device.type, ACCELERATOR_BYTES) // (4 * V * models)
    return max(1, min(hidden.shape[0], max(MIN_ROWS, rows)))


def gathered(*params: Any) -> AbstractContextManager[Any]:
    """TRL's context in which ZeRO-3's parameters are whole."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    whole: AbstractContextManager[Any] = maybe_gather_lm_head_ctx(*params)
    return whole


class Logits:
    """hidden @ weight^T + bias of some tokens, from operands rounded to the dtype that multiplies.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        dtype: of the operands.
        out_dtype: of the logits.
        rows: the most tokens of a call; every call writes over the last one's logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        rows: int,
    ) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(out_dtype)
        self.buffer = prefer_huge_pages(
            torch.empty(rows, weight.shape[0], device=hidden.device, dtype=out_dtype)
        )

    def of(self, tokens: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(logits, hidden states) of the tokens, both in the dtypes of this head."""
        h = self.hidden[tokens].to(self.dtype)
        return project(h, self.weight, self.bias, self.buffer[: h.shape[0]]), h


class Tokens:
    """The tokens that have a gradient.

    TRL projects every position on a CPU; those of the prompt come back with 0. On an accelerator it
    has left them out already, and looking would be a sync.
    """

    def __init__(self, *grads: Tensor | None) -> None:
        given = [g for g in grads if g is not None]
        self.index: Tensor | None = None
        self.count = given[0].shape[0]
        if given[0].device.type == "cpu":
            nonzero = torch.stack([g != 0 for g in given]).any(0)
            if not bool(nonzero.all()):
                self.index = nonzero.nonzero().flatten()
                self.count = self.index.numel()

    def chunks(self, step: int) -> Iterator[Tensor | slice]:
        """What takes `step` of them after the other out of a tensor of all tokens."""
        for at in pieces(0, self.count, step):
            yield at if self.index is None else self.index[at]


class Gradients:
    """float32 sums of one head's gradients, and their way back to the tensors' dtypes.

    Args:
        needs: whether hidden, weight and bias need one.
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
    """

    def __init__(
        self, needs: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        self.tensors = (hidden, weight, bias)
        self.sums = [_zeros(t, need) for t, need in zip(self.tensors, needs, strict=True)]

    def add(
        self,
        tokens: Tensor | slice,
        d_logits: Tensor,
        wide: Tensor,
        hidden: Tensor,
        weight: Tensor,
    ) -> None:
        """Adds a chunk's share.

        Args:
            tokens: of the chunk.
            d_logits: the gradient of their logits, in the dtype that multiplies.
            wide: the same before it was rounded to that dtype, for the bias.
            hidden: what the logits were made of.
            weight: the same.
        """
        d_hidden, d_weight, d_bias = self.sums
        if d_hidden is not None:
            part = d_hidden.new_empty((d_logits.shape[0], weight.shape[1]))
            gemm(d_logits, weight, part, add=False)
            d_hidden[tokens] = part
        if d_weight is not None:
            gemm(d_logits.T, hidden, d_weight, add=True)
        if d_bias is not None:
            d_bias += wide.sum(0, dtype=torch.float32)

    def results(self) -> list[Tensor | None]:
        """Of hidden, weight and bias, each in its tensor's dtype; None where none is needed."""
        return [
            None if s is None or t is None else s.to(t.dtype)
            for s, t in zip(self.sums, self.tensors, strict=True)
        ]


def _zeros(tensor: Tensor | None, needed: bool) -> Tensor | None:
    if tensor is None or not needed:
        return None
    return torch.zeros(tensor.shape, device=tensor.device, dtype=torch.float32)
