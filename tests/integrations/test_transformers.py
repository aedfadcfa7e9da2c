"""EWC and KL in transformers' Trainer, against a subclass that adds the penalty to the loss.

Runs differ in accumulation, clipping, fp16 and bf16, PEFT, resuming.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

import fasttax
from fasttax.integrations import AdaptiveKL, _trainer
from fasttax.integrations.transformers import EWCCallback, attach
from tests.tools import tiny_lm
from tests.tools.trainer_runs import (
    ROUNDING,
    STRENGTH,
    FakeArguments,
    FakeState,
    Rows,
    WithKL,
    arguments,
    difference,
    held,
    history,
)


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class WithPenalty(Trainer):
    """The oracle: the penalty in the loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            return loss + self.ewc.penalty()
        return loss + self.ewc.penalty() / self.current_gradient_accumulation_steps


def run(
    folder: Path, how: str, model: nn.Module | None = None, callbacks: Any = (), **changes: Any
) -> tuple[Trainer, fasttax.EWC]:
    model = tiny_lm.model() if model is None else model
    ewc = held(model)
    made: Any = {
        "model": model,
        "args": arguments(folder, **changes),
        "train_dataset": Rows(tiny_lm.ids()),
    }
    if how == "oracle":
        trainer: Trainer = WithPenalty(**made)
        trainer.ewc = ewc
    elif how == "none":
        trainer = Trainer(**made)
    elif how == "attach":
        trainer = Trainer(**made, callbacks=list(callbacks))
        attach(trainer, ewc=ewc)
    else:
        trainer = Trainer(**made, callbacks=[*callbacks, EWCCallback(ewc, where=how)])
    trainer.train()
    return trainer, ewc


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("pre_clip", {}),
        ("attach", {}),
        ("pre_clip", {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}),
        ("pre_clip", {"bf16": True}),
        ("attach", {"gradient_accumulation_steps": 3}),
    ],
)
def test_equals_the_penalty_in_the_loss(tmp_path: Path, how: str, changes: Any) -> None:
    ours, _ = run(tmp_path, how, **changes)
    oracle, _ = run(tmp_path, "oracle", **changes)
    plain, _ = run(tmp_path, "none", **changes)
    assert difference(ours.model, oracle.model) <= ROUNDING
    assert difference(plain.model, oracle.model) > 1e3 * ROUNDING  # else the penalty would not show
    assert history(ours, "grad_norm") == pytest.approx(history(oracle, "grad_norm"), rel=1e-5)
    assert history(plain, "grad_norm") != pytest.approx(history(oracle, "grad_norm"), rel=1e-2)


def test_post_clip_adds_the_whole_gradient_after_clipping(tmp_path: Path) -> None:
    """One step of SGD: theta - lr * (clipped task gradient + penalty's gradient)."""
    ours, _ = run(tmp_path, "post_clip", max_steps=1)
    plain, _ = run(tmp_path, "none", max_steps=1)
    assert history(ours, "grad_norm") == history(plain, "grad_norm")
    model = tiny_lm.model()
    held(model).add_grad_()
    for p, a, b in zip(
        model.parameters(), ours.model.parameters(), plain.model.parameters(), strict=True
    ):
        assert p.grad is not None
        assert torch.allclose(b - 0.05 * p.grad, a, rtol=0, atol=ROUNDING)


def test_frozen_parameters_stay_and_lora_factors_are_held(tmp_path: Path) -> None:
    import peft

    def lora() -> nn.Module:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_lm.model(), config)

    ours, oracle = run(tmp_path, "attach", lora())[0], run(tmp_path, "oracle", lora())[0]
    assert difference(ours.model, oracle.model) <= ROUNDING
    assert difference(ours.model, lora()) > 1e3 * ROUNDING


