"""Replay in trainers, against a step whose gradient is composed by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fasttax import topk_kl, topk_logprobs
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import attach
from fasttax.integrations.trl import FullKL
from tests.tools import tiny_lm, trl_runs
from tests.tools.full_kl_runs import make
from tests.tools.trainer_runs import (
    Rows,
    by_hand,
    difference,
    held,
    history,
    plain,
    texts,
    train,
)

WEIGHT = 0.7
ROUNDING = 1e-6


class ByHand(transformers.TrainerCallback):
    """The oracle: weight * loss backwards as a step begins; a sum of gradients has no order."""

    def __init__(self, kind: str, every: int = 1) -> None:
        self.kind, self.every, self.batches = kind, every, texts()
        self.ref, self.used = tiny_lm.model(1), 0
        self.seen: list[float] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if (state.global_step + 1) % self.every:
            return
        loss = by_hand(model, self.batches[self.used % 3], self.kind, self.ref)
        self.used += 1
        self.seen.append(float(loss.detach()))
        (WEIGHT * loss).backward()


def replay(kind: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"loader": texts(), "kind": kind, "weight": WEIGHT, **changes}
    if kind == "kl":
        given.setdefault("ref_model", tiny_lm.model(1))
    return given


CASES: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
    {"gradient_accumulation_steps": 3, "max_steps": 5},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("kind", ["lm", "kl"])
@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(c) or "plain")
def test_the_gradient_is_that_of_the_composed_loss(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    oracle = ByHand(kind)
    theirs, ours = plain(tmp_path, [oracle], **changes), plain(tmp_path, **changes)
    with attach(ours, replay=replay(kind)):
        train(ours)
    train(theirs)
    assert difference(ours.model, theirs.model) <= ROUNDING
    assert difference(train(plain(tmp_path, **changes)).model, ours.model) > 1e-3
    assert history(ours, f"replay/{kind}") == pytest.approx(oracle.seen, rel=1e-5)
    assert history(ours, "grad_norm") == pytest.approx(history(theirs, "grad_norm"), rel=1e-5)
    assert len(oracle.seen) == ours.args.max_steps  # the loader of three has begun anew


@pytest.mark.parametrize("kind", ["lm", "kl"])
def test_one_step_is_the_gradient_of_the_sum(kind: str, tmp_path: Path) -> None:
    """Task loss + weight * replay in one backward, of a step without momentum or clipping."""
    trainer = plain(
        tmp_path, max_steps=1, gradient_accumulation_steps=1, max_grad_norm=0.0, learning_rate=1.0
    )
    attach(trainer, replay=replay(kind))
    batches: list[Any] = []
    compute = trainer.compute_loss

    def keep(model: Any, inputs: Any, **options: Any) -> Any:
        batches.append(dict(inputs))
        return compute(model, inputs, **options)

    trainer.compute_loss = keep
    train(trainer)
    model = tiny_lm.model()
    loss = model(**batches[0]).loss + WEIGHT * by_hand(model, texts()[0], kind, tiny_lm.model(1))
    loss.backward()
    for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True):
        scale = max(1.0, float(p.grad.abs().max()))
        assert float((p.detach() - p.grad - q.detach()).abs().max()) <= ROUNDING * scale


@pytest.mark.parametrize("kind", ["lm", "kl"])
def test_bf16_runs_under_the_trainers_autocast(kind: str, tmp_path: Path) -> None:
    runs = [plain(tmp_path, bf16=bf16, max_steps=1) for bf16 in (False, True)]
    for trainer in runs:
        attach(trainer, replay=replay(kind))
        train(trainer)
    key = f"replay/{kind}"
    assert history(runs[1], key) != history(runs[0], key)
    assert history(runs[1], key) == pytest.approx(history(runs[0], key), rel=0.05)
    assert all(p.dtype == torch.float32 for p in runs[1].model.parameters())
    same = plain(tmp_path, bf16=True, max_steps=1)
    attach(same, replay={"loader": texts(), "kind": "kl", "ref_model": tiny_lm.model()})
    assert history(train(same), "replay/kl") == [0.0]  # equal models, under one autocast


def test_every_counts_steps_and_keeps_the_weight(tmp_path: Path) -> None:
    changes = {"max_steps": 5, "logging_steps": 1}
    oracle = ByHand("lm", every=2)
    theirs, ours = plain(tmp_path, [oracle], **changes), plain(tmp_path, **changes)
    attach(ours, replay=replay("lm", every=2))
    assert difference(train(ours).model, train(theirs).model) <= ROUNDING
    logged = [e["step"] for e in ours.state.log_history if "replay/lm" in e]
    assert logged == [2, 4]
    assert oracle.used == 2


def test_beside_ewc_and_kl(tmp_path: Path) -> None:
    """The three gradients add up; the replay's reference is the KL's."""
    runs = []
    for how in ("ours", "theirs"):
        model = tiny_lm.model()
        oracle = ByHand("kl")
        trainer = plain(tmp_path, [oracle] if how == "theirs" else [], model)
        options: dict[str, Any] = {
            "ewc": held(model),
            "kl": {"ref_model": tiny_lm.model(1), "beta": 0.3},
        }
        if how == "ours":
            options["replay"] = {"loader": texts(), "kind": "kl", "weight": WEIGHT}
        attach(trainer, **options)
        runs.append(train(trainer))
    assert difference(runs[0].model, runs[1].model) <= ROUNDING
    assert history(runs[0], "kl/policy_ref") == pytest.approx(history(runs[1], "kl/policy_ref"))
    assert len(history(runs[0], "replay/kl")) == len(history(runs[0], "ewc/penalty")) == 3


# --- TRL's trainers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*trl_runs.STABLE, *trl_runs.EXPERIMENTAL])
def test_in_every_trainer_of_trl(name: str, tmp_path: Path) -> None:
    ours, theirs = (make(name, tmp_path) for _ in range(2))
    oracle = ByHand("lm")
    theirs.add_callback(oracle)
    attach(ours, replay=replay("lm"))
    train(ours)
    train(theirs)
    assert difference(ours.model, theirs.model) <= ROUNDING
    assert history(ours, "grad_norm") == pytest.approx(history(theirs, "grad_norm"), rel=1e-5)
    assert history(ours, "replay/lm") == pytest.approx(oracle.seen, rel=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "rloo"])
def test_in_full_kl(name: str, tmp_path: Path) -> None:
    """A loader alone is kind "lm"; kind "kl" takes FullKL's reference."""
    for given, kind in ((texts(), "lm"), ({"loader": texts(), "kind": "kl"}, "kl")):
        ours, theirs = make(name, tmp_path), make(name, tmp_path)
        with FullKL(ours, tiny_lm.model(1), 0.2, replay=given):
            train(ours)
        assert not any(type(c).__name__ == "Replay" for c in ours.callback_handler.callbacks)
        FullKL(theirs, tiny_lm.model(1), 0.2)
        attach(
            theirs,
            replay={"loader": texts(), "kind": kind, "ref_model": None}
            if kind == "lm"
            else {"loader": texts(), "kind": kind, "ref_model": tiny_lm.model(1)},
        )
        train(theirs)
        assert difference(ours.model, theirs.model) <= ROUNDING
        assert len(history(ours, f"replay/{kind}")) == len(history(ours, "kl/policy_ref")) == 2


