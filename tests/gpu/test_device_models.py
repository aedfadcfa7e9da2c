"""Models that go to a GPU after what holds them was made, as trainers move theirs.

On a GPU (`make test-gpu`) against the CPU; without one test_gpu_launches.py runs them on the fake
CUDA, whose numbers are the CPU's and whose devices are CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, AdamWEWC, FisherMask
from tests.tools.models import causal_lm, ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = (torch.device("cpu"), torch.device("cuda"))
Made = tuple[nn.Module, EWC]


def fishers(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def diagonal(**options: Any) -> Made:
    model = causal_lm("llama")
    return model, EWC(model, fishers(model), strength=3.0, **options)


def estimate(model: nn.Module, structure: str) -> Any:
    return fasttax.estimate_fisher(model, [ids(3, 9)], structure=structure, progress=False)


def kronecker() -> Made:
    model = causal_lm("llama")
    return model, EWC(model, estimate(model, "kron"), strength=1e4)


def lora(structure: str, begun: bool, **options: Any) -> Made:
    """`begun`: the update that it stays at is none of 0."""
    base = causal_lm("llama")
    fisher = estimate(base, structure)
    torch.manual_seed(4)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=not begun)
    model = peft.get_peft_model(base, config)
    ewc = EWC(model, fisher, strength=1e4, **options)
    if begun:
        ewc.consolidate(fisher)
    return model, ewc


MAKES: dict[str, Callable[[], Made]] = {
    "diagonal": diagonal,
    "u8log": lambda: diagonal(storage="u8log", anchor_dtype="bf16+8"),
    "offloaded": lambda: diagonal(offload="cpu"),
    "kron": kronecker,
    "LoRA": lambda: lora("diagonal", False),
    "LoRA begun": lambda: lora("diagonal", True),
    "LoRA kron": lambda: lora("kron", True),
    "LoRA offloaded": lambda: lora("diagonal", True, offload="cpu"),
}


def moved(model: nn.Module) -> list[Tensor]:
    """The trainable parameters, a step on."""
    generator = torch.Generator().manual_seed(6)
    mine: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in mine:
            p += (0.1 * torch.randn(p.shape, generator=generator)).to(p.device)
    return mine


def same(here: list[Tensor], there: list[Tensor]) -> None:
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.detach().cpu(), a.detach().cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MAKES)
def test_ewc(name: str) -> None:
    found: list[list[Tensor]] = []
    for device in DEVICES:
        model, ewc = MAKES[name]()
        before = ewc.penalty()
        model.to(device)
        mine = moved(model)
        values = [before, ewc.penalty(), ewc.add_grad_(), ewc.distance().total]
        values += [p.grad.clone() for p in mine]
        if "LoRA" not in name:
            ewc.prox_(0.1)
            values += [p.clone() for p in mine]
        found.append(values)
    same(*found)


@pytest.mark.parametrize("name", ["diagonal", "kron", "LoRA kron"])
def test_an_evaluation_before_the_first_step(name: str) -> None:
    """Lightning's first: in inference mode, whose tensors take no gradient."""
    found: list[list[Tensor]] = []
    for device in DEVICES:
        model, ewc = MAKES[name]()
        model.to(device)
        mine = moved(model)
        with torch.inference_mode():
            before = ewc.penalty()
        ewc.penalty().backward()
        found.append([before.clone(), *(p.grad for p in mine)])
    same(*found)


def test_an_offloaded_fisher_of_lora_stays_in_the_hosts_memory(tmp_path: Path) -> None:
    for device in DEVICES:
        model, ewc = MAKES["LoRA offloaded"]()
        model.to(device)
        ewc.add_grad_()
        ewc.save(tmp_path / "ewc.safetensors")
        read = EWC.load(tmp_path / "ewc.safetensors", model)
        read.add_grad_()
        assert {h.fisher.values.device.type for h in (*ewc.hold.lora, *read.hold.lora)} == {"cpu"}


def test_ewcs_combine_of_which_one_has_gone_along() -> None:
    found: list[list[Tensor]] = []
    for device in DEVICES:
        model, ewc = MAKES["LoRA"]()
        other = EWC(model, ewc.fisher, strength=2.0)
        model.to(device)
        moved(model)
        ewc.penalty()
        found.append([EWC.combine(pair).penalty() for pair in permutations((ewc, other))])
    same(*found)


@pytest.mark.parametrize("name", ["diagonal", "offloaded", "LoRA begun"])
def test_a_step(name: str) -> None:
    found: list[list[Tensor]] = []
    for device in DEVICES:
        model, ewc = MAKES[name]()
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2)
        model.to(device)
        mine = moved(model)
        for _ in range(2):
            for p in mine:
                p.grad = torch.full_like(p, 0.1)
            optimizer.step()
        found.append([*mine, optimizer.penalty])
    same(*found)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_mask(scale: float) -> None:
    found: list[list[Tensor]] = []
    for device in DEVICES:
        model = causal_lm("llama")
        mask = FisherMask(model, fishers(model), share=0.3, scale=scale)
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with mask.attach(optimizer):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert {m.device.type for m in mask.masks.values()} == {device.type}
        found.append(list(model.parameters()))
    same(*found)
