"""FullKL in TRL's trainers and the cached reference, against a second forward and log-softmaxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fasttax import cli
from fasttax.integrations import _heads
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import attach
from fasttax.integrations.trl import FullKL, patch
from fasttax.kl import linear_sweep
from tests.tools import tiny_lm, trl_runs
from tests.tools.full_kl_runs import BETA, divergence, make, oracle
from tests.tools.trainer_runs import difference, history, train

ROUNDING = 1e-6  # two steps; the KL's own gradient is larger than the parity tests' losses
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")


@pytest.fixture(autouse=True)
def _ops_for_a_cpu() -> Iterator[None]:
    """TRL 1.15's own ops are Triton's alone."""
    if trl.__version__.startswith("1.15."):
        with patch(quiet=True):
            yield
    else:
        yield


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((n, "policy_ref", {}) for n in TRAINERS),
    ("dpo", "ref_policy", {}),
    ("grpo", "jsd", {}),
    ("kto", "policy_ref", {"gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("name", "kind", "changes"), CASES)
def test_is_the_kl_in_the_loss(
    name: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    ours = make(name, tmp_path, **changes)
    calls = count_forwards(ours.model)
    full = FullKL(ours, tiny_lm.model(1), BETA, kind)
    with full:
        train(ours)
    ran = len(calls)
    theirs = make(name, tmp_path, base=oracle(name, kind))
    theirs.reference = tiny_lm.model(1)
    train(theirs)
    assert difference(ours.model, theirs.model) <= ROUNDING
    assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), rel=2e-5, abs=2e-6)
    assert history(ours, "grad_norm") == pytest.approx(history(theirs, "grad_norm"), rel=2e-5)
    assert len(history(ours, f"kl/{kind}")) == 2
    assert min(history(ours, f"kl/{kind}")) > 1e-3
    for other in ("kl/policy_ref", "kl/ref_policy", "entropy"):
        assert len(history(ours, other)) == 2
        assert min(history(ours, other)) > 1e-3
    plain = make(name, tmp_path)
    calls = count_forwards(plain.model)
    # the KL acts, beside a task gradient that clipping shortens
    assert difference(train(plain).model, ours.model) > 30 * ROUNDING
    assert ran == len(calls)  # and takes no forward of the policy of its own


def count_forwards(model: Any) -> list[int]:
    calls: list[int] = []
    model.model.register_forward_hook(lambda *args: calls.append(1))
    return calls


def test_adapter_switched_off_is_the_reference(tmp_path: Path) -> None:
    ours = make("dpo", tmp_path, lora=True)
    FullKL(ours, None, BETA)
    train(ours)
    kl = history(ours, "kl/policy_ref")
    assert kl[0] == pytest.approx(0.0, abs=1e-9)  # a new adapter's B is 0
    assert kl[1] > 1e-6

    explicit = make("dpo", tmp_path, lora=True)
    FullKL(explicit, tiny_lm.model(), BETA)
    train(explicit)
    assert difference(ours.model, explicit.model) <= ROUNDING


def test_bf16_of_equal_models_is_exactly_zero(tmp_path: Path) -> None:
    """Policy and reference run under one autocast."""
    trainer = make("sft", tmp_path, bf16=True, max_steps=1)
    FullKL(trainer, tiny_lm.model(), BETA)
    assert history(train(trainer), "kl/policy_ref") == [0.0]


@pytest.mark.parametrize(
    ("name", "cached"), [("sft", False), ("sft", True), ("dpo", False), ("grpo", False)]
)
def test_bf16_multiplies_the_heads_in_bfloat16(
    name: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 weights under bf16=True: every product with a head is autocast's, those of the log
    too, and their gradients come back in float32; the KL is float32's up to the roundings.
    """
    operands, V = [], tiny_lm.model().config.vocab_size

    class Products(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is nn.functional.linear and result.shape[-1] == V:
                operands.append(result.dtype)
            return result

    def watch(where: Any, function: str) -> None:
        real = getattr(where, function)

        def watched(a: Tensor, b: Tensor, *rest: Any, **named: Any) -> Any:
            operands.append(b.dtype)
            return real(a, b, *rest, **named)

        monkeypatch.setattr(where, function, watched)

    watch(linear_sweep, "project")
    watch(linear_sweep, "gemm")
    watch(_heads, "project")
    logged = []
    for bf16 in (False, True):
        trainer = make(name, tmp_path, bf16=bf16, max_steps=1, logging_steps=1)
        ref: Any = tiny_lm.model(1)
        if cached:
            ref = TopKReference.make(ref, [row["input_ids"] for row in trainer.train_dataset], k=V)
        FullKL(trainer, ref, BETA)
        operands.clear()
        with Products():
            logged += history(train(trainer), "kl/policy_ref")
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert operands
        assert set(operands) == {torch.bfloat16 if bf16 else torch.float32}
    assert logged[1] == pytest.approx(logged[0], rel=0.05)


def test_evaluation_stays_the_trainers(tmp_path: Path) -> None:
    trainer = make("sft", tmp_path)
    with FullKL(trainer, tiny_lm.model(1), BETA):
        with_kl = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == with_kl


def test_reference_is_run_once_a_batch(tmp_path: Path) -> None:
    trainer = make("grpo", tmp_path, num_iterations=2, max_steps=4)
    ref = tiny_lm.model(1)
    calls = count_forwards(ref)
    FullKL(trainer, ref, BETA)
    train(trainer)
    assert len(history(trainer, "kl/policy_ref")) == 4
    # two generations; the second pass over each reads what was kept
    assert len(calls) == 2 * trl_runs.COMMON["gradient_accumulation_steps"]


def test_tokens_that_a_tool_wrote_do_not_count(tmp_path: Path) -> None:
    trainer = make("grpo", tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    ids = tiny_lm.ids(2, 9)
    tools = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]])
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(2, 4, dtype=torch.int64),
        "completion_ids": ids[:, 4:],
        "advantages": torch.zeros(2),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        "tool_mask": tools,
        "num_items_in_batch": torch.tensor(6.0),
    }
    full = FullKL(trainer, tiny_lm.model(1), BETA)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert full.events.since_log["kl/policy_ref"][1] == 6
    attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
    logits = [
        m(input_ids=ids, attention_mask=attention).logits[:, 3:-1] / 0.9
        for m in (trainer.model, tiny_lm.model(1))
    ]
    kl = divergence("policy_ref", *logits)[(inputs["completion_mask"] * tools) != 0].sum()
    steps = trainer.args.steps_per_generation
    assert float(loss.detach()) == pytest.approx(BETA * float(kl.detach()) / (6 / steps), rel=1e-5)


