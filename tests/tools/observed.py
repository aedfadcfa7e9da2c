"""A user's own loss under observe(): the definition that its squares are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttax import DiagonalFisher
from tests.tools.models import assert_exact, assert_same_state, state_of

B, T, V, H, CLASSES = 4, 6, 61, 16, 3
Y = torch.tensor([0, 2, 1, 1])
Model = Callable[[], nn.Module]


def built(make: Model) -> nn.Module:
    """In float64 and eval mode, every weight unlike its neighbours."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def class_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def truth_of(model: nn.Module, x: Tensor, y: Tensor = Y, loss: Any = class_loss) -> dict[str, Any]:
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for n in range(len(x)):
        value = loss(model, x[n : n + 1], y[n : n + 1])
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for name, g in zip(params, found, strict=True):
            if g is not None:
                total[name] += g**2
    return total


def observed(
    model: nn.Module, x: Tensor, y: Tensor = Y, loss: Any = class_loss, **options: Any
) -> Any:
    alone = options.pop("alone", None)
    estimator = DiagonalFisher(model, labels="true", **options)
    with estimator.observe(loss=alone):
        loss(model, x, y).backward()
    return estimator.finalize("sum")


def right_or_refused(model: nn.Module, x: Tensor, *names: str, loss: Any = class_loss) -> bool:
    """Whether the numbers are right; a refusal names one of `names`, and changes nothing."""
    estimator = DiagonalFisher(model, labels="true")
    before = state_of(model)
    try:
        with estimator.observe():
            loss(model, x, Y).backward()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert text.startswith("DiagonalFisher"), text
        assert any(name in text for name in names), text
        assert "params=" in text or "loss=" in text, text
        assert estimator.examples == 0
        assert not any(bool(t.any()) for t in estimator.sums.values.values())
        assert_same_state(model, before)
        return False
    assert_exact(estimator.finalize("sum"), truth_of(model, x, loss=loss), 1e-9)
    return True