def test_the_handler_that_runs_is_the_caller_of_an_event() -> None:
    """An event is handed no handler; what finds it rests on who calls the event."""
    from transformers.trainer_callback import CallbackHandler

    found: list[Any] = []

    class Asking(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(_trainer.calling(CallbackHandler, lambda h: self in h.callbacks))
            found.append(_trainer.calling(CallbackHandler, lambda h: False))
            _trainer.move_to_the_front(self)

    asking, flow = Asking(), DefaultFlowCallback()
    handler = CallbackHandler([flow, asking], None, None, None, None)
    handler.call_event("on_train_begin", None, TrainerState(), TrainerControl())
    assert found == [handler, None]
    assert handler.callbacks == [asking, flow]
    found.clear()
    asking.on_train_begin(None, TrainerState(), TrainerControl())  # nobody runs it
    assert found == [None, None]
    assert handler.callbacks == [asking, flow]


def test_metrics_reach_history_and_reporters(tmp_path: Path) -> None:
    """The reporter is there before the callback, as those of report_to are."""
    reporter = Reporter()
    trainer, ewc = run(tmp_path, "pre_clip", callbacks=[reporter])
    for name in ("ewc/penalty", "ewc/distance"):
        values = history(trainer, name)
        assert len(values) == 3
        assert [entry[name] for entry in reporter.seen if name in entry] == values
    assert history(trainer, "ewc/penalty")[-1] == float(ewc.penalty().detach())
    assert history(trainer, "ewc/distance")[-1] == float(ewc.distance().total)
    assert history(trainer, "ewc/penalty")[-1] == pytest.approx(
        STRENGTH / 2 * history(trainer, "ewc/distance")[-1]
    )


def test_a_second_ewc_in_one_run_is_refused(tmp_path: Path) -> None:
    """The callback and `attach`, or either twice, before a step; without it training runs."""
    trainer = Trainer(tiny_lm.model(), arguments(tmp_path), train_dataset=Rows(tiny_lm.ids()))
    ewc = held(trainer.model)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    attach(trainer, ewc=ewc, where="post_clip")
    second = attach(trainer, ewc=ewc)
    with pytest.raises(ValueError, match=r"EWCCallback\(where='p.*_clip'\) holds.*count twice"):
        trainer.train()
    assert all(torch.equal(a, p) for a, p in zip(before, trainer.model.parameters(), strict=True))
    second.undo()
    trainer.train()
    ewc.attach(torch.optim.SGD(trainer.model.parameters(), lr=0.1)).remove()


def test_undo_takes_everything_back(tmp_path: Path) -> None:
    ref = tiny_lm.model(1)
    trainer = Trainer(tiny_lm.model(), arguments(tmp_path), train_dataset=Rows(tiny_lm.ids()))
    before = (dict(vars(trainer)), list(trainer.callback_handler.callbacks), hooks(trainer.model))
    with attach(trainer, ewc=held(trainer.model), kl={"ref_model": ref, "beta": 0.1}) as handle:
        assert hooks(trainer.model) != before[2]
        assert "compute_loss" in vars(trainer)
    handle.undo()
    assert (
        dict(vars(trainer)),
        list(trainer.callback_handler.callbacks),
        hooks(trainer.model),
    ) == before
    trainer.train()
    plain, _ = run(tmp_path, "none")
    assert difference(trainer.model, plain.model) == 0.0


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_fp16_gradient_carries_the_loss_scale() -> None:
    """The Trainer's own order of calls on a scaler of the CPU, which has no fp16 itself."""
    from accelerate.optimizer import AcceleratedOptimizer

    states = []
    for scale in (1.0, 1024.0):
        model = tiny_lm.model()
        ewc, sgd = held(model), torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = AcceleratedOptimizer(sgd, device_placement=False, scaler=scaler)
        callback = EWCCallback(ewc)
        callback.on_step_begin(None, None, None, optimizer=optimizer)
        batch = tiny_lm.ids(2)
        scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
        scaler.unscale_(sgd)
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        states.append(model)
    assert difference(*states) <= ROUNDING
    assert difference(states[0], tiny_lm.model()) > 1e3 * ROUNDING


def test_a_broken_window_is_not_primed_twice() -> None:
    model = tiny_lm.model()
    callback = EWCCallback(held(model))
    callback.on_step_begin(None, None, None, optimizer=None)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    callback.on_step_begin(None, None, None, optimizer=None)
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(once, model.parameters(), strict=True)
        if p.grad is not None
    )


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    changes: Any = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = run(tmp_path / "whole", "pre_clip", **changes)
    folder = str(tmp_path / "whole" / "checkpoint-2")
    model = tiny_lm.model()
    trainer = Trainer(
        model,
        arguments(tmp_path / "whole", **changes),
        train_dataset=Rows(tiny_lm.ids()),
        callbacks=[EWCCallback(held(model))],
    )
    trainer.train(resume_from_checkpoint=folder)
    assert difference(trainer.model, whole.model) == 0.0
    model = tiny_lm.model()
    fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    other = Trainer(
        model,
        arguments(tmp_path / "whole", **changes),
        train_dataset=Rows(tiny_lm.ids()),
        callbacks=[EWCCallback(fasttax.EWC(model, fisher, strength=1.0))],
    )
    with pytest.raises(
        ValueError,
        match=r"ewc: expected the anchor that the checkpoint was trained with .* build the "
        r"EWC on the base model",
    ):
        other.train(resume_from_checkpoint=folder)