def test_undo_and_wrong_calls(tmp_path: Path) -> None:
    trainer = make("grpo", tmp_path)
    before = (dict(vars(trainer)), list(trainer.callback_handler.callbacks))
    full = FullKL(trainer, tiny_lm.model(1), 0.1)
    with pytest.raises(
        ValueError,
        match=r"FullKL: trainer: expected one without a FullKL, got one that has it already; "
        r"undo\(\) that one first",
    ):
        FullKL(trainer, tiny_lm.model(1), 0.1)
    full.undo()
    full.undo()
    assert (dict(vars(trainer)), list(trainer.callback_handler.callbacks)) == before
    assert not any(m._forward_hooks for m in trainer.model.modules())
    with pytest.raises(ValueError, match="FullKL: beta: expected a finite number >= 0, got -1"):
        FullKL(trainer, tiny_lm.model(1), -1.0)
    with pytest.raises(
        TypeError,
        match="FullKL: ref_model: expected a transformers causal language model with an "
        "output head, got Linear",
    ):
        FullKL(trainer, nn.Linear(2, 2), 0.1)
    cache = TopKReference.make(tiny_lm.model(), [[4, 5, 6]], k=4)
    with pytest.raises(
        ValueError,
        match="FullKL: ref_model: expected a model: the sequences of GRPO and RLOO are new at "
        "every step",
    ):
        FullKL(trainer, cache, 0.1)
    trainer.beta = 0.04
    with pytest.raises(
        ValueError,
        match=r"FullKL: trainer: expected GRPO with beta=0\.0, whose k3 estimate this takes "
        r"the place of, got beta=0\.04",
    ):
        FullKL(trainer, tiny_lm.model(1), 0.1)
    odpo = make("online_dpo", tmp_path)
    FullKL(odpo, tiny_lm.model(1), 0.1)
    with pytest.raises(
        RuntimeError, match="FullKL: OnlineDPOTrainer made a step without calling compute_loss"
    ):
        odpo.train()


