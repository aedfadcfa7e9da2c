"""How often what the integrations add waits for the device: on a CPU too what asks for a value is
seen as it is dispatched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttax.integrations._kl_forward import Forward
from fasttax.integrations._trl_divergence import divergence_loss, jsd_loss
from fasttax.integrations._trl_logprob import LogProb
from tests.tools.launches import META, launches, logits, numbers


class Looks(TorchDispatchMode):
    """Counts the ops that a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        boolean = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] or ()
        )
        if boolean or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_forward_looks_at_its_mask_once() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    forward = Forward({}, {}, None, mask, None, True, lambda: None)
    x = torch.randn(2, 5, 4)  # with two virtual tokens in front
    with Looks() as looks:
        policy, ref = forward.counted(x), forward.counted(x[:, 2:])
    assert looks.seen == ["nonzero"]
    assert torch.equal(policy, x[:, 2:][mask])
    assert torch.equal(ref, policy)


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean"])
@pytest.mark.parametrize("items", [None, 50, numbers(dtype=torch.int64)[0]], ids=str)
def test_gkds_loss_does_not_look(items: Any, reduction: str) -> None:
    x, y, labels = logits(), logits(requires_grad=False), numbers(dtype=torch.int64)
    seen = launches(lambda: jsd_loss(x, y, labels, 0.5, 1.0, reduction, items))
    assert seen.count("token_kl_grad") == seen.count("scale_held_") == 1
    assert len(seen) <= 9


def test_log_probs_do_not_look() -> None:
    hidden, weight = (
        torch.empty(n, 8, device=META, dtype=torch.bfloat16, requires_grad=True) for n in (64, 100)
    )

    def logp() -> Tensor:
        ids = numbers(dtype=torch.int64)
        first: Tensor = LogProb.apply(hidden, weight, None, ids, 1.0, None, 1.0, ("entropy",))[0]
        return first

    assert "token_stats_backward" in launches(logp)


def test_distillation_looks_at_its_mask_once() -> None:
    student = torch.randn(2, 6, 8, requires_grad=True), torch.randn(30, 8), None
    teacher = torch.randn(2, 6, 8), torch.randn(30, 8), None
    mask = torch.rand(2, 6) < 0.7
    with Looks() as looks:
        divergence_loss(student, teacher, mask, 50, 0.5, 1.0, 1.0, None, 1.0, None)
    assert looks.seen == ["nonzero"]