def test_without_a_reference_the_adapter_is_switched_off(tmp_path: Path) -> None:
    runs = [make("sft", tmp_path, lora=True) for _ in range(2)]
    for trainer, ref in zip(runs, (None, tiny_lm.model()), strict=True):
        given = {"loader": texts(), "kind": "kl", "weight": 5.0}
        attach(trainer, replay=given if ref is None else {**given, "ref_model": ref})
        train(trainer)
    assert difference(runs[0].model, runs[1].model) <= ROUNDING
    kl = history(runs[0], "replay/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-9)  # a new adapter's B is 0
    assert kl[1] > 1e-6


def test_the_trainers_own_reference_serves(tmp_path: Path) -> None:
    trainer = make("dpo", tmp_path)
    attach(trainer, replay={"loader": texts(), "kind": "kl"})
    first = by_hand(tiny_lm.model(), texts()[0], "kl", tiny_lm.model(1))
    assert history(train(trainer), "replay/kl")[0] == pytest.approx(float(first.detach()), rel=1e-5)


@pytest.mark.parametrize("k", [8, 260])
def test_a_cache_is_the_reference(k: int, tmp_path: Path) -> None:
    ref = tiny_lm.model(1)
    rows = [r[: int(m.sum())] for b in texts() for r, m in zip(*b.values(), strict=True)]
    path = tmp_path / "cache.safetensors"
    TopKReference.make(ref, rows, k=k).save(path)
    changes: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1.0}
    ours = plain(tmp_path, **changes)
    attach(ours, replay=replay("kl", ref_model=str(path)))
    train(ours)
    none = train(plain(tmp_path, **changes))
    model, batch = tiny_lm.model(), texts()[0]
    real = batch["attention_mask"][:, 1:] != 0
    logp, ids = topk_logprobs(ref(**batch).logits[:, :-1].detach(), k)
    loss = topk_kl(
        model(**batch).logits[:, :-1], logp, ids, kind="policy_ref", mask=real, reduction="mean"
    )
    loss.backward()
    assert history(ours, "replay/kl") == [pytest.approx(float(loss.detach()), rel=1e-5)]
    for p, a, b in zip(
        model.parameters(), none.model.parameters(), ours.model.parameters(), strict=True
    ):
        assert float((a - WEIGHT * p.grad - b).detach().abs().max()) <= 3 * ROUNDING


