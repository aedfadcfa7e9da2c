"""EWC on Kronecker factors against the dense quadratic form in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, AdamWEWC, KroneckerEstimate
from tests.tools.models import causal_lm, ids

STRENGTH = 7.0


def setting(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    """A model and its estimate."""
    model = causal_lm("llama").to(dtype)
    estimate = fasttax.estimate_fisher(
        model, [ids(3, 11)], structure="kron", progress=False, **options
    )
    return model, estimate


def move(model: nn.Module, by: float = 0.02) -> dict[str, Tensor]:
    """Moves every parameter; returns where they were."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * by)
    return before


def dense(t: Tensor) -> Tensor:
    if t.dim() == 1:
        return t.double().diag()
    return t.double() if t.dim() == 2 else torch.block_diag(*t.double())


def quadratic(e: KroneckerEstimate, name: str, d: Tensor) -> Tensor:
    """The product F d."""
    if name not in e.factors:
        return e[name].double() * d
    left, right = e.sides(name)
    return (dense(left) @ d.flatten(1) @ dense(right)).reshape(d.shape)


def truth(
    model: nn.Module, before: dict[str, Tensor], e: KroneckerEstimate
) -> tuple[float, dict[str, Tensor]]:
    """(penalty, gradients) in float64."""
    total, grads = 0.0, {}
    for name, p in model.named_parameters():
        d = p.detach().double() - before[name].double()
        grads[name] = STRENGTH * quadratic(e, name, d)
        total += float((d * grads[name]).sum()) / 2
    return total, grads


def worst(model: nn.Module, grads: dict[str, Tensor], scale: float = 1.0) -> float:
    off = []
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        expected = scale * grads[n]
        off.append(float((p.grad.double() - expected).norm() / expected.norm()))
    return max(off)


@pytest.mark.parametrize("max_dim", [None, 20, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_penalty_and_gradient(dtype: torch.dtype, max_dim: int | None) -> None:
    model, e = setting(dtype, max_dim=max_dim)
    ewc = EWC(model, e, strength=STRENGTH)
    assert float(ewc.penalty().detach()) == 0.0
    before = move(model)
    expected, grads = truth(model, before, e)
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    value = ewc.penalty()
    value.backward()
    assert float(value.detach()) == pytest.approx(expected, rel=min(bound, 1e-5))
    assert worst(model, grads) < bound
    model.zero_grad()
    added = ewc.add_grad_(torch.tensor(2.0))
    assert float(added) == pytest.approx(expected, rel=min(bound, 1e-5))
    assert worst(model, grads, 2.0) < bound
    assert float(ewc.distance().total) == pytest.approx(2 * expected / STRENGTH, rel=1e-4)


def test_prox_is_the_minimum_and_stable() -> None:
    model, e = setting(torch.float64)
    ewc = EWC(model, e, strength=STRENGTH)
    before = move(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc.prox_(0.3)
    for name, p in model.named_parameters():
        d = p.detach() - before[name]
        # (I + step F) d = d before the step
        back = d + 0.3 * STRENGTH * quadratic(e, name, d)
        assert float((back - (start[name] - before[name])).norm()) < 1e-10 * float(back.norm())
    for strength in (1e6, 1e12, 1e30):
        ewc.strength = strength
        ewc.prox_(1.0)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        small = ewc.distance().total
        assert float(small) < 1e-6
    # float32: what the Fisher leaves free must not move, however strong, by its entries' rounding
    # (1e-2 of the weights a step if those counted); what it holds weakly goes on to shrink
    model, e = setting()
    ewc = EWC(model, e, strength=1e12)
    move(model)
    ewc.prox_(1.0)
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc.prox_(1.0)
    for name, p in model.named_parameters():
        scale = once[name].abs().max()
        assert float((p.detach() - once[name]).abs().max()) < 1e-3 * float(scale), name


def test_attached_and_in_adamw() -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    before = move(model)
    _, grads = truth(model, before, e)
    twin, other = copy.deepcopy((model, ewc))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with ewc.attach(sgd):
        sgd.step()
    for n, p in model.named_parameters():
        step = (start[n] - p.detach()).double()
        torch.testing.assert_close(step, 0.1 * grads[n], rtol=1e-4, atol=1e-7)
    model.load_state_dict(start)
    for m in (model, twin):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
    ewc.add_grad_()
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    torch.optim.AdamW(model.parameters(), **options).step()
    optimizer = AdamWEWC(twin.parameters(), ewc=other, **options)
    optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.penalty is not None
    assert float(optimizer.penalty) > 0


def test_prox_attached() -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    move(model)
    twin, other = copy.deepcopy((model, ewc))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with ewc.attach(sgd, mode="prox"):
        sgd.step()
    other.prox_(0.1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_frozen_and_only() -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    before = move(model)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    _, grads = truth(model, before, e)
    ewc.add_grad_(only=[weight])
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [name]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), grads[name], rtol=1e-4, atol=1e-7)
    whole = float(ewc.penalty().detach())
    weight.requires_grad_(False)
    assert 0 < float(ewc.penalty().detach()) < whole


# --- states and tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_dtype", [None, "bf16+8"])
def test_files_states_and_copies(tmp_path: Path, anchor_dtype: Any) -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH, storage="u8log", anchor_dtype=anchor_dtype)
    before = move(model)
    value = ewc.penalty().detach()
    path = tmp_path / "ewc.safetensors"
    ewc.save(path)
    assert torch.equal(EWC.load(path, model).penalty().detach(), value)
    assert torch.equal(ewc.on(model).penalty().detach(), value)
    with pytest.raises(ValueError, match="model_hash"):
        EWC(model, e, strength=1.0)
    other = EWC(model, e, strength=1.0, anchor=before)
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty().detach(), value)
    e.save(path)
    assert float(EWC(model, path, strength=1.0, anchor=before).penalty().detach()) > 0
    estimate = ewc.fisher
    assert isinstance(estimate, KroneckerEstimate)
    for name, pair in e.factors.items():
        for mine, theirs in zip(estimate.factors[name], pair, strict=True):
            assert torch.equal(mine, theirs)
    diagonal = EWC(model, e.to_diagonal(), strength=1.0, anchor=before)
    state = diagonal.state_dict()
    with pytest.raises(ValueError, match="Kronecker"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="Kronecker"):
        diagonal.load_state_dict(ewc.state_dict())


