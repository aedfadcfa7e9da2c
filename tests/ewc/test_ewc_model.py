"""EWC on a model: its formula, attach, several tasks, files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import EWC, DiagonalFisher, FisherEstimate
from tests.tools.models import TokenModel, ids
from tests.tools.models import ewc_compose as compose
from tests.tools.utils import assert_says, assert_within


def model_and_fisher(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    model = TokenModel().to(dtype)
    return model, {
        n: torch.rand(p.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for n, p in model.named_parameters()
    }


def nudge(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_object_is_its_formula(
    dtype: torch.dtype, storage: str, offload: str | None, simd: int
) -> None:
    """Against autograd over the Fisher as stored; test_estimate bounds what storage loses."""
    model, fisher = model_and_fisher(dtype)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=3.0, storage=storage, offload=offload)
    assert float(ewc.penalty()) == 0.0
    nudge(model)
    names = list(fisher)
    stored, params = [ewc.fisher[n] for n in names], dict(model.named_parameters())
    truth, pulls = compose(
        [params[n] for n in names], [anchor[n] for n in names], stored, 3.0, torch.float64
    )
    single, own = compose(
        [params[n] for n in names], [anchor[n] for n in names], stored, 3.0, torch.float32
    )
    value = ewc.penalty()
    assert_within(value.detach(), single.to(value.dtype), truth)
    for n, got, o, t in zip(
        names, torch.autograd.grad(value, [params[n] for n in names]), own, pulls, strict=True
    ):
        assert_within(got, o.to(dtype), t, ulps=8)
        params[n].grad = torch.ones_like(params[n]) if n.startswith("up") else None
    returned = ewc.add_grad_(scale=2.0)
    # the scale is the gradient's alone
    assert float(returned) == pytest.approx(float(truth), rel=1e-5)
    for n, t in zip(names, pulls, strict=True):
        assert_within(
            params[n].grad,
            ((1.0 if n.startswith("up") else 0.0) + 2 * t).to(dtype),
            (1.0 if n.startswith("up") else 0.0) + 2 * t,
            ulps=8,
        )
    drift = ewc.distance()
    assert float(drift.total) == pytest.approx(float(truth) / 1.5, rel=1e-5)
    assert float(sum(drift.per_parameter.values())) == pytest.approx(float(drift.total), rel=1e-5)
    ewc.prox_(1e12)  # strength 3e12: an explicit step would explode
    for n, f in zip(names, stored, strict=True):
        held = f > 1e-6
        assert bool(torch.isfinite(params[n]).all())
        torch.testing.assert_close(
            params[n].detach()[held],
            anchor[n][held],
            rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-6,
        )


def test_anchor_is_a_copy_and_frozen_parameters_cost_nothing() -> None:
    model, fisher = model_and_fisher()
    given = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=1.0, anchor=given)
    for tensor in (*given.values(), *fisher.values()):
        tensor.fill_(7.0)
    assert float(ewc.penalty()) == 0.0
    nudge(model)
    full = float(ewc.penalty())
    model.head.requires_grad_(False)
    assert 0 < float(ewc.penalty()) < full
    ewc.add_grad_()
    assert model.head.weight.grad is None
    kept = model.head.weight.clone()
    ewc.prox_(1.0)
    assert torch.equal(model.head.weight, kept)
    assert ewc.distance().per_parameter["head.weight"] > 0  # still reported


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fisher_of_ones_own_tensors_is_a_copy(storage: str, mode: type[torch.no_grad]) -> None:
    model = nn.Linear(3, 2)
    with mode():
        fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
        anchor = {name: p + 1 for name, p in model.named_parameters()}
        ewc = EWC(model, fisher, strength=1.0, storage=storage, anchor=anchor)
        before = ewc.penalty()
        for t in fisher.values():
            t.zero_()  # the next task's sums
    ewc.penalty().backward()
    assert ewc.penalty() == before > 0
    assert model.weight.grad is not None


def test_an_anchor_that_is_not_finite_is_named() -> None:
    model = nn.Linear(3, 2)
    fisher = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for bad in (math.nan, math.inf):
        anchor = {**model.state_dict(), "bias": torch.tensor([0.0, bad])}
        with pytest.raises(ValueError, match="anchor: expected finite values, got others in bias"):
            EWC(model, fisher, strength=1.0, anchor=anchor)
    narrow = {name: p.to(torch.float8_e4m3fn) for name, p in model.state_dict().items()}
    held = EWC(model, fisher, strength=1.0, anchor=narrow).anchor["weight"]
    assert torch.equal(held, narrow["weight"].float())


def test_tied_weights_count_once_and_missing_ones_stay_free() -> None:
    model = TokenModel(tied=True)
    ewc = EWC(model, {"head.weight": torch.ones_like(model.head.weight)}, strength=2.0)
    with torch.no_grad():
        model.embed.weight += 1
    assert float(ewc.penalty()) == pytest.approx(model.embed.weight.numel(), rel=1e-4)
    ewc.add_grad_()
    assert model.up.weight.grad is None
    both = {n: torch.ones_like(model.head.weight) for n in ("head.weight", "embed.weight")}
    with pytest.raises(ValueError, match=r"tied.*embed.weight|tied.*head.weight"):
        EWC(model, both, strength=1.0)


def test_all_differences_come_in_one_error() -> None:
    model, fisher = model_and_fisher()
    fisher["up.weight"] = fisher["up.weight"].T
    fisher["ghost"] = fisher.pop("up.bias")
    with pytest.raises(ValueError) as caught:
        EWC(model, fisher, strength=1.0)
    assert all(
        w in str(caught.value)
        for w in ("ghost", "up.weight", "(16, 20)", "(20, 16)", "2 differences")
    )
    model, fisher = model_and_fisher()
    with pytest.raises(ValueError, match=r"(?s)anchor.*missing"):
        EWC(model, fisher, strength=1.0, anchor={"up.weight": model.up.weight})


OBJECT: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "negative strength": ({"strength": -1.0}, ValueError, ("EWC", "strength", ">= 0")),
    "NaN strength": ({"strength": float("nan")}, ValueError, ("EWC", "strength", "finite")),
    "storage": ({"storage": "fp8"}, ValueError, ("storage", "'u8log'", "'fp8'")),
    "offload": ({"offload": "disk"}, ValueError, ("offload", "'cpu'", "'disk'")),
    "normalize": ({"normalize": "sum"}, ValueError, ("normalize", "'mean'", "'max'", "'sum'")),
    "clamp": ({"clamp": (1.0, 2.0, 3.0)}, ValueError, ("clamp", "(low, high)")),
    "anchor_dtype": ({"anchor_dtype": torch.int8}, ValueError, ("anchor_dtype", "int8")),
    "anchor_dtypes": ({"anchor_dtype": ["bf16"]}, ValueError, ("anchor_dtype", "['bf16']")),
    "no file": (
        {"fisher": "/nowhere/f.safetensors"},
        FileNotFoundError,
        ("/nowhere/f.safetensors", ".save()"),
    ),
    "list": ({"fisher": [1]}, TypeError, ("fisher", "mapping")),
    "empty": ({"fisher": {}}, ValueError, ("fisher", "at least one")),
    "no module": ({"model": 3}, TypeError, ("model", "torch.nn.Module")),
    "NaN Fisher": (
        {"fisher": {"up.bias": torch.full((20,), float("nan"))}},
        ValueError,
        ("fisher", "finite values >= 0", "up.bias"),
    ),
    "negative Fisher": (
        {"fisher": {"up.bias": -torch.ones(20)}},
        ValueError,
        ("fisher", ">= 0", "up.bias"),
    ),
    "zero Fisher": (
        {"fisher": {"up.bias": torch.zeros(20)}, "normalize": "mean"},
        ValueError,
        ("normalize", "normalize=None"),
    ),
}


@pytest.mark.parametrize("case", OBJECT)
def test_wrong_objects_say_what_to_do(case: str) -> None:
    changes, error, words = OBJECT[case]
    model, fisher = model_and_fisher()
    arguments: dict[str, Any] = {"model": model, "fisher": fisher, "strength": 1.0, **changes}
    assert_says(
        lambda: EWC(arguments.pop("model"), arguments.pop("fisher"), **arguments), error, words
    )


def test_clamp_and_normalize() -> None:
    model, fisher = model_and_fisher()
    clamped = EWC(model, fisher, strength=1.0, clamp=(0.25, 0.5)).fisher
    assert all(torch.equal(clamped[n], fisher[n].clamp(0.25, 0.5)) for n in fisher)
    everything = torch.cat([f.flatten() for f in fisher.values()])
    for how, divisor in (("mean", everything.mean()), ("max", everything.max())):
        scaled = EWC(model, fisher, strength=1.0, normalize=how).fisher
        torch.testing.assert_close(
            torch.cat([scaled[n].flatten() for n in fisher]),
            everything / divisor,
            rtol=1e-6,
            atol=0,
        )


def test_hash_of_another_model_is_refused_with_a_way_out() -> None:
    model = TokenModel()
    estimator = DiagonalFisher(model)
    estimator.update(ids(2, 5))
    fisher = estimator.finalize()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    nudge(model)
    with pytest.raises(ValueError, match=r"hash.*anchor=.*dict\(fisher\)"):
        EWC(model, fisher, strength=1.0)
    assert float(EWC(model, fisher, strength=1.0, anchor=base).penalty()) > 0
    assert float(EWC(model, dict(fisher), strength=1.0).penalty()) == 0


# --- attach ---------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_attach(mode: str, wrapped: bool, every: int) -> None:
    """Against the same steps written out: every k-th step, with k times the weight."""
    model, fisher = model_and_fisher(torch.float64)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=2.0)
    nudge(model)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = ewc.attach(
        Wrapper(Wrapper(optimizer)) if wrapped else optimizer, mode=mode, every=every
    )
    for step in range(1, 8):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        if step == 7:
            handle.remove()
            handle.remove()
        optimizer.step()
        weight = 2.0 * every if step % every == 0 and step < 7 else 0.0
        for n, t in expected.items():
            pull = weight * fisher[n] * (t - anchor[n]) if mode == "grad" else 0.0
            t -= 0.05 * (0.1 + pull)
            if mode == "prox":
                t.copy_(anchor[n] + (t - anchor[n]) / (1 + 0.05 * weight * fisher[n]))
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-12, atol=1e-14)


def test_attach_as_context_and_refusals() -> None:
    model, fisher = model_and_fisher()
    ewc = EWC(model, fisher, strength=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ewc.attach(optimizer) as handle:
        nudge(model)
        optimizer.step()
        assert float(handle.penalty) > 0
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match=r"holds none of them.*model being trained"):
        ewc.attach(torch.optim.SGD(TokenModel().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer.*add_grad_"):
        ewc.attach("adam")
    for bad in ({"mode": "both"}, {"every": 0}, {"every": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ewc.attach(optimizer, **bad)


def test_attach_refuses_a_closure_that_would_lose_the_gradient() -> None:
    model, fisher = model_and_fisher()
    ewc = EWC(model, fisher, strength=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ewc.attach(optimizer), pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: torch.zeros(()))


# --- several tasks --------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, dtype=torch.float64))


def test_two_orthogonal_tasks_reach_the_joint_optimum() -> None:
    """Linear-Gaussian tasks with orthogonal columns: F = diag(X^T X) is the whole Hessian, so EWC
    loses nothing.
    """
    q = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))[0]
    xs = [
        q[:20] @ torch.linalg.inv(torch.linalg.cholesky(q[:20].T @ q[:20]).T),
        q[20:] @ torch.linalg.inv(torch.linalg.cholesky(q[20:].T @ q[20:]).T),
    ]
    xs = [x * (torch.rand(6, dtype=torch.float64) + 0.5) for x in xs]
    ys = [torch.randn(20, dtype=torch.float64) for _ in xs]
    fishers = [(x * x).sum(0) for x in xs]
    best = [x.T @ y / f for x, y, f in zip(xs, ys, fishers, strict=True)]
    joint = (xs[0].T @ ys[0] + xs[1].T @ ys[1]) / (fishers[0] + fishers[1])
    model = Line()
    with torch.no_grad():
        model.w.copy_(best[0])
    ewc = EWC(model, {"w": fishers[0]}, strength=1.0)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-13,
        tolerance_change=0,
        max_iter=200,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * ((xs[1] @ model.w - ys[1]) ** 2).sum() + ewc.penalty()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model.w.detach(), joint, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        model.w.copy_(best[1])
    other = EWC(model, {"w": fishers[1]}, strength=1.0)
    torch.testing.assert_close(EWC.combine([ewc, other]).anchor["w"], joint, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_combine_has_the_gradient_of_the_sum(storage: str) -> None:
    model, fisher = model_and_fisher()
    fisher["up.bias"].zero_()
    ewcs = [EWC(model, fisher, strength=2.0, storage="fp32")]
    for seed, strength in ((1, 0.5), (2, 3.0)):
        nudge(model, seed)
        ewcs.append(EWC(model, {n: f.roll(seed) for n, f in fisher.items()}, strength=strength))
    ewcs[0].storage = storage
    combined = EWC.combine(ewcs)
    nudge(model, 3)
    names = list(fisher)
    params = [dict(model.named_parameters())[n] for n in names]
    truth = torch.autograd.grad(sum(e.penalty() for e in ewcs), params)
    for got, expected in zip(torch.autograd.grad(combined.penalty(), params), truth, strict=True):
        torch.testing.assert_close(
            got,
            expected,
            rtol=1e-4 if storage == "fp32" else 2**-7,
            atol=1e-4 if storage == "fp32" else 1e-2,
        )
    nothing: tuple[Any, ...] = ([], None, 3)
    for given in nothing:
        with pytest.raises(TypeError, match="non-empty list"):
            EWC.combine(given)
    with pytest.raises(ValueError, match="same parameters"):
        EWC.combine([ewcs[0], EWC(*model_and_fisher(), strength=1.0)])


def test_consolidate_is_online_ewc() -> None:
    model, fisher = model_and_fisher(torch.float64)
    ewc = EWC(model, fisher, strength=2.0)
    nudge(model)
    here = {n: p.detach().clone() for n, p in model.named_parameters()}
    new = {n: torch.rand_like(f) for n, f in fisher.items()}
    ewc.consolidate(new, decay=0.5)
    assert float(ewc.penalty()) == 0.0
    nudge(model, 1)
    for n in fisher:
        torch.testing.assert_close(ewc.fisher[n], 0.5 * fisher[n] + new[n], rtol=1e-14, atol=0)
        assert torch.equal(ewc.anchor[n], here[n])
    for bad, word in (
        ({n: f for n, f in new.items() if n != "up.bias"}, "up.bias"),
        ({**new, "ghost": torch.ones(2)}, "ghost"),
    ):
        with pytest.raises(ValueError, match=word):
            ewc.consolidate(bad)


def test_consolidate_refuses_a_fisher_from_elsewhere() -> None:
    model = TokenModel()
    estimator = DiagonalFisher(model)
    estimator.update(ids(2, 5))
    ewc = EWC(model, estimator.finalize(), strength=1.0)
    nudge(model)
    with pytest.raises(ValueError, match="hash"):
        ewc.consolidate(estimator.finalize())


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
def test_save_and_load(storage: str, tmp_path: Path) -> None:
    model, fisher = model_and_fisher()
    ewc = EWC(model, fisher, strength=2.5, storage=storage)
    nudge(model)
    ewc.save(tmp_path / "e.safetensors")
    again = EWC.load(tmp_path / "e.safetensors", model)
    assert (again.strength, again.storage) == (2.5, storage)
    assert torch.equal(again.penalty(), ewc.penalty())
    assert os.listdir(tmp_path) == ["e.safetensors"]
    FisherEstimate(fisher).save(tmp_path / "f.safetensors")
    assert torch.equal(
        EWC(model, tmp_path / "f.safetensors", strength=1.0).fisher["up.bias"], fisher["up.bias"]
    )


def test_bad_files_are_clear_errors(tmp_path: Path) -> None:
    model, fisher = model_and_fisher()
    path = tmp_path / "e.safetensors"
    EWC(model, fisher, strength=1.0).save(path)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            EWC.load(path, model)
    value = model.up.bias.detach().numpy().tobytes()
    at = whole.index(value)  # the anchor's bytes
    path.write_bytes(whole[:at] + bytes(b ^ 0xFF for b in value) + whole[at + len(value) :])
    with pytest.raises(ValueError, match=r"hash|damaged"):
        EWC.load(path, model)
    value = fisher["up.bias"].numpy().tobytes()
    at = whole.index(value)
    path.write_bytes(whole[:at] + b"\xff" * len(value) + whole[at + len(value) :])  # NaN
    with pytest.raises(ValueError, match=r"damaged|finite"):
        EWC.load(path, model)
    FisherEstimate(fisher).save(path)
    with pytest.raises(ValueError, match=r"not an? EWC file"):
        EWC.load(path, model)
    path.write_bytes(whole)
    model.up = nn.Linear(16, 21)
    with pytest.raises(ValueError, match=r"up.weight: shape"):
        EWC.load(path, model)


def test_crash_during_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fisher = model_and_fisher()
    path = tmp_path / "e.safetensors"
    EWC(model, fisher, strength=1.0).save(path)
    old = path.read_bytes()

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            EWC(model, fisher, strength=2.0).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_an_anchor_is_tensors_by_name() -> None:
    model, fisher = model_and_fisher()
    for wrong in ("anchor.safetensors", list(model.parameters())):
        with pytest.raises(TypeError, match=r"(?s)EWC: anchor: expected a mapping.*load_file"):
            EWC(model, fisher, strength=1.0, anchor=wrong)
    numbers = {n: p.detach().numpy() for n, p in model.named_parameters()}
    with pytest.raises(TypeError, match=r"EWC: anchor\['.*'\]: expected a torch.Tensor"):
        EWC(model, fisher, strength=1.0, anchor=numbers)


def test_a_model_without_values_has_no_anchor() -> None:
    model, fisher = model_and_fisher()
    with pytest.raises(ValueError, match=r"EWC: model: expected parameters that hold values.*meta"):
        EWC(model.to("meta"), fisher, strength=1.0)


def test_a_file_of_another_kind_says_what_reads_it(tmp_path: Path) -> None:
    model, fisher = model_and_fisher()
    FisherEstimate(fisher).save(tmp_path / "f")
    EWC(model, fisher, strength=1.0).save(tmp_path / "e")
    with pytest.raises(ValueError, match=r"not an EWC file.*read by FisherEstimate.load.* EWC\("):
        EWC.load(tmp_path / "f", model)
    with pytest.raises(ValueError, match=r"not a FisherEstimate file.*read by EWC.load\(path, mod"):
        EWC(model, tmp_path / "e", strength=1.0)