# --- loaders --------------------------------------------------------------------------------------


def test_labels_packed_rows_and_tensors(tmp_path: Path) -> None:
    """Labels of -100 do not count, nor does the first token of a packed document."""
    ids = tiny_lm.ids(1, 9, seed=7)
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model = tiny_lm.model()

    def logp(x: Tensor) -> Tensor:
        return (
            -model(input_ids=x, use_cache=False)
            .logits[:, :-1]
            .log_softmax(-1)
            .gather(-1, x[:, 1:, None])[0, :, 0]
        )

    cases: list[tuple[Any, Tensor]] = [
        (ids, logp(ids).mean()),
        ({"input_ids": ids, "labels": labels}, logp(ids)[3:].mean()),
        (
            {"input_ids": ids, "position_ids": places},
            torch.cat((logp(ids[:, :4]), logp(ids[:, 4:]))).mean(),
        ),
        (
            {"input_ids": ids, "cu_seqlens": torch.tensor([0, 4, 9])},
            torch.cat((logp(ids[:, :4]), logp(ids[:, 4:]))).mean(),
        ),
    ]
    for batch, wanted in cases:
        trainer = plain(tmp_path, max_steps=1)
        attach(trainer, replay=[batch])
        found = history(train(trainer), "replay/lm")
        assert found == [pytest.approx(float(wanted.detach()), rel=1e-5)]


def test_a_batch_without_a_token_adds_nothing(tmp_path: Path) -> None:
    ids = tiny_lm.ids(2, 5)
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    for kind in ("lm", "kl"):
        trainer = plain(tmp_path)
        attach(trainer, replay=replay(kind, loader=[nothing]))
        assert difference(train(trainer).model, train(plain(tmp_path)).model) == 0
        assert history(trainer, f"replay/{kind}") == [0.0] * 3


