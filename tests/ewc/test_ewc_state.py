"""An EWC's state: what torch.load reads, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC


class LM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.h(self.e(input_ids))
        return out


def made(**options: Any) -> tuple[LM, EWC]:
    torch.manual_seed(0)
    model = LM().eval()
    ids = torch.randint(0, 20, (2, 6))
    fisher = fasttax.estimate_fisher(model, [ids], progress=False, labels="true")
    ewc = EWC(model, fisher, strength=2.0, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model, ewc


FORMS = [
    {},
    {"storage": "u8log", "anchor_dtype": "bf16+8"},
    {"storage": "bf16", "anchor_dtype": "bf16", "offload": "cpu"},
]


@pytest.mark.parametrize("options", FORMS)
def test_torch_load_reads_it_with_weights_only(options: dict[str, Any]) -> None:
    model, ewc = made(**options)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "ewc": ewc.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["ewc"]
    _, other = made(**options)
    other.strength = 7.0
    other.load_state_dict(state)
    assert float(other.penalty().detach()) == float(ewc.penalty().detach())
    assert other.metadata == state["metadata"]


def spoil(state: dict[str, Any], name: str, value: float) -> None:
    state["tensors"][name].view(-1)[0] = value


def drop(state: dict[str, Any], name: str) -> None:
    del state["tensors"][name]


def reshape(state: dict[str, Any], name: str) -> None:
    state["tensors"][name] = state["tensors"][name].flatten()


def convert(state: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    state["tensors"][name] = state["tensors"][name].to(dtype)


INF = float("inf")
WRONG: dict[str, Any] = {
    "NaN in the Fisher": lambda s: spoil(s, "fisher.e.weight", float("nan")),
    "negative Fisher": lambda s: spoil(s, "fisher.h.bias", -1.0),
    "infinite Fisher": lambda s: spoil(s, "fisher.h.bias", INF),
    "NaN in the anchor": lambda s: spoil(s, "anchor.h.weight", float("nan")),
    "infinite anchor": lambda s: spoil(s, "anchor.h.weight", -INF),
    "no anchor": lambda s: drop(s, "anchor.h.weight"),
    "no Fisher": lambda s: drop(s, "fisher.h.weight"),
    "anchor of another shape": lambda s: reshape(s, "anchor.h.weight"),
    "Fisher of another shape": lambda s: reshape(s, "fisher.h.weight"),
    "anchor of integers": lambda s: convert(s, "anchor.h.weight", torch.int64),
    "Fisher of integers": lambda s: convert(s, "fisher.h.weight", torch.int32),
    "anchor in float64": lambda s: convert(s, "anchor.h.weight", torch.float64),
    "Fisher in float64": lambda s: convert(s, "fisher.h.weight", torch.float64),
    "codes without scales": lambda s: convert(s, "fisher.h.weight", torch.uint8),
    "bytes that are no anchor": lambda s: convert(s, "anchor.h.weight", torch.uint8),
    "no strength": lambda s: s.pop("strength"),
    "negative strength": lambda s: s.update(strength=-1.0),
    "NaN strength": lambda s: s.update(strength=float("nan")),
    "text for strength": lambda s: s.update(strength="much"),
    "another storage": lambda s: s.update(storage="int4"),
    "another anchor_dtype": lambda s: s.update(anchor_dtype="int4"),
    "metadata of no kind": lambda s: s.update(metadata=3),
    "tensors of no kind": lambda s: s.update(tensors=[1]),
    "a list among tensors": lambda s: s["tensors"].update({"fisher.h.bias": [1.0]}),
}


def facts(ewc: EWC) -> list[Any]:
    tensors = [*ewc.anchor.values(), *dict(ewc.fisher).values()]
    return [ewc.strength, ewc.storage, dict(ewc.metadata), *(t.clone() for t in tensors)]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_state_is_refused_and_changes_nothing(what: str) -> None:
    _, ewc = made()
    state = ewc.state_dict()
    state["strength"] = 5.0
    before = facts(ewc)
    WRONG[what](state)
    with pytest.raises((ValueError, TypeError), match=r"EWC\.load_state_dict"):
        ewc.load_state_dict(state)
    assert all(map(same, before, facts(ewc)))


@pytest.mark.parametrize("name", ["scales.h.weight", "anchor.h.weight"])
def test_u8log_and_split_anchors_are_looked_at(name: str) -> None:
    _, ewc = made(storage="u8log", anchor_dtype="bf16+8")
    before = facts(ewc)
    for spoiled in ("cut", "nan", "gone"):
        state = ewc.state_dict()
        t = state["tensors"][name]
        if spoiled == "cut":
            state["tensors"][name] = t[:-1].clone()
        elif spoiled == "nan":
            t.view(-1)[:2] = float("nan") if t.is_floating_point() else 0xFF
        else:
            del state["tensors"][name]
        with pytest.raises(ValueError, match=r"EWC\.load_state_dict"):
            ewc.load_state_dict(state)
        assert all(map(same, before, facts(ewc)))


def test_a_state_of_another_model_names_the_differences() -> None:
    _, ewc = made()
    model = nn.Linear(3, 3)
    other = EWC(model, {"weight": torch.ones(3, 3)}, strength=1.0)
    with pytest.raises(ValueError, match=r"e\.weight: not held here"):
        other.load_state_dict(ewc.state_dict())


# --- other defaults ----------------------------------------------------------------------------


def run(form: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that EWC computes, of a model and Fisher that are given."""
    g = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float32, device="cpu")

    model = nn.Linear(40, 7, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape))
    fisher = {n: draw(*p.shape) ** 2 for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=2.0, **form)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(draw(*p.shape) * 0.01)
    out = {"penalty": ewc.penalty().detach(), "added": ewc.add_grad_()}
    out |= {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    out |= {f"anchor {n}": a for n, a in ewc.anchor.items()}
    out |= {f"fisher {n}": f for n, f in ewc.fisher.items()}
    out |= {f"drift {n}": d for n, d in ewc.distance().share.items()}
    for mode in ("grad", "prox_adam"):
        optimizer = fasttax.AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode=mode)
        optimizer.step()
        out |= {f"{mode} {n}": p.detach().clone() for n, p in model.named_parameters()}
        del optimizer
    ewc.prox_(0.1)
    out |= {f"prox {n}": p.detach().clone() for n, p in model.named_parameters()}
    out["combined"] = EWC.combine([ewc, ewc]).penalty().detach()
    ewc.consolidate(fisher)
    ewc.load_state_dict(ewc.state_dict())
    out |= {f"consolidated {n}": f for n, f in ewc.fisher.items()}
    return out


@pytest.mark.parametrize("form", FORMS)
def test_no_default_dtype_or_device_changes_a_bit(form: dict[str, Any]) -> None:
    truth = run(form)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            got = run(form)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(got[k], truth[k]) and got[k].dtype == truth[k].dtype for k in truth)
    with torch.device("meta"):
        got = run(form)
    assert all(torch.equal(got[k], truth[k]) for k in truth)