# --- KL -------------------------------------------------------------------------------------------


def test_attached_kl_is_the_kl_in_the_loss(tmp_path: Path) -> None:
    models = []
    for oracle in (True, False):
        made: Any = {
            "model": tiny_lm.model(),
            "args": arguments(tmp_path),
            "train_dataset": Rows(tiny_lm.ids()),
        }
        trainer = (WithKL if oracle else Trainer)(**made)
        if oracle:
            trainer.ref = tiny_lm.model(1)
        else:
            attach(trainer, kl={"ref_model": tiny_lm.model(1), "beta": 0.3})
        trainer.train()
        models.append(trainer)
    assert difference(models[0].model, models[1].model) <= 4 * ROUNDING
    assert history(models[0], "loss") == pytest.approx(history(models[1], "loss"), rel=1e-5)
    for name in ("kl/policy_ref", "kl/ref_policy", "entropy"):
        values = history(models[1], name)
        assert len(values) == 3
        assert min(values) > 1e-3


def test_adaptive_kl_steers_and_resumes(tmp_path: Path) -> None:
    def trained(steps: int, resume: bool = False) -> tuple[Trainer, AdaptiveKL]:
        control = AdaptiveKL(target=0.05, beta=0.2, horizon=2.0)
        changes: Any = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        trainer = Trainer(
            tiny_lm.model(), arguments(tmp_path, **changes), train_dataset=Rows(tiny_lm.ids())
        )
        attach(trainer, kl={"ref_model": tiny_lm.model(1), "beta": control})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
        return trainer, control

    trainer, control = trained(2)
    kl = history(trainer, "kl/policy_ref")
    assert min(kl) > 0.1  # twice the target and more: every error is clipped
    assert control.beta == pytest.approx(0.2 * 1.1**2)
    assert history(trainer, "kl/beta") == pytest.approx([0.22, 0.242])
    resumed, again = trained(2, resume=True)
    assert again.beta == pytest.approx(control.beta)
    assert difference(resumed.model, trainer.model) == 0.0


def test_adaptive_kl_alone() -> None:
    control = AdaptiveKL(target=0.1, beta=1.0, horizon=10.0)
    assert control.update(0.1) == 1.0
    assert control.update(0.11) == pytest.approx(1.01)  # error 0.1, a tenth of the horizon
    assert control.update(0.0) == pytest.approx(1.01 * 0.98)
    assert AdaptiveKL(0.1, 1.0, 10.0, clip=0.5).update(1.0) == pytest.approx(1.05)  # its bound
    other = AdaptiveKL(target=0.1)
    other.load_state_dict(control.state_dict())
    assert other.beta == control.beta
    for bad in (-0.1, float("nan")):
        with pytest.raises(
            ValueError, match=r"AdaptiveKL\.update: kl: expected a finite number >= 0"
        ):
            control.update(bad)
    with pytest.raises(ValueError, match="AdaptiveKL: target: expected a finite number > 0"):
        AdaptiveKL(target=0.0)


# --- what can't work says so ----------------------------------------------------------------------