def test_loaders_that_end(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    loader = torch.utils.data.DataLoader(Rows(tiny_lm.ids(4)), batch_size=4)  # one batch
    with attach(trainer, replay=loader):
        train(trainer)
    assert len(history(trainer, "replay/lm")) == 3
    nothing: list[Any] = []
    empties: list[Any] = [nothing, torch.utils.data.DataLoader(nothing)]
    for empty in empties:
        with pytest.raises(
            ValueError,
            match=r"attach: replay\['loader'\]: expected at least one batch, got an empty loader",
        ):
            attach(plain(tmp_path), replay=empty)

    class Never:
        def __iter__(self) -> Any:
            return iter(())

    trainer = plain(tmp_path)
    attach(trainer, replay=Never())
    with pytest.raises(ValueError, match="expected at least one batch, got an empty loader"):
        train(trainer)
    trainer = plain(tmp_path)
    attach(trainer, replay=iter(texts(2)))
    with pytest.raises(
        ValueError,
        match=r"a loader that can be read again, got an iterator that is used up; pass a "
        r"DataLoader or a list of batches; list\(iterator\) keeps them",
    ):
        train(trainer)
    trainer = plain(tmp_path)
    attach(trainer, replay=list(iter(texts(2))))  # as advised
    train(trainer)


def test_a_resumed_run_goes_on_in_the_loader(tmp_path: Path) -> None:
    whole = plain(tmp_path / "whole", max_steps=4)
    attach(whole, replay=replay("lm", every=2))
    train(whole)
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = plain(tmp_path, **changes)
    attach(first, replay=replay("lm", every=2))
    train(first)
    second = plain(tmp_path, **changes)
    attach(second, replay=replay("lm", every=2))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(second.model, first.model) <= ROUNDING
    assert history(second, "replay/lm") == pytest.approx(history(first, "replay/lm"), rel=1e-6)
    assert history(whole, "replay/lm") == pytest.approx(history(first, "replay/lm"), rel=1e-6)


def test_undo_takes_it_out(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    handle = attach(trainer, replay=texts())
    with pytest.raises(
        ValueError,
        match=r"attach: replay: expected a trainer without a replay of kind 'lm', got one that "
        r"has it already; undo\(\) that one first",
    ):
        attach(trainer, replay=texts())
    handle.undo()
    handle.undo()
    assert trainer.callback_handler.callbacks == before
    attach(trainer, replay=texts()).undo()  # as advised
    assert difference(train(trainer).model, train(plain(tmp_path)).model) == 0


WRONG: list[tuple[Any, type, str]] = [
    ({"kind": "lm"}, ValueError, r"replay: expected a loader of batches, or a mapping with one"),
    (
        {"loader": [], "period": 3},
        ValueError,
        "replay: expected one of 'loader', 'kind', 'weight', 'every', 'ref_model', got 'period'",
    ),
    ({"loader": [1], "kind": "l2"}, ValueError, r"replay\['kind'\]: expected one of 'lm', 'kl'"),
    (
        {"loader": [1], "weight": 0.0},
        ValueError,
        r"replay\['weight'\]: expected a finite number > 0",
    ),
    ({"loader": [1], "every": 0}, ValueError, r"replay\['every'\]: expected an integer >= 1"),
    ({"loader": "text"}, TypeError, r"replay\['loader'\]: expected an iterable of batches"),
    (3, TypeError, r"replay\['loader'\]: expected an iterable of batches"),
    (
        {"loader": [1], "ref_model": "a"},
        ValueError,
        r"replay\['ref_model'\]: expected none with kind 'lm'",
    ),
    (
        {"loader": [1], "kind": "kl"},
        ValueError,
        r"replay\['ref_model'\]: expected a model or a TopKReference, got None, and the trainer "
        r"has neither a reference nor an adapter; pass a frozen copy of the base model",
    ),
    (
        {"loader": [1], "kind": "kl", "ref_model": nn.Linear(2, 2)},
        TypeError,
        r"replay\['ref_model'\]: expected a transformers causal language model",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_wrong_calls(given: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    before = (dict(vars(trainer)), list(trainer.callback_handler.callbacks))
    with pytest.raises(error, match="attach: " + message):
        attach(trainer, replay=given)
    if "neither" not in message:  # FullKL's own reference would serve
        with pytest.raises(error, match="FullKL: " + message):
            FullKL(trainer, tiny_lm.model(1), 0.1, replay=given)
    assert (dict(vars(trainer)), list(trainer.callback_handler.callbacks)) == before


def test_another_vocabulary_and_the_policy_itself(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    for ref, message in (
        (tiny_lm.model(1, vocab_size=300), "the policy's vocabulary of 260 tokens, got one of 300"),
        (trainer.model, "a model of its own, got the policy itself"),
    ):
        with pytest.raises(ValueError, match=rf"attach: replay\['ref_model'\]: expected {message}"):
            attach(trainer, replay=replay("kl", ref_model=ref))
    attach(trainer, replay=replay("kl", ref_model=copy.deepcopy(trainer.model)))  # as advised
    assert history(train(trainer), "replay/kl")[0] == pytest.approx(0.0, abs=1e-9)


def test_a_masked_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(
        ValueError, match="a model that predicts the next token, for replay, got BertForMaskedLM"
    ):
        attach(plain(tmp_path, model=BertForMaskedLM(config)), replay=texts())


@pytest.mark.parametrize("kind", ["lm", "kl"])
def test_rows_of_one_token_are_named(kind: str, tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    attach(trainer, replay=replay(kind, loader=[torch.ones(2, 1, dtype=torch.long)]))
    with pytest.raises(ValueError, match=r"replay\['loader'\]: .* of 2 tokens or more"):
        train(trainer)
