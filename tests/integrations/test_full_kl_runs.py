"""FullKL in runs: several forwards, copies, new models, temperatures, vocabularies, packed rows."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import trl

from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import attach
from fasttax.integrations.trl import FullKL
from tests.tools import kl_steps as k
from tests.tools import tiny_lm, trl_runs

CLOSE = 2e-4


# --- several forwards -----------------------------------------------------------------------------


class Twice(k.NoLogits):
    """A loss of two forwards over the same tokens."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return sum(super(Twice, self).compute_loss(model, inputs) for _ in range(2))


class Halves(t.Trainer):
    """A loss of two forwards over the batch's parts."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        parts = ({n: v[rows] for n, v in inputs.items()} for rows in (slice(0, 1), slice(1, 3)))
        return sum(model(**part).loss * 0 for part in parts)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("cls", [k.NoLogits, Twice, Halves])
def test_the_gradient_is_that_of_the_mean_whatever_the_forwards(cls: type, counted: bool) -> None:
    policy, ref = k.llama(), k.llama(1)
    wanted, grads = k.truth(policy, ref)
    tokens = int((k.BATCH["labels"][:, 1:] != -100).sum())
    items = torch.tensor(2 * tokens) if counted else None  # of an accumulation window of two
    found = k.step(policy, ref, cls=cls, items=items)
    assert found.kl == pytest.approx(wanted, rel=CLOSE)
    scale = 0.25 if counted else 0.5
    assert float(found.loss) == pytest.approx(scale * wanted, rel=CLOSE)
    assert k.error(found.grads, grads, scale) < 1e-3


def test_a_beta_of_0_leaves_the_trainers_loss_alone() -> None:
    """Also where the KL is infinite: 0 times it would be NaN."""
    policy, ref = k.llama(), k.llama(1)
    dead = torch.tensor([3])
    ref.lm_head.register_forward_hook(lambda m, args, y: y.index_fill(-1, dead, -torch.inf))
    found = k.step(policy, ref, beta=0.0)
    assert found.kl == float("inf")
    plain = k.llama()
    loss = k.trainer(plain).compute_loss(plain.train(), dict(k.BATCH))
    loss.backward()
    assert torch.equal(found.loss, loss.detach())
    assert all(torch.equal(found.grads[n], p.grad) for n, p in plain.named_parameters())


# --- copies and new models ------------------------------------------------------------------------


class Uncopied(k.Rows):
    """A data set that no copy of a model may bring along."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the data set was copied")

    def __reduce__(self) -> Any:
        raise AssertionError("the data set was pickled")


def test_a_copy_or_pickle_of_the_policy_is_the_policy_alone() -> None:
    policy = k.llama()
    made = k.trainer(policy)
    made.train_dataset = Uncopied(k.BATCH)
    with FullKL(made, k.llama(1), 0.5) as full:
        stream = io.BytesIO()
        torch.save(policy, stream)
        stream.seek(0)
        copies = [
            copy.deepcopy(policy),
            pickle.loads(pickle.dumps(policy)),
            torch.load(stream, weights_only=False),
        ]
        for other in copies:
            assert torch.equal(k.logits(other), k.logits(policy))
        made.current_gradient_accumulation_steps = 1
        policy.train()
        made.compute_loss(policy, dict(k.BATCH))
        assert full.events.since_log["kl/policy_ref"][1] == 3 * (k.TOKENS - 3)
    for other in copies:
        assert torch.equal(k.logits(other), k.logits(policy))


@pytest.mark.parametrize("through", ["FullKL", "attach"])
def test_the_model_that_model_init_makes_is_the_one_that_is_watched(through: str) -> None:
    made = k.trainer(lambda: k.llama())
    first = made.model
    if through == "FullKL":
        handle: Any = FullKL(made, k.llama(1), 0.5)
    else:
        handle = attach(made, kl={"ref_model": k.llama(1), "beta": 0.5})
    made.train()
    wanted, _ = k.truth(k.llama(), k.llama(1))
    found = [entry["kl/policy_ref"] for entry in made.state.log_history if "loss" in entry]
    assert found == [pytest.approx(wanted, rel=CLOSE)]
    handle.undo()
    for model in (first, made.model):
        assert not any(m._forward_hooks for m in model.modules())


# --- vocabularies and temperatures ----------------------------------------------------------------


