"""EWC in DeepSpeed's engine: once a step, whatever the accumulation and the ZeRO stage.

The engines here have DeepSpeed's names and its order of calls, and nothing else: DeepSpeed's own
run in test_launchers.py, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fasttax
from fasttax.fisher.kronecker import KroneckerEstimate
from fasttax.integrations import deepspeed
from tests.tools.processes import on_ranks

STRENGTH = 3.0


def model() -> Any:
    """Sizes that two ranks do not divide, one smaller than their number."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def held(made: nn.Module, **options: Any) -> Any:
    fisher, anchor = {}, {}
    for i, (name, p) in enumerate(made.named_parameters()):
        generator = torch.Generator().manual_seed(i)
        fisher[name] = torch.rand(p.shape, generator=generator)
        anchor[name] = p.detach() + 0.1
    return fasttax.EWC(made, fisher, strength=STRENGTH, anchor=anchor, **options)


def rows(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


class Engine:
    """Whole parameters, gradients averaged over the window, a step of SGD at its end."""

    def __init__(self, module: nn.Module, window: int = 2) -> None:
        self.module, self.window, self.micro = module, window, 0

    def zero_optimization_stage(self) -> int:
        return 2

    def gradient_accumulation_steps(self) -> int:
        return self.window

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro + 1) % self.window == 0

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Its signature is hidden, as DeepSpeed's decorators hide it."""
        (loss,) = args
        loss = loss / self.window if kwargs.get("scale_wrt_gas", True) else loss
        loss.backward()
        return loss

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            with torch.no_grad():
                for p in self.module.parameters():
                    p.sub_(0.1 * p.grad)
            self.module.zero_grad()
        self.micro += 1


def trained(divide: bool) -> tuple[nn.Module, nn.Module]:
    """Two windows by the engine, and by hand with the penalty once a window."""
    ours, wanted = model(), model()
    engine, ewc = Engine(ours), held(wanted)
    with deepspeed.attach(engine, held(ours)) as handle:
        for i in range(4):
            loss = ours(rows(i)).square().mean()
            engine.backward(loss if divide else loss / 2, scale_wrt_gas=divide)
            engine.step()
        assert float(handle.penalty()) == pytest.approx(
            STRENGTH / 2 * float(handle.distance().total)
        )
    for first in (0, 2):
        parts = [wanted(rows(i)).square().mean() / 2 for i in (first, first + 1)]
        (sum(parts) + ewc.penalty()).backward()
        Engine(wanted, 1).step()
    return ours, wanted


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


@pytest.mark.parametrize("divide", [True, False], ids=["divided", "scale_wrt_gas=False"])
def test_the_penalty_counts_once_a_window(divide: bool) -> None:
    ours, wanted = trained(divide)
    assert difference(ours, wanted) < 1e-6
    assert difference(ours, model()) > 0.05


def test_undo_gives_the_engine_back() -> None:
    engine = Engine(model())
    own = vars(engine).copy()
    handle = deepspeed.attach(engine, held(engine.module))
    assert "backward" in vars(engine)
    handle.undo()
    assert vars(engine) == own


