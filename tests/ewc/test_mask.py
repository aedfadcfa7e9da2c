"""FisherMask: the largest Fishers by brute force, bits that no step moves, the rest free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttax import EWC, AdamWEWC, FisherMask
from fasttax.ewc.mask import top


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 1e-30, 1e-9, 0.5, 1.0, 1.0000001, 3e38]), min_size=1, max_size=40
    ),
    st.integers(0, 45),
    st.integers(1, 39),
)
def test_top_against_sorting(values: list[float], count: int, cut: int) -> None:
    flat = torch.tensor(values)
    parts = {"a": flat[:cut], "b": flat[cut:]}
    masks = top(parts, count)
    got = torch.cat([masks["a"], masks["b"]])
    order = sorted(range(len(values)), key=lambda k: (-float(flat[k]), k))
    expected = {k for k in order[:count] if flat[k] > 0}
    assert {int(k) for k in got.nonzero()[:, 0]} == expected


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def fisher(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.rand(p.shape, generator=g) for name, p in model.named_parameters()}


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.05, weight_decay=0.5),
    "fused": lambda ps: torch.optim.AdamW(ps, 0.05, fused=True),
    "foreach": lambda ps: torch.optim.Adam(ps, 0.05, foreach=True),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_keep_their_bits(name: str) -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = FisherMask(model, fisher(model), share=0.3)
    every = sum(p.numel() for p in model.parameters())
    assert mask.masked == round(0.3 * every)
    with mask.attach(OPTIMIZERS[name](model.parameters())) as handle:
        optimizer = OPTIMIZERS[name](model.parameters())
        with mask.attach(optimizer):
            train(model, optimizer)
    assert not handle.active
    for n, p in model.named_parameters():
        held = mask.masks[n]
        assert torch.equal(p[held].view(torch.int32), before[n][held].view(torch.int32))
        assert bool((p[~held] != before[n][~held]).all())


def test_a_scale_takes_that_share_of_each_step() -> None:
    free, held = net(), net()
    mask = FisherMask(held, fisher(held), share=0.5, scale=0.25)
    before = {n: p.detach().clone() for n, p in free.named_parameters()}
    for model in (free, held):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if model is held:
            mask.attach(optimizer)
        train(model, optimizer, steps=1)
    for (n, p), (_, q) in zip(free.named_parameters(), held.named_parameters(), strict=True):
        share = torch.where(mask.masks[n], 0.25, 1.0)
        torch.testing.assert_close(q - before[n], share * (p - before[n]))


def test_undo_frees_them_and_zeros_are_never_masked() -> None:
    model = net()
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    zeros["0.weight"][0, 0] = 1e-12
    mask = FisherMask(model, zeros, share=1.0)
    assert mask.masked == 1
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = mask.attach(optimizer)
    first = float(model.get_parameter("0.weight").detach()[0, 0])
    train(model, optimizer, 1)
    assert float(model.get_parameter("0.weight").detach()[0, 0]) == first
    handle.undo()
    train(model, optimizer, 1)
    assert float(model.get_parameter("0.weight").detach()[0, 0]) != first


def test_a_second_attach_is_refused_until_the_first_is_undone() -> None:
    """Each step would be scaled twice."""
    model = net()
    mask = FisherMask(model, fisher(model), share=0.5, scale=0.25)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = mask.attach(optimizer)
    with pytest.raises(ValueError, match=r"FisherMask.attach: optimizer.* undo\(\) the first"):
        mask.attach(optimizer)
    other = torch.optim.SGD(model.parameters(), 0.1)
    mask.attach(other).undo()
    handle.undo()
    assert mask.attach(optimizer).active


def test_beside_ewc() -> None:
    model = net()
    ewc = EWC(model, fisher(model), strength=1.0)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=0.05)
    mask = FisherMask(model, fisher(model), share=0.2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with mask.attach(optimizer):
        train(model, optimizer)
    assert all(
        torch.equal(p[mask.masks[n]], before[n][mask.masks[n]]) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize("mask_first", [False, True])
def test_the_last_word_is_the_masks(mask_first: bool) -> None:
    """EWC's proximal step comes after the optimizer's, too."""
    model = net()
    ewc = EWC(model, fisher(model), strength=1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = FisherMask(model, fisher(model), share=0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if mask_first:
        mask.attach(optimizer)
    ewc.attach(optimizer, mode="prox")
    if not mask_first:
        mask.attach(optimizer)
    train(model, optimizer)
    for n, p in model.named_parameters():
        assert torch.equal(p[mask.masks[n]], before[n][mask.masks[n]])


class Wrapped:
    """As Accelerate's AcceleratedOptimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    model = net()
    mask = FisherMask(model, fisher(model), share=0.2)
    optimizer: Any = Wrapped(torch.optim.SGD(model.parameters(), 0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with mask.attach(optimizer):
        train(model, optimizer)
    for n, p in model.named_parameters():
        assert torch.equal(p[mask.masks[n]], before[n][mask.masks[n]])
    with pytest.raises(TypeError, match=r"FisherMask\.attach: optimizer"):
        mask.attach(model)


def test_a_group_that_is_added_later_is_masked() -> None:
    model = net()
    first, *rest = model.parameters()
    mask = FisherMask(model, fisher(model), share=0.2)
    optimizer = torch.optim.SGD([first], 0.1)
    mask.attach(optimizer)
    optimizer.add_param_group({"params": rest})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer)
    for n, p in model.named_parameters():
        assert torch.equal(p[mask.masks[n]], before[n][mask.masks[n]])


def test_a_parameter_that_is_no_longer_the_models_is_named() -> None:
    model: Any = net()
    mask = FisherMask(model, fisher(model), share=0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask.attach(optimizer)
    train(model, optimizer)
    model[2] = nn.Linear(8, 3)
    for use in (lambda: train(model, optimizer), lambda: mask.attach(optimizer)):
        with pytest.raises(ValueError, match=r"2\.weight.*make the mask anew"):
            use()


def test_refuses() -> None:
    model = net()
    values = fisher(model)
    for options, says in (
        ({"share": 0.0}, "share"),
        ({"share": 1.1}, "share"),
        ({"share": 0.5, "scale": 1.0}, "scale"),
        ({"share": 0.5, "scale": -0.1}, "scale"),
    ):
        with pytest.raises(ValueError, match=says):
            FisherMask(model, values, **options)
    with pytest.raises(ValueError, match=r"5\.weight: not a parameter"):
        FisherMask(model, {**values, "5.weight": torch.ones(1)}, share=0.5)
    with pytest.raises(ValueError, match=">= 0"):
        FisherMask(model, {**values, "0.bias": -torch.ones(8)}, share=0.5)
    other = torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(ValueError, match="none of them"):
        FisherMask(model, values, share=0.5).attach(other)