def test_wrong_calls(tmp_path: Path) -> None:
    model = tiny_lm.model()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(tiny_lm.ids()))
    ewc = held(model)
    with pytest.raises(
        ValueError,
        match="EWCCallback: where: expected one of 'pre_clip', 'post_clip', got 'middle'",
    ):
        EWCCallback(ewc, where="middle")
    with pytest.raises(TypeError, match=r"EWCCallback: ewc: expected a fasttax\.EWC"):
        EWCCallback(model)
    with pytest.raises(ValueError, match="attach: ewc and kl: expected at least one of the two"):
        attach(trainer)
    with pytest.raises(TypeError, match="attach: kl: expected a mapping"):
        attach(trainer, kl=0.1)
    with pytest.raises(
        ValueError,
        match="attach: kl: expected one of 'ref_model', 'beta', 'kind', 'temperature', "
        "'jsd_beta', 'estimator', 'evaluate', got 'reference'",
    ):
        attach(trainer, kl={"reference": model, "beta": 0.1})
    with pytest.raises(
        ValueError,
        match="FullKL: kind: expected one of 'policy_ref', 'ref_policy', 'jsd', 'renyi', "
        "got 'forward'",
    ):
        attach(trainer, kl={"ref_model": tiny_lm.model(1), "beta": 0.1, "kind": "forward"})
    with pytest.raises(
        ValueError, match="FullKL: ref_model: expected a model of its own, got the policy itself"
    ):
        attach(trainer, kl={"ref_model": model, "beta": 0.1})
    with pytest.raises(
        ValueError, match="FullKL: ref_model: expected a model or a TopKReference, got None"
    ):
        attach(trainer, kl={"ref_model": None, "beta": 0.1})
    with pytest.raises(TypeError, match=r"attach: trainer: expected a transformers\.Trainer"):
        attach(model, ewc=ewc)
    assert hooks(model) == hooks(tiny_lm.model())
    assert "compute_loss" not in vars(trainer)


def test_settings_that_would_lose_the_penalty_are_refused(tmp_path: Path) -> None:
    model = tiny_lm.model()
    callback = EWCCallback(held(model))
    args = FakeArguments()
    with pytest.raises(
        ValueError,
        match=r"ewc: expected parameters of the model being trained, got 21 that are not",
    ):
        callback.on_train_begin(args, FakeState(), None, model=tiny_lm.model())
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="ewc: expected at least one trainable parameter, got 21 frozen ones"
    ):
        callback.on_train_begin(args, FakeState(), None, model=model)
    deepspeed: Any = {"zero_optimization": {"stage": 3}}
    args.deepspeed = deepspeed
    with pytest.raises(
        ValueError,
        match=r"trainer: expected a run without DeepSpeed, got one under DeepSpeed; its engine "
        r"clips, steps.*use attach\(trainer, ewc=ewc\)",
    ):
        callback.on_train_begin(args, FakeState(), None, model=model)
    trainer = Trainer(tiny_lm.model(), arguments(tmp_path), train_dataset=Rows(tiny_lm.ids()))
    trainer.args.deepspeed = "zero3.json"
    with pytest.raises(ValueError, match="'pre_clip' under DeepSpeed, whose engine clips within"):
        attach(trainer, ewc=held(trainer.model), where="post_clip")
    with pytest.raises(ValueError, match="trainer: expected a run without DeepSpeed, for replay"):
        attach(trainer, replay={"loader": [tiny_lm.ids(2)]})
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO-3, which scatters the head"):
        attach(trainer, kl={"ref_model": tiny_lm.model(1), "beta": 0.1})


def test_a_kl_that_would_be_missing_is_an_error(tmp_path: Path) -> None:
    trainer = Trainer(tiny_lm.model(), arguments(tmp_path), train_dataset=Rows(tiny_lm.ids()))
    attach(trainer, kl={"ref_model": tiny_lm.model(1), "beta": 0.3})
    trainer.model_wrapped = trainer.model = tiny_lm.model(2)  # not the one that was hooked
    with pytest.raises(RuntimeError, match="FullKL: the policy's forward was not seen"):
        trainer.train()