def test_another_vocabulary_is_refused_when_full_kl_is_made() -> None:
    policy, ref = k.llama(), k.llama(1, vocab_size=70)
    with pytest.raises(
        ValueError,
        match=r"ref_model: expected the policy's vocabulary of 61 tokens, got one of 70; use "
        r"models of one vocabulary; .*resize_token_embeddings\(61\)",
    ):
        FullKL(k.trainer(policy), ref, 0.5)
    for cache in (
        TopKReference.make(ref, k.IDS.tolist(), k=4),
        TopKReference.make(k.llama(1, vocab_size=50), k.IDS.tolist(), k=4),
    ):
        with pytest.raises(ValueError, match="the policy's vocabulary of 61 tokens, got one of"):
            FullKL(k.trainer(policy), cache, 0.5)
    unsaid = TopKReference.make(ref, k.IDS.tolist(), k=70)
    del unsaid.metadata["vocabulary"]
    with pytest.raises(ValueError, match="ids of the policy's vocabulary of 61 tokens, got the id"):
        FullKL(k.trainer(policy), unsaid, 0.5)
    ref.resize_token_embeddings(61)  # as advised
    wanted, _ = k.truth(policy, ref)
    assert k.step(policy, ref).kl == pytest.approx(wanted, rel=CLOSE)


@pytest.mark.parametrize("cls", [t.Trainer, k.NoLogits])
@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd"])
def test_a_temperature_is_that_of_both(kind: str, cls: type) -> None:
    policy, ref = k.llama(), k.llama(1)
    wanted, grads = k.truth(policy, ref, kind, temperature=2.0)
    for given in (
        ref,
        TopKReference.make(ref, k.IDS.tolist(), k=k.VOCABULARY),
        TopKReference.make(ref, k.IDS.tolist(), k=k.VOCABULARY, temperature=2.0),
        TopKReference.make(ref, k.IDS.tolist(), k=k.VOCABULARY, temperature=0.5),
    ):
        found = k.step(copy.deepcopy(policy), given, kind, cls=cls, temperature=2.0)
        assert found.kl == pytest.approx(wanted, rel=CLOSE)
        if cls is k.NoLogits:
            assert k.error(found.grads, grads, 0.5) < 1e-3


def test_a_cut_cache_of_another_temperature_is_refused() -> None:
    policy, ref = k.llama(), k.llama(1)
    cache = TopKReference.make(ref, k.IDS.tolist(), k=8)
    with pytest.raises(
        ValueError,
        match=r"log-probs at the temperature 2, .* got a cache made at 1; make it with "
        r"TopKReference\.make\(\.\.\., temperature=2\), or with k = 61",
    ):
        FullKL(k.trainer(policy), cache, 0.5, temperature=2.0)
    values = []
    for size in (8, 30, k.VOCABULARY):  # as advised
        cache = TopKReference.make(ref, k.IDS.tolist(), k=size, temperature=2.0)
        values.append(k.step(policy, cache, "ref_policy", temperature=2.0).kl)
    wanted, _ = k.truth(policy, ref, "ref_policy", temperature=2.0)
    assert 0 < values[0] < values[1] < values[2]
    assert values[2] == pytest.approx(wanted, rel=CLOSE)


def test_a_compiled_policy_is_cut_where_it_is_looked_at_alone() -> None:
    """Into its backbone and its head: nothing of the KL is traced."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    eager = k.step(k.llama(), k.llama(1))
    policy = k.llama()
    policy.compile(backend=backend)
    compiled = k.step(policy, k.llama(1))
    assert len(graphs) == 2
    assert compiled.kl == pytest.approx(eager.kl, rel=CLOSE)
    assert k.error(compiled.grads, eager.grads) < 1e-3


# --- packed rows and other inputs of a cache ------------------------------------------------------


def test_a_cache_serves_packed_rows() -> None:
    """Documents do not see each other: the policy makes no cache, as Trainer has it, nor a ref."""
    policy, ref = k.llama(use_cache=False), k.llama(1)
    assert ref.config.use_cache
    rows = [k.IDS[0, :4], k.IDS[1, :5], k.IDS[2]]
    cache = TopKReference.make(ref, [r.tolist() for r in rows], k=k.VOCABULARY)
    places = torch.cat([torch.arange(len(r)) for r in rows])[None]
    ids = torch.cat(rows)[None]
    batch = {
        "input_ids": ids,
        "position_ids": places,
        "labels": torch.where(places == 0, -100, ids),
    }
    made = k.step(policy, cache, "ref_policy", batch=batch)
    other = k.step(policy, ref, "ref_policy", batch=batch)
    assert made.kl == pytest.approx(other.kl, rel=CLOSE)
    assert made.tokens == other.tokens == 3 + 4 + 8
    assert ref.config.use_cache


class Packed(t.Trainer):
    """A trainer whose rows are packed, as TRL's SFT has them."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.args.packing = True


def test_packed_rows_that_the_cache_does_not_hold_are_refused_before_training() -> None:
    ref = k.llama(1)
    whole = TopKReference.make(ref, k.IDS.tolist(), k=8)
    parts = TopKReference.make(ref, k.IDS.reshape(-1, 3).tolist(), k=8)
    rows = {
        "input_ids": k.IDS,
        "labels": k.IDS,
        "seq_lengths": torch.full((3, 3), 3),
    }
    made = k.trainer(k.llama(), Packed, rows)
    with pytest.raises(
        ValueError, match="a packed row with 3 tokens that are none of them; pack whole sequences"
    ):
        FullKL(made, whole, 0.5)
    FullKL(made, parts, 0.5).undo()
    made.args.packing = False  # as advised
    FullKL(made, whole, 0.5).undo()