def test_a_weight_that_lies_turned_keeps_its_sides_under_another_name(tmp_path: Path) -> None:
    """GPT-2's square ones too, whose two factors have one shape."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = causal_lm("gpt2_untied")

    plain = causal_lm("gpt2_untied")
    e = fasttax.estimate_fisher(plain, [ids(3, 9)], structure="kron", progress=False)
    path, new = tmp_path / "ewc.safetensors", {name: f"inner.{name}" for name in e}
    saved = EWC(plain, e, strength=STRENGTH)
    saved.save(path)
    model = Wrapped()
    loaded = EWC.load(path, model, rename=new)
    held = [loaded, EWC(model, e, strength=STRENGTH, rename=new), loaded.on(Wrapped())]
    for ewc in held:
        found = ewc.fisher
        assert isinstance(found, KroneckerEstimate)
        for name, (a, g) in e.factors.items():
            assert torch.equal(found.factors[new[name]][0], a), name
            assert torch.equal(found.factors[new[name]][1], g), name
            assert all(map(torch.equal, found.sides(new[name]), e.sides(name))), name
    move(model)
    move(plain)
    assert torch.equal(loaded.penalty().detach(), saved.penalty().detach())


def test_consolidates_to_the_nearest_product() -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    move(model, 0.3)
    new = fasttax.estimate_fisher(model, [ids(3, 9, seed=8)], structure="kron", progress=False)
    ewc.consolidate(new, decay=0.5)
    assert float(ewc.penalty().detach()) == 0.0
    merged = ewc.fisher
    assert isinstance(merged, KroneckerEstimate)
    off = []
    for name in e.factors:
        parts = [torch.kron(*map(dense, x.sides(name))) for x in (e, new, merged)]
        summed = 0.5 * parts[0] + parts[1]
        off.append(float((parts[2] - summed).norm() / summed.norm()))
    assert max(off) == pytest.approx(ewc.metadata["kronecker_error"], rel=1e-3)
    assert 0 < max(off) < 0.9
    norm = "model.norm.weight"
    torch.testing.assert_close(merged[norm], 0.5 * e[norm] + new[norm])
    with pytest.raises(ValueError, match="Kronecker factors"):
        ewc.consolidate(new.to_diagonal())
    with pytest.raises(ValueError, match="consolidate"):
        EWC.combine([ewc, ewc])


@pytest.mark.parametrize("max_dims", [(None, 20), (20, None), (None, 1), (16, 8)])
def test_consolidates_only_factors_cut_alike(max_dims: tuple[int | None, int | None]) -> None:
    model, e = setting(max_dim=max_dims[0])
    other = setting(max_dim=max_dims[1])[1]
    ewc = EWC(model, e, strength=STRENGTH)
    move(model)
    del other.metadata["model_hash"]
    before, value = ewc.state_dict(), float(ewc.penalty().detach())
    with pytest.raises(ValueError, match=r"cut down alike.*same structure= and max_dim="):
        ewc.consolidate(other)
    after = ewc.state_dict()
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items())
    assert float(ewc.penalty().detach()) == value
    again = setting(max_dim=max_dims[0])[1]
    del again.metadata["model_hash"]
    ewc.consolidate(again)  # the way out


def test_prox_of_nothing_moves_no_bit() -> None:
    """As of a step that a GradScaler skips, or a rate of 0."""
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    move(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc.prox_(0.0)
    ewc.hold.prox_(0.1, times=torch.tensor(0.0))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ewc.prox_(1e300)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_skipped_step_has_no_penalty() -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    move(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AdamWEWC(model.parameters(), ewc=ewc)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = sum(p.square().sum() for p in model.parameters())
    scaler.scale(loss).backward()
    next(model.parameters()).grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert optimizer.penalty is not None
    assert float(optimizer.penalty) == 0.0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_scale_of_several_values_is_refused_before_it_writes() -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=STRENGTH)
    move(model)
    with pytest.raises(ValueError, match=r"EWC.add_grad_: scale: .*one element"):
        ewc.add_grad_(scale=torch.ones(2))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("value", "problem"), [(torch.nan, "not finite"), (-1e9, "not symmetric"), (3.0, "symmetric")]
)
def test_factors_that_were_written_into_are_looked_at(value: float, problem: str) -> None:
    model, e = setting()
    ewc = EWC(model, e, strength=1.0)
    name = "model.layers.1.mlp.up_proj.weight"
    e.factors[name][1][0, 1] = value
    for use in (lambda: EWC(model, e, strength=1.0), lambda: ewc.consolidate(e)):
        with pytest.raises(ValueError, match=problem) as caught:
            use()
        assert f"factors['{name}'].G" in str(caught.value)
    e.factors[name][1][1, 0] = e.factors[name][1][0, 1] = 0.0
    own = KroneckerEstimate(e.factors, e.diagonal, e.metadata)  # the way out
    EWC(model, own, strength=1.0)


def test_normalize() -> None:
    model, e = setting()
    for how in ("mean", "max"):
        ewc = EWC(model, e, strength=1.0, normalize=how)
        values = torch.cat([ewc.fisher[n].reshape(-1) for n in ewc.fisher])
        size = values.mean() if how == "mean" else values.max()
        assert float(size) == pytest.approx(1.0, rel=1e-4)


def test_refused() -> None:
    model, e = setting()
    for options, named in (
        ({"clamp": 1.0}, "clamp"),
        ({"offload": "cpu"}, "offload"),
    ):
        with pytest.raises(ValueError, match=named) as caught:
            EWC(model, e, strength=1.0, **options)
        assert "to_diagonal" in str(caught.value)
        EWC(model, e.to_diagonal(), strength=1.0, **options)
    ewc = EWC(model, e, strength=1.0)
    with pytest.raises(ValueError, match="during_backward"):
        ewc.during_backward()
    with pytest.raises(ValueError, match="prox_euclidean"):
        AdamWEWC(model.parameters(), ewc=ewc, mode="prox_adam")
    with pytest.raises(ValueError, match="fisher"):
        AdamWEWC(model.parameters(), ewc=ewc, fisher="second_moment")
    with pytest.raises(ValueError, match="shape"):
        EWC(causal_lm("gpt2"), e, strength=1.0)


# --- LoRA -----------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn_like(p) * 0.1)
    return wrapped


def test_lora_update_without_a_dense_matrix() -> None:
    model, e = setting()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = adapted(model)
    ewc = EWC(wrapped, e, strength=STRENGTH)
    value = ewc.penalty()
    value.backward()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    expected, _ = truth(merged, before, e)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
    grads = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
    assert any("lora_A" in n for n in grads)
    layer = wrapped.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = layer.scaling["default"]
    name = "model.layers.0.mlp.up_proj.weight"
    d = scale * (b.double() @ a.double()).detach()
    pull = STRENGTH * quadratic(e, name, d)
    torch.testing.assert_close(a.grad.double(), scale * b.double().T @ pull, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(b.grad.double(), scale * pull @ a.double().T, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="proximal"):
        ewc.prox_(0.1)
    state = ewc.state_dict()
    other = EWC(wrapped, e, strength=1.0)
    other.load_state_dict(state)
    assert torch.equal(other.penalty().detach(), value.detach())


def test_lora_consolidates_at_the_present_update(tmp_path: Path) -> None:
    model, e = setting()
    wrapped = adapted(model)
    ewc = EWC(wrapped, e, strength=STRENGTH)
    new = fasttax.estimate_fisher(
        wrapped, [ids(2, 9)], structure="kron", progress=False, lora="delta_w"
    )
    names = {n for n in new.factors if "base_layer" in n}
    assert names
    inner = EWC(wrapped, new, strength=1.0)
    assert float(inner.penalty().detach()) == 0.0
    path = tmp_path / "ewc.safetensors"
    ewc.save(path)
    assert torch.equal(EWC.load(path, wrapped).penalty(), ewc.penalty())
