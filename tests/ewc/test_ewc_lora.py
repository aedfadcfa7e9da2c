"""EWC on PEFT models: the penalty on delta W of the frozen base, against the dense one by float64
autograd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttax import EWC, AdamWEWC, DiagonalFisher, functional
from tests.tools.models import causal_lm
from tests.tools.utils import assert_within

peft = pytest.importorskip("peft", reason="pip install peft, or fasttax's dev extra")


def adapted(
    kind: str = "llama",
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    adapters: int = 1,
    **options: Any,
) -> tuple[Any, Any]:
    """(base, PEFT model) with random factors, all adapters active."""
    base = causal_lm(kind)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), **options)
    )
    for i in range(1, adapters):
        model.add_adapter(
            f"more{i}", peft.LoraConfig(r=2 + i, lora_alpha=4, target_modules=list(targets))
        )
    if adapters > 1:
        model.base_model.set_adapter(["default", *(f"more{i}" for i in range(1, adapters))])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    return base, model


def base_fisher(model: nn.Module) -> dict[str, Tensor]:
    """By the base model's own names, of every weight and norm."""
    plain = {
        n.removeprefix("base_model.model.").replace("base_layer.", ""): p
        for n, p in model.named_parameters()
        if "lora_" not in n
    }
    return {n: torch.rand(p.shape) for n, p in plain.items()}


def deltas(model: nn.Module, fisher: dict[str, Tensor]) -> dict[str, Any]:
    """delta W of each adapted weight by PEFT itself, in the weight's own layout."""
    out = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            plain = name.removeprefix("base_model.model.") + ".weight"
            if plain in fisher:
                out[plain] = module
    return out


