"""EWC over FSDP2's shards on two gloo processes is EWC of one process; DDP; what DeepSpeed's ZeRO-3
and FSDP1 leave is refused.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import EWC, AdamWEWC, FisherEstimate
from tests.tools.models import TokenModel, ids
from tests.tools.processes import on_ranks
from tests.tools.utils import named


def odd_model() -> Any:
    """Widths that two ranks do not divide, and norms of one row that leave rank 1 with empty
    shards.
    """
    model: Any = TokenModel(width=15)
    model.one = nn.Parameter(torch.ones(1))
    return model


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def nudge(model: nn.Module, state: dict[str, Tensor]) -> None:
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        for n, p in model.named_parameters():
            if isinstance(p, DTensor):
                from fasttax._base.dtensor import part_of

                p.to_local().copy_(part_of(state[n], p))
            else:
                p.copy_(state[n])


def moved(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for n, p in model.named_parameters()
    }


def loss_of(model: Any, x: Tensor) -> Tensor:
    logits = model(x).logits
    return (
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        + 0.0 * model.one.sum()
    )


def run(model: nn.Module, ewc: EWC, x: Tensor, folder: Path | None = None) -> dict[str, Tensor]:
    """Every way to apply it, and what comes of it, as whole tensors."""
    from fasttax._base.dtensor import whole

    out = {"penalty": ewc.penalty().detach(), "total": ewc.distance().total}
    out |= {f"distance {n}": v for n, v in ewc.distance().per_parameter.items()}
    (loss_of(model, x) + ewc.penalty()).backward()
    out |= {f"grad {n}": whole(p.grad).clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss_of(model, x).backward()
    out["add_grad"] = ewc.add_grad_()
    out |= {f"added {n}": whole(p.grad).clone() for n, p in model.named_parameters()}
    for mode in ("grad", "prox"):
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode=mode)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        out[f"adamw {mode}"] = optimizer.penalty
    with ewc.attach(torch.optim.SGD(model.parameters(), lr=0.1), mode="prox") as handle:
        assert handle.steps == 0
    ewc.prox_(0.5)
    ewc.consolidate(fisher_of(model))
    out["consolidated"] = ewc.penalty().detach()
    if folder is not None:
        ewc.save(folder / "sharded.safetensors")
    return out | {f"theta {n}": whole(p.detach()).clone() for n, p in model.named_parameters()}


def sharded(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = odd_model()
    fisher, state = fisher_of(model), moved(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ewc = EWC(model, fisher, strength=3.0)
    assert float(ewc.penalty()) == 0
    held = sum(h.anchor.numel() for h in ewc.hold.store.held.values())
    assert held < 0.6 * sum(f.numel() for f in fisher.values())  # a shard, not the whole
    nudge(model, state)
    x = ids(4, 6)
    # both ranks see the whole batch, so that the mean over ranks is one process's gradient
    out = run(model, ewc, x, folder)
    again = EWC.load(folder / "sharded.safetensors", model)
    assert float(again.distance().total) == pytest.approx(float(ewc.distance().total), rel=1e-6)
    torch.save(out, folder / f"{rank}.pt")


def both(rank: int, folder: Path) -> None:
    parallel(rank, folder)
    sharded(rank, folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both ranks found; one start of the processes for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(both, folder)
    return folder


def test_two_shards_are_one_process(ran: Path) -> None:
    model = odd_model()
    fisher, state = fisher_of(model), moved(model)
    ewc = EWC(model, fisher, strength=3.0)
    nudge(model, state)
    truth = run(model, ewc, ids(4, 6))
    for rank in range(2):
        got = torch.load(ran / f"{rank}.pt", weights_only=True)
        assert set(got) == set(truth)
        for name, value in truth.items():
            torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-6, msg=named(name))
    whole = EWC.load(ran / "sharded.safetensors", model)
    torch.testing.assert_close(
        whole.anchor["up.weight"], ewc.anchor["up.weight"], rtol=1e-5, atol=1e-6
    )


def parallel(rank: int, folder: Path) -> None:
    model = odd_model()
    fisher, state = fisher_of(model), moved(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    ewc = EWC(wrapped, fisher, strength=3.0)
    nudge(model, state)
    torch.save(run_ddp(wrapped, model, ewc), folder / f"ddp{rank}.pt")
    del wrapped, ewc


def run_ddp(wrapped: nn.Module, model: Any, ewc: EWC) -> dict[str, Tensor]:
    x = ids(4, 6)
    logits = wrapped(x).logits
    loss = (
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        + 0.0 * model.one.sum()
    )
    (loss + ewc.penalty()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_ddp_names_and_gradients(ran: Path) -> None:
    model = odd_model()
    fisher, state = fisher_of(model), moved(model)
    ewc = EWC(model, fisher, strength=3.0)
    nudge(model, state)
    truth = run_ddp(model, model, ewc)
    for rank in range(2):
        got = torch.load(ran / f"ddp{rank}.pt", weights_only=True)
        torch.testing.assert_close(got, truth, rtol=2e-5, atol=2e-6)


def test_zero_3_placeholders_and_fsdp1_are_refused() -> None:
    model = TokenModel()
    fisher = fisher_of(model)
    for i, p in enumerate(model.parameters()):
        p.ds_id = i  # type: ignore[attr-defined]  # what DeepSpeed's ZeRO-3 leaves outside a module's forward
        p.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3 placeholders.*GatheredParameters"):
        EWC(model, FisherEstimate(fisher), strength=1.0)
    model = TokenModel()
    model.up.__class__ = type("FullyShardedDataParallel", (nn.Linear,), {})
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        EWC(model, fisher, strength=1.0)


def test_zero_1_and_2_take_the_penalty_in_the_loss() -> None:
    """DeepSpeed steps flat copies of the parameters: attach says so, and the loss's way gives its
    gradient through them.
    """
    model = TokenModel()
    ewc = EWC(model, fisher_of(model), strength=1.0)
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
    engine = SimpleNamespace(optimizer=torch.optim.AdamW([flat], lr=1e-2))
    with pytest.raises(
        ValueError, match=r"holds none.*deepspeed.attach\(engine, ewc\) \(DeepSpeed ZeRO"
    ):
        ewc.attach(engine)
    torch.nn.utils.vector_to_parameters(flat.detach() + 0.1, model.parameters())
    ewc.penalty().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
