"""What `evaluate()` says with FullKL and EWC on a trainer, and what reporters get of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import fasttax
from fasttax.integrations import AdaptiveKL
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import EWCCallback, attach
from fasttax.integrations.trl import FullKL
from tests.tools import tiny_lm
from tests.tools.kl_steps import Rows, shaken
from tests.tools.trl_runs import make

BETA = 0.3


class Reporter(TrainerCallback):
    """What W&B, TensorBoard and Trackio are given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def batch(seed: int, rows: int = 6) -> dict[str, Tensor]:
    ids = tiny_lm.ids(rows, seed=seed)
    # rows that count different numbers of tokens
    labels = torch.where(torch.arange(ids.shape[1]) > torch.arange(rows)[:, None], ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trainer(folder: Path, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return Trainer(
        tiny_lm.model(),
        TrainingArguments(str(folder), **options),
        train_dataset=Rows(batch(3)),
        eval_dataset=Rows(batch(4)),
        callbacks=[Reporter()],
    )


def reporter(of: Any) -> Reporter:
    return next(c for c in of.callback_handler.callbacks if isinstance(c, Reporter))


@torch.no_grad()
def mean_kl(policy: Any, ref: Any, batches: list[Any], kind: Any = "policy_ref") -> float:
    """Over the tokens that count, from whole logits in float64."""
    total, tokens = 0.0, 0
    for given in batches:
        inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
        if "labels" in given:
            mask = given["labels"][:, 1:] != -100
        else:
            mask = given["completion_mask"][:, 1:] != 0
        x, y = (m.eval()(**inputs).logits[:, :-1].double() for m in (policy, ref))
        total += float(fasttax.token_kl(x, y, kind=kind, mask=mask, reduction="sum"))
        tokens += int(mask.sum())
    return total / tokens


@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd"])
def test_evaluate_has_the_kl(kind: Any, tmp_path: Path) -> None:
    of, ref, key = trainer(tmp_path), tiny_lm.model(1), f"eval_kl/{kind}"
    plain = of.evaluate()
    assert key not in plain
    with FullKL(of, ref, BETA, kind):
        before = of.evaluate()
        wanted = mean_kl(of.model, ref, [batch(4)], kind)
        assert before[key] == pytest.approx(wanted, rel=1e-5)
        assert before["eval_loss"] == plain["eval_loss"]
        of.train()
        logs = [log for log in reporter(of).seen if key in log]
        assert len(logs) == 3
        after = mean_kl(of.model, ref, [batch(4)], kind)
        assert logs[-1][key] == pytest.approx(after, rel=1e-5)
        assert after != pytest.approx(wanted, rel=1e-3)
        history = [log[key] for log in of.state.log_history if key in log]
        assert history == [log[key] for log in logs[1:]]
        tested = of.predict(Rows(batch(5)))
        assert tested.metrics[f"test_kl/{kind}"] == pytest.approx(
            mean_kl(of.model, ref, [batch(5)], kind), rel=1e-5
        )
    assert key not in of.evaluate()
    assert "evaluation_loop" not in vars(of)


def test_evaluate_false_asks_the_reference_nothing(tmp_path: Path) -> None:
    of, ref = trainer(tmp_path), tiny_lm.model(1)
    called: list[Any] = []
    ref.register_forward_hook(lambda *_: called.append(1))
    with attach(of, kl={"ref_model": ref, "beta": BETA, "evaluate": False}):
        assert "eval_kl/policy_ref" not in of.evaluate()
    assert not called
    with attach(of, kl={"ref_model": ref, "beta": BETA}):
        assert of.evaluate()["eval_kl/policy_ref"] > 0
    assert called


def test_several_data_sets_and_the_best_checkpoint(tmp_path: Path) -> None:
    of = trainer(
        tmp_path,
        metric_for_best_model="b_kl/policy_ref",
        greater_is_better=False,
        save_strategy="best",
        max_steps=1,
    )
    of.eval_dataset = {"a": Rows(batch(4)), "b": Rows(batch(5))}
    ref = tiny_lm.model(1)
    ones = {n: torch.ones_like(p) for n, p in of.model.named_parameters()}
    ewc = fasttax.EWC(of.model, ones, strength=2.0)
    with attach(of, kl={"ref_model": ref, "beta": BETA}, ewc=ewc):
        of.train()
    last = {k: v for log in of.state.log_history for k, v in log.items() if k.startswith("eval_")}
    for name, seed in (("a", 4), ("b", 5)):
        wanted = mean_kl(of.model, ref, [batch(seed)])
        assert last[f"eval_{name}_kl/policy_ref"] == pytest.approx(wanted, rel=1e-5)
        assert last[f"eval_{name}_ewc/penalty"] == pytest.approx(float(ewc.penalty()), rel=1e-6)
    assert of.state.best_metric == last["eval_b_kl/policy_ref"]


@pytest.mark.parametrize("by", ["callback", "attach"])
def test_evaluate_has_the_penalty(by: str, tmp_path: Path) -> None:
    of = trainer(tmp_path)
    ones = {n: torch.ones_like(p) for n, p in of.model.named_parameters()}
    ewc = fasttax.EWC(of.model, ones, strength=2.0)
    if by == "callback":
        of.add_callback(EWCCallback(ewc))
    else:
        attach(of, ewc=ewc)
    assert of.evaluate()["eval_ewc/penalty"] == 0.0
    of.train()
    penalty = float(ewc.penalty())
    assert penalty > 0
    assert of.evaluate()["eval_ewc/penalty"] == pytest.approx(penalty, rel=1e-6)
    logs = [log["eval_ewc/penalty"] for log in reporter(of).seen if "eval_ewc/penalty" in log]
    # the first evaluation, before training, is one that reporters see before a callback is in front
    assert logs[-2:] == pytest.approx([penalty] * 2, rel=1e-6)
    assert of.state.log_history[-1]["eval_ewc/penalty"] == pytest.approx(penalty, rel=1e-6)


def test_the_penalty_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the log and for what `evaluate()` returns; anew at the next evaluation."""
    of = trainer(tmp_path)
    ones = {n: torch.ones_like(p) for n, p in of.model.named_parameters()}
    ewc = fasttax.EWC(of.model, ones, strength=2.0)
    own, calls = fasttax.EWC.penalty, []

    def counted(self: fasttax.EWC) -> Tensor:
        calls.append(self)
        return own(self)

    monkeypatch.setattr(fasttax.EWC, "penalty", counted)
    with attach(of, ewc=ewc):
        for times in (1, 2):
            with torch.no_grad():
                of.model.lm_head.weight.add_(0.1)
            found = of.evaluate()
            assert len(calls) == times
            assert found["eval_ewc/penalty"] == float(own(ewc).detach())
        of.log({"eval_loss": 1.0})  # not an evaluation's
        assert len(calls) == 3
        with torch.no_grad():
            of.model.lm_head.weight.add_(0.1)
        assert of.evaluate()["eval_ewc/penalty"] == float(own(ewc).detach())


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_trls_losses_that_call_more_than_the_policy(name: str, tmp_path: Path) -> None:
    """DPO calls its reference, KTO the policy on mismatched pairs before the batch's own.

    KTO logs an `eval_kl` of its own: the mean log-ratio of the mismatched pairs.
    """
    of, ref = make(name, tmp_path), tiny_lm.model(1)
    batches: list[Any] = []
    step = of.prediction_step

    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(of._prepare_inputs(inputs))
        return step(model, inputs, *args, **kwargs)

    of.prediction_step = watched
    with FullKL(of, ref, BETA):
        found = of.evaluate(of.train_dataset)["eval_kl/policy_ref"]
    assert found == pytest.approx(mean_kl(of.model, ref, batches), rel=1e-4)


def test_grpos_own_samples(tmp_path: Path) -> None:
    of = make("grpo", tmp_path, per_device_eval_batch_size=2)
    with FullKL(of, tiny_lm.model(1), BETA):
        assert of.evaluate(of.train_dataset)["eval_kl/policy_ref"] > 1e-3
    same = tiny_lm.model()
    same.load_state_dict(of.model.state_dict())
    with FullKL(of, same, BETA):
        assert of.evaluate(of.train_dataset)["eval_kl/policy_ref"] == 0.0


def test_the_policy_without_its_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    of = trainer(tmp_path)
    base = tiny_lm.model()
    of.model = shaken(
        get_peft_model(of.model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0))
    )
    with FullKL(of, None, BETA):
        found = of.evaluate()["eval_kl/policy_ref"]
    assert found == pytest.approx(mean_kl(of.model, base, [batch(4)]), rel=1e-4)


def test_a_file_of_the_evaluations_sequences_or_not(tmp_path: Path) -> None:
    of, ref = trainer(tmp_path), tiny_lm.model(1)
    V = ref.config.vocab_size
    trained, evaluated = (batch(seed)["input_ids"].tolist() for seed in (3, 4))
    with FullKL(of, TopKReference.make(ref, [*trained, *evaluated], k=V), BETA):
        found = of.evaluate()["eval_kl/policy_ref"]
    assert found == pytest.approx(mean_kl(of.model, ref, [batch(4)]), rel=1e-4)
    some = TopKReference.make(ref, [*trained, *evaluated[:3]], k=V)
    with FullKL(of, some, BETA), pytest.warns(UserWarning, match="sequences that .* has not"):
        metrics = of.evaluate()
    assert "eval_kl/policy_ref" not in metrics
    assert "eval_loss" in metrics


def test_an_evaluation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    of, ref = trainer(tmp_path), tiny_lm.model(1)
    with FullKL(of, ref, BETA):

        class Broken(Rows):
            def __getitem__(self, i: int) -> dict[str, Tensor]:
                if i == 5:
                    raise OSError("disk")
                return super().__getitem__(i)

        with pytest.raises(OSError, match="disk"):
            of.evaluate(Broken(batch(5)))
        found = of.evaluate()["eval_kl/policy_ref"]
    assert found == pytest.approx(mean_kl(of.model, ref, [batch(4)]), rel=1e-5)


def test_the_keys_that_the_docs_promise_reporters(tmp_path: Path) -> None:
    """Each of docs/trainers.md's in a run, and as W&B, TensorBoard and Trackio rename them."""
    from transformers.integrations.integration_utils import rewrite_logs

    text = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    table = text.partition("## Logs and evaluations")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| with")]
    promised = {key for row in rows for key in re.findall(r"`(\w+(?:/\w+)?)`", row[2])}
    shown = {key for row in rows for key in re.findall(r"`([\w/]+)`", row[3])}
    assert len(promised) == 13
    base, general = tiny_lm.model(1), [batch(7, 2)]
    seen: dict[str, Any] = {}
    for replay, project in (("lm", None), ("kl", None), (None, {"general": general})):
        of = trainer(tmp_path, max_steps=1)
        ones = {n: torch.ones_like(p) for n, p in of.model.named_parameters()}
        more: Any = {"project": project}
        if replay is not None:
            more = {"replay": {"loader": general, "kind": replay, "ref_model": base}}
            more["replay"] |= {} if replay == "kl" else {"ref_model": None}
        attach(
            of,
            ewc=fasttax.EWC(of.model, ones, strength=2.0),
            kl={"ref_model": base, "beta": AdaptiveKL(target=0.05)},
            log_quadratic={"ref_model": base, "batches": general},
            **more,
        )
        of.train()
        for log in reporter(of).seen:
            seen |= log
    assert promised <= set(seen)
    assert shown == {"train/kl/policy_ref", "eval/kl/policy_ref"} <= set(rewrite_logs(seen))
