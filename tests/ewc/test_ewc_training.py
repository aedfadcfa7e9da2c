"""EWC in somebody's training: foreign optimizers, scalers, renamed parameters, drift by layer,
checkpoints.
"""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import EWC, AdamWEWC, DiagonalFisher, FisherEstimate
from tests.tools.models import TokenModel, causal_lm, ids


def held(strength: float = 2.0, **options: Any) -> tuple[Any, EWC, dict[str, Tensor]]:
    """A model moved from its anchor, and its Fisher."""
    model = TokenModel()
    fisher = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=strength, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, ewc, fisher


def pulls(
    model: nn.Module, ewc: EWC, fisher: dict[str, Tensor], strength: float
) -> dict[str, Tensor]:
    return {
        n: strength * fisher[n] * (p.detach() - ewc.anchor[n]) for n, p in model.named_parameters()
    }


# --- optimizers -----------------------------------------------------------------------------------


class ApexLike:
    """An optimizer of its own kind: param_groups, step(), zero_grad(), and no
    torch.optim.Optimizer.
    """

    def __init__(self, params: Any, lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": lr}]

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("kind", ["plain", "accelerate", "apex-like"])
def test_foreign_optimizers(kind: str, mode: str) -> None:
    model, ewc, fisher = held()
    optimizer: Any = (
        ApexLike(model.parameters(), 0.1)
        if kind == "apex-like"
        else torch.optim.SGD(model.parameters(), lr=0.1)
    )
    outer = optimizer
    if kind == "accelerate":
        accelerate = pytest.importorskip(
            "accelerate", reason="pip install accelerate, or fasttax's dev extra"
        )
        accelerate.state.GradientState._reset_state()  # another test's window of accumulation
        outer = accelerate.Accelerator(cpu=True).prepare(optimizer)
    before, pull = (
        {n: p.detach().clone() for n, p in model.named_parameters()},
        pulls(model, ewc, fisher, 2.0),
    )
    with ewc.attach(outer, mode=mode) as handle:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        outer.step()
        assert handle.steps == 1
    for n, p in model.named_parameters():
        moved = before[n] - 0.1 * (1 + (pull[n] if mode == "grad" else 0))
        if mode == "prox":
            moved = ewc.anchor[n] + (moved - ewc.anchor[n]) / (1 + 0.1 * 2.0 * fisher[n])
        torch.testing.assert_close(p.detach(), moved)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    outer.step()  # detached: a step without a gradient stays
    assert all(torch.equal(kept[n], p) for n, p in model.named_parameters())
    assert "step" not in vars(optimizer)


def test_maximize_is_pulled_to_the_anchor_too() -> None:
    model, ewc, fisher = held()
    before, pull = (
        {n: p.detach().clone() for n, p in model.named_parameters()},
        pulls(model, ewc, fisher, 2.0),
    )
    names = {id(p): n for n, p in model.named_parameters()}
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "maximize": True}, {"params": rest}], lr=0.1)
    with ewc.attach(optimizer):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), before[names[id(p)]] - 0.1 * pull[names[id(p)]])


@pytest.mark.parametrize("fused", [True, False])
def test_under_a_gradscaler_the_gradient_is_that_of_the_penalty(fused: bool) -> None:
    """Fused optimizers divide by the scale inside the step, others before it: the penalty meets
    either at its own size.
    """
    model, ewc, fisher = held()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, fused=fused) for m in (model, twin))
    pull = pulls(model, ewc, fisher, 2.0)
    scaler.scale(torch.zeros(()))
    for p, (n, q) in zip(model.parameters(), twin.named_parameters(), strict=True):
        p.grad = torch.full_like(p, 256.0)
        q.grad = 1 + pull[n]
    with ewc.attach(ours) as handle:
        scaler.step(ours)
        scaler.update()
    theirs.step()
    assert float(handle.penalty) > 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_attached_every_k_survives_a_checkpoint() -> None:
    def run(resume: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, ewc, _ = held()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = ewc.attach(optimizer, every=3)
        for step in range(7):
            if resume and step == 4:
                state = handle.state_dict()
                handle.remove()
                handle = ewc.attach(optimizer, every=3)
                handle.load_state_dict(state)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_a_trainers_checkpoint_resumes_bit_for_bit() -> None:
    """Model, AdamWEWC, EWC and handle through torch.save and weights_only=True, into fresh objects
    on a fresh model.
    """

    def fresh() -> tuple[nn.Module, EWC, AdamWEWC]:
        model = TokenModel()
        ewc = EWC(
            model,
            {n: torch.ones_like(p) for n, p in model.named_parameters()},
            strength=1.0,
            storage="u8log",
            anchor_dtype="bf16+8",
        )
        return model, ewc, AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode="prox")

    def train(model: nn.Module, optimizer: AdamWEWC, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(ids(2, 6, seed=step)).logits.square().mean().backward()
            optimizer.step()

    model, ewc, optimizer = fresh()
    ewc.consolidate({n: torch.rand(p.shape) for n, p in model.named_parameters()}, decay=0.5)
    ewc.strength = 7.0
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "ewc": ewc.state_dict(), "optimizer": optimizer.state_dict()},
        buffer,
    )
    train(model, optimizer, range(3, 6))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again, ewc_again, optimizer_again = fresh()
    again.load_state_dict(saved["model"])
    ewc_again.load_state_dict(saved["ewc"])
    optimizer_again.load_state_dict(saved["optimizer"])
    train(again, optimizer_again, range(3, 6))
    assert (ewc_again.strength, ewc_again.metadata) == (7.0, ewc.metadata)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=r"load_state_dict.*what EWC.state_dict\(\) gave"):
        ewc.load_state_dict({"strength": 1.0})
    wrong = copy.deepcopy(saved["ewc"])
    for part in ("fisher", "scales"):
        wrong["tensors"][f"{part}.ghost"] = wrong["tensors"].pop(f"{part}.up.bias")
    with pytest.raises(ValueError, match=r"(?s)2 differences.*ghost: not held.*up.bias: missing"):
        ewc.load_state_dict(wrong)