# --- the cached reference -------------------------------------------------------------------------


def test_cache_of_the_whole_vocabulary_is_the_model(tmp_path: Path) -> None:
    """The command line writes the cache on the trainer's data.

    The trainer appends an end-of-text token that the cache has not.
    """
    model = tiny_lm.save(tmp_path / "reference", seed=1)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"prompt": p, "completion": c})
            for p, c in map(trl_runs.parts, trl_runs.TEXTS)
        )
    )
    assert (
        cli.main(
            [
                "kl",
                "cache",
                model,
                str(data),
                "--output",
                str(tmp_path / "cache.safetensors"),
                "--k",
                "260",
                "--batch-size",
                "3",
            ]
        )
        == 0
    )
    runs = []
    for ref in (str(tmp_path / "cache.safetensors"), tiny_lm.model(1)):
        trainer = make("sft", tmp_path)
        FullKL(trainer, ref, BETA, "ref_policy")
        runs.append(train(trainer))
    assert difference(*(run.model for run in runs)) <= ROUNDING
    assert history(runs[0], "kl/ref_policy") == pytest.approx(
        history(runs[1], "kl/ref_policy"), rel=1e-5
    )


def test_top_k_is_a_lower_bound(tmp_path: Path) -> None:
    rows = [r["input_ids"] for r in make("sft", tmp_path).train_dataset]
    values = []
    for k in (4, 64, 260):
        trainer = make("sft", tmp_path, max_steps=1)
        with attach(
            trainer,
            kl={
                "ref_model": TopKReference.make(tiny_lm.model(1), rows, k=k),
                "beta": BETA,
                "kind": "ref_policy",
            },
        ):
            values += history(train(trainer), "kl/ref_policy")
    assert 0 < values[0] < values[1] < values[2]


def test_cache_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make("sft", tmp_path)
    FullKL(trainer, TopKReference.make(tiny_lm.model(1), [[4, 5, 6, 7]], k=8), BETA)
    with pytest.raises(
        KeyError,
        match=r"expected one of the 1 cached sequences, got .* make the cache on the "
        r"sequences that the trainer trains on",
    ):
        trainer.train()
    with pytest.raises(
        ValueError,
        match=r"TopKReference\.make: sequences: expected at least one, each of at least 2 tokens",
    ):
        TopKReference.make(tiny_lm.model(), [[4]])
    model = tiny_lm.save(tmp_path / "reference")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a"}\n')
    assert cli.main(["kl", "cache", model, str(data)]) == 2
    assert (
        "row 1: expected input_ids, messages, conversations, text, or prompt with completion"
        in capsys.readouterr().err
    )
    data.write_text("{prompt\n")
    assert cli.main(["kl", "cache", model, str(data)]) == 2
    assert "row 1: no JSON" in capsys.readouterr().err


def test_cache_rows_for_either_padding(tmp_path: Path) -> None:
    model = tiny_lm.model(1)
    rows = [[4, 5, 6, 7, 8], [9, 10, 11]]
    path = tmp_path / "cache.safetensors"
    TopKReference.make(model, rows, k=3).save(path)
    cache = TopKReference.load(path)
    assert (len(cache), cache.k, cache.metadata["tokens"]) == (2, 3, 8)
    ids = torch.tensor([[4, 5, 6, 7, 8], [0, 0, 9, 10, 11], [9, 10, 11, 0, 0]])
    logp, top = cache.rows(ids, (ids != 0).long())
    with torch.no_grad():
        truth = model(input_ids=torch.tensor([rows[1]])).logits.log_softmax(-1)[0, :2].topk(3)
    for got_logp, got_top in ((logp[1, 2:], top[1, 2:]), (logp[2, :2], top[2, :2])):
        assert torch.equal(got_top, truth.indices)
        assert torch.allclose(got_logp, truth.values, atol=1e-5)