def test_a_window_without_the_engines_backward_is_an_error() -> None:
    engine = Engine(model(), window=1)
    deepspeed.attach(engine, held(engine.module))
    engine.module(rows(0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call engine.backward\(loss\), not loss.backward"):
        engine.step()


def test_a_second_holder_and_strangers_are_refused() -> None:
    engine = Engine(model())
    ewc = held(engine.module)
    with (
        deepspeed.attach(engine, ewc),
        pytest.raises(ValueError, match=r"ewc: .*that deepspeed.attach\(ZeRO-2\) holds"),
    ):
        deepspeed.attach(engine, ewc)
    with pytest.raises(ValueError, match=r"of engine.module, got 4 that are not, as 0.w"):
        deepspeed.attach(engine, held(model()))
    with pytest.raises(TypeError, match=r"engine: expected a deepspeed.DeepSpeedEngine"):
        deepspeed.attach(engine.module, ewc)
    with (
        deepspeed.attach(engine, ewc),
        pytest.raises(TypeError, match="give retain_graph and scale_wrt_gas by name"),
    ):
        engine.backward(torch.ones(()), False)
    with pytest.raises(TypeError, match=r"ewc: expected a fasttax.EWC"):
        deepspeed.attach(engine, None)


def test_a_gradient_that_zero_would_take_away_is_refused() -> None:
    made = model()
    ewc = held(made)
    for mapping in (object(), None):  # None: another rank has this parameter's share
        made[0].weight._hp_mapping = mapping
        with pytest.raises(ValueError, match=r"0.weight: .*use fasttax.integrations.deepspeed"):
            ewc.add_grad_()
        with pytest.raises(ValueError, match=r"EWC.prox_: 0.weight: .*writes over from a copy"):
            ewc.prox_(0.1)


# --- ZeRO-3: a share of every parameter on each of two ranks --------------------------------------


class Zero3:
    """The names that ZeRO-3's optimizer has for a rank's share of master and gradient."""

    def __init__(self, parameters: list[Any], loss_scale: float) -> None:
        self.loss_scale = loss_scale
        self.masters, self.grads = {}, {}
        ranks, rank = dist.get_world_size(), dist.get_rank()
        for i, p in enumerate(parameters):
            p.ds_id, p.ds_process_group = i, dist.group.WORLD
            size = (p.numel() + ranks - 1) // ranks
            flat = torch.zeros(size * ranks)
            flat[: p.numel()] = p.detach().reshape(-1)
            self.masters[p] = flat[rank * size : (rank + 1) * size].clone()
            self.grads[p] = torch.full((size,), 0.5 * loss_scale)
            p.ds_tensor = SimpleNamespace(ds_numel=size)
            p.data = torch.empty(0)

    def get_local_fp32_param(self, p: Any) -> Tensor:
        return self.masters[p]

    def get_local_fp32_grad_for_param(self, p: Any) -> Tensor:
        return self.grads[p].clone()

    def set_local_grad_for_param(self, value: Tensor, p: Any) -> None:
        self.grads[p].copy_(value)


class Scattered(Engine):
    def __init__(self, module: nn.Module, loss_scale: float) -> None:
        super().__init__(module, 1)
        self.optimizer = Zero3(list(module.parameters()), loss_scale)

    def zero_optimization_stage(self) -> int:
        return 3

    def step(self) -> None:
        self.micro += 1


def whole(share: Tensor, like: Tensor) -> Tensor:
    """The shares of all ranks, as the parameter lies."""
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share)
    return torch.cat(parts)[: like.numel()].view(like.shape)


def over_shares(rank: int, folder: Path) -> None:
    for storage, exact in (("fp32", 1e-6), ("bf16", 2e-2), ("u8log", 5e-2)):
        made, plain = model(), model()
        ewc, wanted = held(made, storage=storage), held(plain)
        engine = Scattered(made, loss_scale=8.0)
        handle = deepspeed.attach(engine, ewc)
        wanted.add_grad_(8.0)
        engine.step()
        for p, own in zip(made.parameters(), plain.parameters(), strict=True):
            assert own.grad is not None
            found = whole(engine.optimizer.grads[p], own) - 4.0
            assert torch.allclose(found, own.grad, rtol=exact, atol=exact)
            share = engine.optimizer.grads[p]
            size = share.numel() * dist.get_world_size() - own.numel()
            if rank == 1 and size:  # what fills a share up is left alone
                assert torch.equal(share[-size:], torch.full((size,), 4.0))
        assert float(handle.penalty()) == pytest.approx(float(wanted.penalty().detach()), rel=exact)
        drift, own_drift = handle.distance(), wanted.distance()
        for name, value in own_drift.per_parameter.items():
            assert float(drift.per_parameter[name]) == pytest.approx(float(value), rel=exact)
        with pytest.raises(ValueError, match="ZeRO-3"):
            held(made)


def test_zero_3_adds_each_ranks_share(tmp_path: Path) -> None:
    on_ranks(over_shares, tmp_path)


def test_zero_3_refuses_what_needs_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model())
    monkeypatch.setattr(engine, "zero_optimization_stage", lambda: 3, raising=False)
    engine.optimizer = None  # type: ignore[attr-defined]
    eye = {"0.weight": (torch.eye(5), torch.eye(3))}
    names = {n: torch.ones_like(p) for n, p in engine.module.named_parameters()}
    estimate = KroneckerEstimate(eye, {n: f for n, f in names.items() if n not in eye})
    factors = fasttax.EWC(engine.module, estimate, strength=1.0)
    with pytest.raises(ValueError, match="Kronecker factors; both need whole matrices: use ZeRO-2"):
        deepspeed.attach(engine, factors)
    with pytest.raises(ValueError, match="that ZeRO-3 has scattered, got 0 of 4"):
        deepspeed.attach(engine, held(engine.module))