# --- one holder ----------------------------------------------------------------------------------


def test_a_second_holder_is_refused_and_names_the_first() -> None:
    """Whatever the two are, and whether or not they are one EWC; the parameters go free again."""
    model, ewc, fisher = held()
    other = EWC(model, {"up.weight": fisher["up.weight"]}, strength=1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    adamw = AdamWEWC(model.parameters(), ewc=ewc)
    twice = r"that {} holds, as .*count twice.*\.remove\(\).*EWC.combine"
    first = ewc.attach(sgd)
    for second in (ewc, other):
        with pytest.raises(ValueError, match=twice.format(r"EWC.attach\(SGD, mode='grad'\)")):
            second.attach(sgd, mode="prox")
        with pytest.raises(ValueError, match=twice.format("AdamWEWC")):
            second.attach(adamw)
        with pytest.raises(ValueError, match=r"during_backward.*count twice"):
            second.during_backward()
    first.remove()
    del adamw
    gc.collect()
    with (
        ewc.during_backward(),
        pytest.raises(ValueError, match=twice.format("EWC.during_backward")),
    ):
        other.attach(sgd)
    with ewc.attach(sgd), ewc.attach(torch.optim.SGD(model.parameters(), lr=0.1)):
        pass  # another optimizer's steps are other steps
    ewc.attach(sgd)
    del sgd  # and with the optimizer its holder goes
    gc.collect()
    ewc.during_backward().remove()


def test_parts_of_a_model_have_holders_of_their_own() -> None:
    model, _, fisher = held()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    up, down = (EWC(model, {n: fisher[n]}, strength=1.0) for n in ("up.weight", "down.weight"))
    with up.attach(sgd), down.attach(sgd, mode="prox"):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        sgd.step()


def test_the_two_proximal_steps_have_names_of_their_own() -> None:
    """Each is known by its name and by "prox" where it is at home; the other's says where to go."""
    model, ewc, _ = held()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    names = r"'grad' or 'prox_euclidean'.*AdamWEWC\(params, ewc=ewc, mode='prox_adam'\)"
    with pytest.raises(ValueError, match=names):
        ewc.attach(sgd, mode="prox_adam")
    names = r"'grad' or 'prox_adam'.*ewc\.attach\(.*mode='prox_euclidean'\)"
    with pytest.raises(ValueError, match=names):
        AdamWEWC(model.parameters(), ewc=ewc, mode="prox_euclidean")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ends: list[list[Tensor]] = []
    for mode in ("prox", "prox_euclidean"):
        twin, own = copy.deepcopy((model, ewc))
        step = torch.optim.SGD(twin.parameters(), lr=0.1)
        with own.attach(step, mode=mode):
            step.step()
        ends.append([p.detach() for p in twin.parameters()])
    for mode in ("prox", "prox_adam"):
        twin, own = copy.deepcopy((model, ewc))
        for p in twin.parameters():
            p.grad = torch.zeros_like(p)
        AdamWEWC(twin.parameters(), ewc=own, lr=0.1, mode=mode).step()
        ends.append([p.detach() for p in twin.parameters()])
    assert all(map(torch.equal, ends[0], ends[1]))
    assert all(map(torch.equal, ends[2], ends[3]))
    assert not any(map(torch.equal, ends[0], ends[2]))


# --- layouts -------------------------------------------------------------------------------------


class Laid(nn.Module):
    """A convolution, and a matrix that lies transposed (as GPT-2's checkpoints are turned)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3)
        self.turned = nn.Parameter(torch.randn(7, 6).T)


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("how", ["add_grad_", "scaled", "prox_", "penalty", "attach", "backward"])
def test_parameters_and_gradients_lie_as_they_like(how: str, offload: str | None) -> None:
    """channels_last and transposed ones get what contiguous ones get, and stay as they lie."""
    torch.manual_seed(0)
    laid = Laid()
    flat = copy.deepcopy(laid)
    flat.turned = nn.Parameter(laid.turned.detach().clone(memory_format=torch.contiguous_format))
    laid.to(memory_format=torch.channels_last)
    results = []
    for model in (laid, flat):
        model.conv.weight.data = model.conv.weight.data.contiguous(
            memory_format=torch.channels_last if model is laid else torch.contiguous_format
        )
        fisher = {n: torch.full(p.shape, 0.5) for n, p in model.named_parameters()}
        fisher["turned"] += torch.arange(42.0).view(6, 7)
        fisher["conv.weight"] += torch.arange(180.0).view(4, 5, 3, 3)
        anchor = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
        ewc = EWC(model, fisher, strength=2.0, anchor=anchor, offload=offload)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if how == "add_grad_":
            ewc.add_grad_(0.5)
        elif how == "scaled":
            ewc.add_grad_(torch.tensor(0.5))
        elif how == "prox_":
            ewc.prox_(0.1)
        elif how == "penalty":
            ewc.penalty().backward()
        elif how == "attach":
            with ewc.attach(optimizer):
                optimizer.step()
        else:
            with ewc.during_backward():
                torch.stack([p.square().sum() for p in model.parameters()]).sum().backward()
        results.append([t for p in model.parameters() for t in (p.detach(), p.grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert not laid.turned.is_contiguous()
    assert laid.conv.weight.is_contiguous(memory_format=torch.channels_last)


# --- fitting ---------------------------------------------------------------------------------


def test_renamed_parameters_and_modules() -> None:
    model, _, fisher = held()
    old = {
        n.replace("up.", "mlp.expand.").replace("head.bias", "final_bias"): f
        for n, f in fisher.items()
    }
    with pytest.raises(
        ValueError, match=r"(?s)mlp.expand.weight: not a parameter.*rename=\{old: new\}"
    ):
        EWC(model, old, strength=1.0)
    rename = {"mlp.expand": "up", "final_bias": "head.bias"}
    anchor = {n: torch.zeros_like(f) for n, f in old.items()}
    ewc = EWC(model, old, strength=2.0, rename=rename, anchor=anchor)
    assert torch.equal(ewc.fisher["up.bias"], fisher["up.bias"])
    assert float(ewc.penalty().detach()) == pytest.approx(
        sum(float((fisher[n] * p.detach() ** 2).sum()) for n, p in model.named_parameters()),
        rel=1e-5,
    )
    with pytest.raises(ValueError, match=r"rename.*'mlp.contract'"):
        EWC(model, old, strength=1.0, rename={**rename, "mlp.contract": "down"})
    with pytest.raises(ValueError, match=r"\(renamed to upward.weight\)"):
        EWC(model, old, strength=1.0, rename={**rename, "mlp.expand": "upward"})
    with pytest.raises(TypeError, match=r"rename.*mapping"):
        EWC(model, old, strength=1.0, rename=["up"])


def test_a_hashed_fisher_fits_renamed_and_wrapped_models() -> None:
    model = TokenModel()
    estimator = DiagonalFisher(model)
    estimator.update(ids(2, 5))
    fisher = estimator.finalize()
    wrapped = torch.compile(model, backend="eager")
    assert float(EWC(wrapped, fisher, strength=1.0).penalty().detach()) == 0
    model.lift = model.up
    del model.up
    with pytest.raises(ValueError, match=r"up\.weight: not a parameter"):
        EWC(model, fisher, strength=1.0)
    ewc = EWC(model, fisher, strength=1.0, rename={"up": "lift"})
    assert "lift.weight" in ewc.parameters()


def test_parameters_added_later_are_free() -> None:
    model, ewc, _ = held()
    value = float(ewc.penalty().detach())
    model.value_head = nn.Linear(16, 1)
    assert float(ewc.penalty().detach()) == value
    ewc.add_grad_()
    assert model.value_head.weight.grad is None
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2)
    model.value_head.weight.grad = torch.ones_like(model.value_head.weight)
    before = model.value_head.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(
        model.value_head.weight.detach(), before * (1 - 1e-4) - 1e-2, rtol=1e-4, atol=1e-6
    )


def test_anchor_dtypes_by_name() -> None:
    for dtype, bound in (
        ("fp32", 0.0),
        ("bf16", 2.0**-8),
        ("bf16+8", 1.6e-5),
        (torch.float16, 2.0**-10),
    ):
        torch.manual_seed(0)
        model, ewc, _ = held(anchor_dtype=dtype)
        fresh = TokenModel()
        for n, p in fresh.named_parameters():
            torch.testing.assert_close(
                ewc.anchor[n].float(),
                p.detach(),
                rtol=bound,
                atol=1e-7 if dtype == torch.float16 else 0.0,
            )
    with pytest.raises(ValueError, match=r"anchor_dtype.*'bf16\+8'.*'int4'"):
        EWC(model, {"up.bias": torch.ones(20)}, strength=1.0, anchor_dtype="int4")


# --- looking --------------------------------------------------------------------------------------


def test_drift_by_module_layer_and_share() -> None:
    model = causal_lm("llama")
    fisher = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=1.0)
    assert all(float(v) == 0 for v in ewc.distance().share.values())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1.0)
        model.model.norm.weight.add_(2.0)
    drift = ewc.distance()
    layer, norm = (
        float(fisher["model.layers.1.mlp.up_proj.weight"].sum()),
        4 * float(fisher["model.norm.weight"].sum()),
    )
    assert float(drift.total) == pytest.approx(layer + norm, rel=1e-5)
    assert float(drift.per_module["model.layers.1.mlp.up_proj"]) == pytest.approx(layer, rel=1e-5)
    assert float(drift.per_layer["model.layers.1"]) == pytest.approx(layer, rel=1e-5)
    assert {n for n, v in drift.share.items() if float(v) > 0} == {"model.layers.1", "model.norm"}
    assert float(drift.share["model.norm"]) == pytest.approx(norm / (layer + norm), rel=1e-5)
    assert float(sum(drift.share.values())) == pytest.approx(1.0, rel=1e-6)


def test_consolidated_and_combined_ewcs_carry_the_hash_of_their_anchor() -> None:
    """What was consolidated is a Fisher at a known place: it fits there, and nowhere else."""
    model = TokenModel()

    def estimate(seed: int) -> FisherEstimate:
        estimator = DiagonalFisher(model)
        estimator.update(ids(2, 5, seed=seed))
        return estimator.finalize()

    ewc = EWC(model, estimate(1), strength=1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ewc.consolidate(estimate(2))
    assert ewc.metadata["consolidated"] == 2
    assert ewc.metadata["examples"] == 4
    again = EWC(model, ewc.fisher, strength=1.0)  # right after: the anchor is where the model is
    assert float(again.penalty().detach()) == 0
    with torch.no_grad():
        model.up.weight.add_(1.0)
    with pytest.raises(ValueError, match="hash"):
        EWC(model, ewc.fisher, strength=1.0)
    assert float(EWC(model, ewc.fisher, strength=1.0, anchor=ewc.anchor).penalty().detach()) > 0
    both = EWC.combine([ewc, again])
    torch.testing.assert_close(
        EWC(model, both.fisher, strength=1.0, anchor=both.anchor).penalty(), both.penalty()
    )


@pytest.mark.parametrize("how", ["add_grad_", "attach", "during_backward"])
def test_a_sparse_gradient_is_refused_by_name(how: str) -> None:
    def of(sparse: bool) -> tuple[torch.nn.Embedding, EWC]:
        model = torch.nn.Embedding(5, 3, sparse=sparse)
        return model, EWC(model, {"weight": torch.ones(5, 3)}, strength=2.0)

    def used(model: torch.nn.Embedding, ewc: EWC) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if how == "during_backward":
            ewc.during_backward()
        model(torch.tensor([1, 2])).sum().backward()
        if how == "add_grad_":
            ewc.add_grad_()
        if how == "attach":
            ewc.attach(optimizer)
            optimizer.step()

    with pytest.raises(ValueError, match=r"the gradient of weight: .*dense.*sparse=False"):
        used(*of(sparse=True))
    used(*of(sparse=False))


def test_strength_and_storage_are_checked_when_they_are_set() -> None:
    ewc = EWC(torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, strength=1.0)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength: expected a finite number >= 0"):
            ewc.strength = strength
    with pytest.raises(ValueError, match="storage: expected one of 'fp32', 'bf16', 'u8log'"):
        ewc.storage = "int8"
    assert (ewc.strength, ewc.storage) == (1.0, "fp32")
