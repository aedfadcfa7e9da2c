"""Recurrent layers: the batch is where `batch_first` says, and dimension 1 of a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttax.fisher.layout import Layout
from fasttax.fisher.passes import Pass
from fasttax.fisher.rules.module import ModuleTap
from fasttax.fisher.tap import Call


class RecurrentTap(ModuleTap):
    """nn.RNN, nn.LSTM and nn.GRU, run again example by example.

    The input and the outputs at every step are (T, B, H), or (B, T, H) with batch_first=True; the
    states (layers * directions, B, H) whatever batch_first says.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Plain ones by their forward."""
        plain = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
        return isinstance(module, nn.RNNBase) and type(module).forward in plain

    def check(self, call: Call) -> None:
        """Refuses packed sequences, and an input without a batch.

        Raises:
            TypeError: as ModuleTap, or a PackedSequence came.
            ValueError: as ModuleTap, or the input has two dimensions.
        """
        if isinstance(call.input, nn.utils.rnn.PackedSequence):
            raise self.refusal("no rule for a PackedSequence; give it padded rows")
        if isinstance(call.input, Tensor) and call.input.dim() != 3:
            reason = f"expected a batch (3 dimensions), got {tuple(call.input.shape)}"
            raise self.refusal(reason, ValueError)
        if call.current.layout.packed:
            raise self.refusal("no rule for several documents in one row", ValueError)
        super().check(call)

    def _dimension(self, place: int) -> int:
        """Where examples lie in argument or output number `place`; those after 0 are states."""
        module: Any = self.module
        return 0 if place == 0 and module.batch_first else 1

    def part(self, layout: Layout, t: Tensor, place: int, n: int, folded: bool) -> Tensor:
        """See ModuleTap."""
        return t.narrow(self._dimension(place), n, 1)

    def copied(self, current: Pass, t: Tensor) -> Tensor:
        """An output: a state's first dimension counts layers, 1 of them too."""
        return t

    def leading_of(self, outputs: Sequence[Any]) -> torch.Size:
        """See ModuleTap."""
        shape = outputs[0].shape
        if self._dimension(0) == 1:
            return torch.Size((shape[1], shape[0]))
        return torch.Size(shape[:2])