def dense(
    model: nn.Module, fisher: dict[str, Tensor], strength: float, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty on the merged update by autograd in `dtype`, with PEFT's get_delta_weight as the
    update.
    """
    params = {n: p for n, p in model.named_parameters() if "lora_" in n}
    kept = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.data = p.data.to(dtype)
    total = torch.zeros((), dtype=dtype)
    for name, module in deltas(model, fisher).items():
        delta = sum(module.get_delta_weight(a) for a in module.active_adapters)
        total = total + (fisher[name].to(dtype) * delta**2).sum()
    value = strength / 2 * total
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    for n, p in params.items():
        p.data = kept[n]
    return value.detach(), {
        n: torch.zeros_like(params[n], dtype=dtype) if g is None else g
        for n, g in zip(params, grads, strict=True)
    }


CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "three adapters": {"adapters": 3},
    "rank-stabilised": {"use_rslora": True},
    "conv1d": {"kind": "gpt2", "targets": ("c_attn", "c_proj"), "fan_in_fan_out": True},
    "embedding": {"targets": ("embed_tokens", "lm_head")},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("storage", ["fp32", "u8log"])
def test_peft_models_are_recognised(case: str, storage: str) -> None:
    _, model = adapted(**CASES[case])
    fisher = base_fisher(model)
    if CASES[case].get("kind") == "gpt2":
        fisher.pop("lm_head.weight", None)
    ewc = EWC(model, fisher, strength=3.0, storage=storage)
    assert ewc.hold.lora
    stored = {h.name: h.fisher.decode() for h in ewc.hold.lora}
    assert set(stored) == set(deltas(model, fisher))
    truth, grads = dense(model, stored, 3.0, torch.float64)
    single, own = dense(model, stored, 3.0, torch.float32)
    value = ewc.penalty()
    assert_within(value.detach(), single, truth, ulps=32)
    value.backward()
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert_within(
                torch.zeros_like(p) if p.grad is None else p.grad,
                own[name],
                grads[name],
                ulps=32,
                name=name,
            )
        else:
            assert p.grad is None
    model.zero_grad()
    assert float(ewc.add_grad_(2.0)) == pytest.approx(float(truth), rel=1e-4)
    for name, p in model.named_parameters():
        if "lora_" in name and p.grad is not None:
            assert_within(p.grad, 2 * own[name], 2 * grads[name], ulps=32)
    drift = ewc.distance()
    # the frozen rest has not moved
    assert float(drift.total) == pytest.approx(float(truth) / 1.5, rel=1e-4)
    assert {n for n, v in drift.per_parameter.items() if float(v)} == set(stored)


def test_a_fisher_of_the_base_fits_by_hash_and_full_peft_names_do_too() -> None:
    base = causal_lm("llama")
    estimator = DiagonalFisher(base)
    estimator.update(torch.randint(3, 60, (2, 6)))
    fisher = estimator.finalize()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ewc = EWC(model, fisher, strength=1.0)
    assert len(ewc.hold.lora) == 2
    assert float(ewc.penalty()) == 0  # B starts at 0
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert len(EWC(model, {name: torch.rand(32, 32)}, strength=1.0).hold.lora) == 1
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    with pytest.raises(ValueError, match="hash"):
        EWC(model, fisher, strength=1.0)


def test_factors_named_themselves_and_saved_modules_are_plain_parameters() -> None:
    _, model = adapted(modules_to_save=["lm_head"])
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    ewc = EWC(model, {name: torch.ones(3, 32), "lm_head.weight": torch.ones(61, 32)}, strength=2.0)
    assert not ewc.hold.lora
    head = model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight")
    with torch.no_grad():
        head.add_(1.0)
        model.get_parameter(name).add_(1.0)
    assert float(ewc.penalty()) == pytest.approx(61 * 32 + 3 * 32, rel=1e-5)


def test_adamw_and_attach_pull_the_factors_back() -> None:
    for how in ("AdamWEWC", "attach"):
        torch.manual_seed(0)
        _, model = adapted()
        ewc = EWC(model, base_fisher(model), strength=10.0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = (
            AdamWEWC(trained, ewc=ewc, lr=1e-2)
            if how == "AdamWEWC"
            else torch.optim.AdamW(trained, lr=1e-2)
        )
        handle = None if how == "AdamWEWC" else ewc.attach(optimizer)
        start = float(ewc.distance().total)
        for _ in range(20):
            for p in trained:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert float(ewc.distance().total) < 0.5 * start
        assert float(optimizer.penalty if handle is None else handle.penalty) > 0
        refusals = (
            lambda e=ewc: e.prox_(1.0),
            lambda e=ewc, o=optimizer: e.attach(o, mode="prox"),
            lambda e=ewc, t=trained: AdamWEWC(t, ewc=e, mode="prox"),
        )
        for refused in refusals:
            with pytest.raises(ValueError, match="no closed form in A and B"):
                refused()


@pytest.mark.parametrize("uphill", [False, True])
@pytest.mark.parametrize("how", ["AdamWEWC", "attach"])
def test_factors_in_groups_of_their_own(how: str, uphill: bool) -> None:
    """LoRA+ gives B another learning rate: both factors' gradients are of the step's beginning."""
    ends, penalties = [], []
    for held in (True, False):
        torch.manual_seed(0)
        _, model = adapted()
        model.double()
        fisher = base_fisher(model)
        ewc = EWC(model, fisher, strength=10.0)
        factors = [[p for n, p in model.named_parameters() if f"lora_{x}" in n] for x in "AB"]
        groups = [
            {"params": factors[0], "lr": 1e-2, "maximize": uphill},
            {"params": factors[1], "lr": 16e-2},
        ]
        optimizer: Any = torch.optim.AdamW(groups)
        if held and how == "AdamWEWC":
            optimizer = AdamWEWC(groups, ewc=ewc)
        handle = ewc.attach(optimizer) if held and how == "attach" else None
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in factors[0] + factors[1]]).sum()
            value = ewc.penalty()
            if held:
                loss.backward()
            else:
                (loss + value).backward()
                for p in factors[0] if uphill else []:
                    p.grad = 2 * p.detach() - (p.grad - 2 * p.detach())
            optimizer.step()
            if held:
                got = optimizer.penalty if handle is None else handle.penalty
                assert float(got) == pytest.approx(float(value), rel=1e-12)
        ends.append([p.detach() for part in factors for p in part])
        penalties.append(float(ewc.penalty()))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=0)
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-10)


def test_consolidate_save_load_and_combine(tmp_path: Path) -> None:
    _, model = adapted(adapters=2)
    fisher = base_fisher(model)
    ewc = EWC(model, fisher, strength=2.0)
    both = EWC.combine([ewc, EWC(model, {n: 2 * f for n, f in fisher.items()}, strength=1.0)])
    assert float(both.penalty()) == pytest.approx(2 * float(ewc.penalty()), rel=1e-5)
    before = float(ewc.penalty())
    ewc.consolidate(fisher, decay=0.5)
    assert float(ewc.penalty()) < 1e-8 * before  # a difference of products: 0 but for rounding
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(2.0)
    moved = float(ewc.penalty())
    # delta W has doubled: it is one delta W from the anchor
    assert moved == pytest.approx(1.5 * before, rel=1e-4)
    ewc.save(tmp_path / "e.safetensors")
    assert float(EWC.load(tmp_path / "e.safetensors", model).penalty()) == pytest.approx(
        moved, rel=1e-6
    )
    twin = EWC(model, fisher, strength=1.0)
    twin.load_state_dict(ewc.state_dict())
    assert float(twin.penalty()) == pytest.approx(moved, rel=1e-6)
    with pytest.raises(ValueError, match="no low rank"):
        EWC.combine([ewc, ewc])


def test_what_is_refused_says_why() -> None:
    _, model = adapted(use_dora=True)
    with pytest.raises(ValueError, match=r"DoRA in .*rescales each row.*use_dora=False"):
        EWC(model, base_fisher(model), strength=1.0)
    _, model = adapted()
    fisher = base_fisher(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        EWC(model, fisher, strength=1.0)
    model.unmerge_adapter()
    model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    ).requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen.*trainable"):
        EWC(model, fisher, strength=1.0)


def test_no_dense_update_is_made() -> None:
    """The largest tensor that value and gradients of a 2048 x 2048 update make is of a factor's
    size.
    """
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, (tuple, list)) else (out,))
                if isinstance(t, Tensor) and t.dtype.is_floating_point
            )
            return out

    a, b, fisher = (
        torch.randn(4, 2048, requires_grad=True),
        torch.randn(2048, 4, requires_grad=True),
        torch.rand(2048, 2048),
    )
    with Watch():
        functional.lora_ewc_penalty(a, b, fisher, 1.0, 1.0).backward()
    assert sizes
    assert max(sizes) == 4 * 2048
