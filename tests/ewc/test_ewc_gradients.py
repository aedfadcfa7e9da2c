"""The gradients that EWC makes where a parameter has none, as optimizers take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import EWC, KroneckerEstimate
from fasttax.integrations._project import Complement
from tests.tools.models import causal_lm

FUSED: dict[str, Any] = {
    "AdamW": lambda params, fused: torch.optim.AdamW(params, lr=0.1, fused=fused),
    "SGD": lambda params, fused: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=fused),
}


class Laid(nn.Module):
    """A convolution in channels_last, and a matrix that lies transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Linear(6, 7, bias=False)
        self.turned.weight = nn.Parameter(torch.randn(6, 7).T)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape))


def diagonal() -> tuple[nn.Module, Callable[[], Any]]:
    model = Laid()
    ewc = EWC(model, {n: torch.rand(p.shape) for n, p in model.named_parameters()}, strength=2.0)
    return model, ewc.add_grad_


def factors() -> tuple[nn.Module, Callable[[], Any]]:
    model = Laid()
    sides = {"turned.weight": (torch.eye(6) + 0.1, torch.eye(7) + 0.2)}
    ewc = EWC(model, KroneckerEstimate(sides, {}), strength=2.0)
    return model, ewc.add_grad_


def updates() -> tuple[nn.Module, Callable[[], Any]]:
    """Of transposed weights: an embedding, and GPT-2's Conv1D."""
    peft = pytest.importorskip("peft")
    base = causal_lm("gpt2")
    names = ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight")
    fisher = {n: torch.rand_like(p) for n, p in base.named_parameters() if n in names}
    config = peft.LoraConfig(r=2, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    return model, EWC(model, fisher, strength=2.0).add_grad_


def projection() -> tuple[nn.Module, Callable[[], Any]]:
    """Parameters without a gradient get one where the directions reach them."""
    model = Laid()
    params = list(model.parameters())
    out = Complement(params)
    out.add([torch.randn(p.shape) for p in params])
    params[-1].grad = torch.ones_like(params[-1])
    return model, out.project_


KINDS = [diagonal, factors, updates, projection]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", FUSED)
def test_a_gradient_lies_as_its_parameter(
    kind: Callable[[], tuple[nn.Module, Callable[[], Any]]], optimizer: str
) -> None:
    """torch's fused optimizers on CPUs step other entries where it does not, without a word."""
    ends: list[list[Tensor]] = []
    for fused in (True, False):
        torch.manual_seed(0)
        model, make = kind()
        move(model)
        steps = FUSED[optimizer]([p for p in model.parameters() if p.requires_grad], fused)
        make()
        made = [p for p in model.parameters() if p.grad is not None]
        assert any(bool(p.grad.any()) for p in made)
        for p in made:
            assert p.grad.stride() == p.stride()
        steps.step()
        ends.append([p.detach() for p in made])
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want)