def test_a_cache_refuses_what_it_cannot_know() -> None:
    cache = TopKReference.make(k.llama(1), k.IDS.tolist(), k=8)
    ref = k.llama(1)

    class Pictures(t.Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *a: Any, **others: Any) -> Any:
            return model(**inputs, pixel_values=torch.zeros(3, 3, 4, 4)).loss

    with pytest.raises(ValueError, match="got a cached reference, and pixel_values beside inp"):
        k.step(k.llama(), cache, cls=Pictures)
    assert k.step(k.llama(), ref, cls=Pictures).kl > 0  # as advised


# --- older versions of the trainers ---------------------------------------------------------------


class Old(k.NoLogits):
    """transformers before 5.19: whether the loss is scaled is not an attribute."""

    @property
    def loss_is_scaled_for_ga(self) -> Any:
        raise AttributeError("loss_is_scaled_for_ga")


@pytest.mark.parametrize("func", [None, lambda *args, **kwargs: None])
@pytest.mark.parametrize("counted", [False, True])
def test_transformers_before_5_19(counted: bool, func: Any) -> None:
    """The KL is divided as training_step divides that version's loss."""
    policy, ref = k.llama(), k.llama(1)
    wanted, _ = k.truth(policy, ref)
    tokens = int((k.BATCH["labels"][:, 1:] != -100).sum())
    made = k.trainer(policy, Old)
    made.current_gradient_accumulation_steps, made.compute_loss_func = 2, func
    made.model.train()
    items = torch.tensor(4 * tokens) if counted else None
    with FullKL(made, ref, 0.5):
        loss = made.compute_loss(policy, dict(k.BATCH), num_items_in_batch=items)
    # a mean over the tokens that were counted; of two micro-batches; of this one, to be halved
    scale = 0.25
    if not counted:
        scale = 1.0 if func is None else 0.5
    assert float(loss.detach()) == pytest.approx(0.5 * scale * wanted, rel=CLOSE)


class NoLabels(k.NoLogits):
    """TRL before 1.15 gives the model no labels: a completion_mask says what counts."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "completion_ids" in inputs:
            inputs = {
                f"{to}": torch.cat((inputs[f"prompt_{of}"], inputs[f"completion_{of}"]), 1)
                for to, of in (("input_ids", "ids"), ("attention_mask", "mask"))
            }
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return super().compute_loss(model, given)


@pytest.mark.parametrize("split", [False, True])
def test_a_completion_mask_says_which_tokens_count(split: bool) -> None:
    policy, ref = k.llama(), k.llama(1)
    counts = torch.ones_like(k.IDS)
    counts[0, 7:] = 0
    counts[:, :3] = 0
    labels = k.IDS.masked_fill(counts == 0, -100)
    batch = {"input_ids": k.IDS, "attention_mask": torch.ones_like(k.IDS)}
    wanted, grads = k.truth(policy, ref, batch={**batch, "labels": labels})
    given = {**batch, "completion_mask": counts}
    if split:
        given = {
            "prompt_ids": k.IDS[:, :3],
            "prompt_mask": torch.ones_like(k.IDS[:, :3]),
            "completion_ids": k.IDS[:, 3:],
            "completion_mask": counts[:, 3:],
        }
    made = k.trainer(policy, NoLabels)
    made.current_gradient_accumulation_steps = 1
    policy.train()
    with FullKL(made, ref, 0.5) as full:
        made.compute_loss(policy, given).backward()
    assert full.events.since_log["kl/policy_ref"].tolist() == [
        pytest.approx(wanted * int(counts.sum()), rel=CLOSE),
        counts.sum(),
    ]
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert k.error(found, grads, 0.5) < 1e-3


def test_trl_before_1_9_is_refused_when_full_kl_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dpo, sft = (trl_runs.make(name, tmp_path) for name in ("dpo", "sft"))
    monkeypatch.setattr(trl, "__version__", "0.27.2")
    with pytest.raises(
        RuntimeError,
        match=r"FullKL: trainer: expected DPOTrainer of trl >= 1\.9, got that of trl 0\.27\.2; "
        r"install trl>=1\.9; or take SFTTrainer, which is served in every version",
    ):
        FullKL(dpo, k.llama(1), 0.1)
    FullKL(sft, tiny_lm.model(1), 0.1).undo()  # as advised
    monkeypatch.setattr(trl, "__version__", "1.9.0")
    FullKL(dpo, tiny_lm.model(1), 0.1).undo()  # as advised
