"""FullKL(estimator="sequence") against the gradient over all sequences of a small vocabulary."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax.integrations.trl import FullKL
from tests.tools import kl_steps as k
from tests.tools import tiny_lm
from tests.tools.full_kl_runs import BETA, make
from tests.tools.trainer_runs import history, train

V, T, END = 4, 3, 2  # 40 sequences, of one to three tokens
PROMPT = torch.tensor([[1, 3]])
TEMPERATURE = 0.9  # of `make`
CLOSE = 1e-6


def model(seed: int, std: float = 0.3) -> Any:
    return k.spread(k.llama(vocab_size=V), seed, std).double().eval()


def completions(ends: bool) -> list[list[int]]:
    """All of T tokens; or those that stop behind the first end-of-text."""
    found = dict.fromkeys(
        tuple(s[: s.index(END) + 1]) if ends and END in s else s
        for s in itertools.product(range(V), repeat=T)
    )
    return [list(s) for s in found]


def padded(sequence: list[int]) -> tuple[Tensor, Tensor]:
    missing = T - len(sequence)
    ids = torch.tensor([sequence + [0] * missing])
    return ids, torch.tensor([[1] * len(sequence) + [0] * missing])


def logp(lm: Any, sequence: list[int]) -> Tensor:
    """(n,) of the tokens at the trainer's temperature, with a graph."""
    ids = torch.cat((PROMPT, torch.tensor([sequence])), 1)
    logits = lm(input_ids=ids).logits[0, PROMPT.shape[1] - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, torch.tensor(sequence)[:, None])[:, 0]


def exact(policy: Any, ref: Any, sequences: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    """Sum p (log p - log q) over the sequences, and its gradient."""
    policy = copy.deepcopy(policy)
    total = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        p, q = logp(policy, s).sum(), logp(ref, s).sum().detach()
        total = total + p.exp() * (p - q)
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in policy.named_parameters()}


def estimated(
    name: str,
    policy: Any,
    ref: Any,
    sequences: list[list[int]],
    folder: Path,
    *,
    estimator: str = "sequence",
    sampler: Any = None,
) -> tuple[float, dict[str, Tensor]]:
    """The expectation of what FullKL adds, times the tokens that it was divided by."""
    trainer = make(name, folder, model=policy, gradient_accumulation_steps=1)
    trainer.model.double()
    trainer.current_gradient_accumulation_steps = 1
    value, grads = 0.0, {n: torch.zeros_like(p) for n, p in policy.named_parameters()}
    with FullKL(trainer, ref, BETA, estimator=estimator):
        trainer.model.train()
        for s in sequences:
            ids, mask = padded(s)
            weight = float(logp(policy if sampler is None else sampler, s).sum().exp().detach())
            inputs = {
                "prompt_ids": PROMPT,
                "prompt_mask": torch.ones_like(PROMPT),
                "completion_ids": ids,
                "completion_mask": mask,
                "advantages": torch.zeros(1),
                "num_items_in_batch": torch.tensor(len(s)),
                "old_logps": torch.zeros(1, dtype=torch.float64),
            }
            if sampler is not None:
                old = torch.zeros(1, T, dtype=torch.float64)
                old[0, : len(s)] = logp(sampler, s).detach()
                inputs["old_per_token_logps"] = old
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
            scale = weight * len(s) / BETA
            value += scale * float(loss.detach())
            for n, p in trainer.model.named_parameters():
                if p.grad is not None:
                    grads[n] += scale * p.grad
    return value, grads


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest entry."""
    largest = max(float(g.abs().max()) for g in wanted.values())
    return max(float((found[n] - wanted[n]).abs().max()) for n in wanted) / largest


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("ends", [False, True])
def test_the_enumerated_gradient_is_met(name: str, ends: bool, tmp_path: Path) -> None:
    policy, ref, sequences = model(0), model(1), completions(ends)
    assert sum(float(logp(policy, s).sum().exp()) for s in sequences) == pytest.approx(1.0)
    wanted, grads = exact(policy, ref, sequences)
    value, found = estimated(name, policy, ref, sequences, tmp_path)
    assert value == pytest.approx(wanted, rel=CLOSE)
    assert off(found, grads) <= CLOSE
    # the token estimator has the value, and another gradient
    value, found = estimated(name, policy, ref, sequences, tmp_path, estimator="token")
    assert value == pytest.approx(wanted, rel=CLOSE)
    assert off(found, grads) > 0.02


def test_samples_of_older_weights_are_reweighed(tmp_path: Path) -> None:
    policy, ref, sampler, sequences = model(0), model(1), model(2), completions(True)
    wanted, grads = exact(policy, ref, sequences)
    value, found = estimated("grpo", policy, ref, sequences, tmp_path, sampler=sampler)
    assert value == pytest.approx(wanted, rel=CLOSE)
    assert off(found, grads) <= CLOSE


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("changes", [{}, {"bf16": True}])
def test_a_run(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Value and log are the token estimator's; the weights move elsewhere."""
    runs = []
    for estimator in ("token", "sequence"):
        trainer = make(name, tmp_path, **changes)
        full = FullKL(trainer, tiny_lm.model(1), BETA, estimator=estimator)
        assert full.estimator == estimator
        runs.append(train(trainer))
    for key in ("kl/policy_ref", "kl/ref_policy", "entropy"):
        assert history(runs[0], key)[0] == pytest.approx(history(runs[1], key)[0], rel=1e-5)
    assert history(runs[0], "loss")[0] == pytest.approx(history(runs[1], "loss")[0], rel=1e-4)
    pairs = zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-4


def test_what_it_refuses(tmp_path: Path) -> None:
    trainer = make("grpo", tmp_path)
    ref = tiny_lm.model(1)
    with pytest.raises(
        ValueError, match="estimator: expected one of 'token', 'sequence', got 'seq'"
    ):
        FullKL(trainer, ref, BETA, estimator="seq")
    with pytest.raises(
        ValueError,
        match=r"kind: expected 'policy_ref' under estimator='sequence': .* got 'ref_policy'; pass "
        r"estimator='token'",
    ):
        FullKL(trainer, ref, BETA, "ref_policy", estimator="sequence")
    FullKL(trainer, ref, BETA, "ref_policy", estimator="token").undo()  # as advised
    with pytest.raises(
        ValueError,
        match=r"temperature: expected the trainer's 0\.9, at which the sequences are sampled, got "
        r"1; leave temperature out",
    ):
        FullKL(trainer, ref, BETA, temperature=1.0, estimator="sequence")
    FullKL(trainer, ref, BETA, estimator="sequence").undo()  # as advised
    sft = make("sft", tmp_path)
    with pytest.raises(
        ValueError,
        match=r"estimator: expected 'token' in a trainer whose sequences are data, .* got "
        r"'sequence' in SFTTrainer; 'sequence' is GRPO's and RLOO's",
    ):
        FullKL(sft, ref, BETA, estimator="sequence")
    rloo = make("rloo", tmp_path, num_iterations=2)
    with pytest.raises(
        ValueError,
        match=r"trainer: expected RLOO on samples of the present weights .* got 2 micro-batches a "
        r"step of a generation that is used for 4; pass num_iterations=1 and "
        r"steps_per_generation=gradient_accumulation_steps",
    ):
        FullKL(rloo, ref, BETA, estimator="sequence")
    rloo = make("rloo", tmp_path, num_iterations=1, steps_per_generation=2)  # as advised
    FullKL(rloo, ref, BETA, estimator="sequence").undo()
