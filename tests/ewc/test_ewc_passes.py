"""during_backward adds the penalty's gradient once a backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fasttax import EWC


class Shared(nn.Module):
    """Calls one layer in two checkpoints, and frozen layers around them."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2).requires_grad_(False)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """By a name, as transformers' models give their logits."""
        x = x.clone().requires_grad_()
        for _ in range(2):
            x = torch.tanh(checkpoint(self.layer, x, use_reentrant=self.reentrant))
        return {"logits": self.head(x)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_during_backward_counts_a_checkpointed_layer_once(reentrant: bool) -> None:
    """Reentrant checkpoints give a shared layer's gradient in parts: the pull came with each."""
    torch.manual_seed(0)
    model, x = Shared(reentrant), torch.randn(3, 5)
    ewc = EWC(model, {"layer.weight": torch.rand(5, 5)}, strength=2.0)
    weight = model.layer.weight
    weight.data += torch.rand(5, 5)

    def backward(call: Any) -> None:
        call(x)["logits"].sum().backward()

    for _ in range(2):
        backward(model)
    ewc.add_grad_(2.0)
    expected, model.layer.weight.grad = weight.grad, None
    with ewc.during_backward() as handle:
        for _ in range(2):
            backward(model)
        torch.testing.assert_close(weight.grad, expected)
        torch.testing.assert_close(handle.penalty, ewc.penalty().detach())
        if reentrant:  # nothing tells where one pass ends
            with pytest.raises(ValueError, match="use_reentrant=False, call the model itself"):
                backward(model.forward)
    assert not model._forward_hooks


def test_a_pass_that_failed_is_none_that_counts() -> None:
    torch.manual_seed(0)
    model, x = Shared(True), torch.randn(3, 5)
    ewc = EWC(model, {"layer.weight": torch.rand(5, 5)}, strength=2.0)
    model.layer.weight.data += 1

    def interrupt(grad: Tensor) -> None:
        raise KeyboardInterrupt

    pull = ewc.add_grad_()
    expected, model.layer.weight.grad = model.layer.weight.grad, None
    with ewc.during_backward():
        out = model(x)["logits"]
        out.register_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            (out.sum() * 0).backward()
        (model(x)["logits"].sum() * 0).backward()
    torch.testing.assert_close(model.layer.weight.grad, expected)
    assert float(pull) > 0


@pytest.mark.parametrize("where", ["model", "part"])
def test_a_compiled_model_stays_whole(where: str) -> None:
    """What watches the passes is a hook of the model's, which a graph takes in."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    ewc = EWC(model, {"0.weight": torch.ones(3, 4)}, strength=1.0)
    next(model.parameters()).data += 1
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ewc.during_backward() as handle:
        call = whole if where == "model" else model
        call(torch.ones(2, 4)).sum().backward()
        assert float(handle.penalty or 0) == 6.0
