"""EWC and KL in Lightning, Accelerate and plain PyTorch, against the penalty in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from fasttax.integrations.lightning import EWCCallback
from tests.tools import tiny_lm
from tests.tools.trainer_runs import ROUNDING, difference, held

LR, CLIP, STEPS, ACCUMULATION = 0.05, 1.0, 3, 2


class Module(lightning.LightningModule):
    def __init__(self, penalty: bool = False) -> None:
        super().__init__()
        self.lm = tiny_lm.model()
        self.ewc = held(self.lm)
        self.penalty = penalty

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.lm(input_ids=batch, labels=batch).loss
        return loss + self.ewc.penalty() if self.penalty else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def batches() -> list[Tensor]:
    return list(tiny_lm.ids(2 * STEPS * ACCUMULATION).split(2))


def fit(
    module: Module, folder: Path, callbacks: Any = (), clip: float = CLIP, **options: Any
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accumulate_grad_batches": ACCUMULATION,
        "accelerator": "cpu",
        "logger": False,
        "barebones": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        default_root_dir=folder,
        gradient_clip_val=clip,
        callbacks=list(callbacks),
        **{**settings, **options},
    )
    loader: Any = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=None)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_equals_the_penalty_in_the_loss(tmp_path: Path, precision: Any) -> None:
    module, oracle, plain = Module(), Module(penalty=True), Module()
    trainer = fit(module, tmp_path, [EWCCallback(module.ewc)], precision=precision)
    fit(oracle, tmp_path, precision=precision)
    fit(plain, tmp_path, precision=precision)
    assert difference(module.lm, oracle.lm) <= ROUNDING
    assert difference(plain.lm, oracle.lm) > 1e3 * ROUNDING
    assert set(trainer.callback_metrics) == {"ewc/penalty", "ewc/distance"}
    # of the weights before the last step
    assert float(trainer.callback_metrics["ewc/penalty"]) > float(module.ewc.penalty().detach()) > 0


def test_lightning_post_clip(tmp_path: Path) -> None:
    module, plain = Module(), Module()
    fit(module, tmp_path, [EWCCallback(module.ewc, where="post_clip")], max_steps=1)
    fit(plain, tmp_path, max_steps=1)
    start = Module()
    start.ewc.add_grad_()
    for p, a, b in zip(
        start.lm.parameters(), module.lm.parameters(), plain.lm.parameters(), strict=True
    ):
        assert p.grad is not None
        assert torch.allclose(b - LR * p.grad, a, rtol=0, atol=ROUNDING)
    assert "configure_gradient_clipping" not in vars(module)


def test_lightning_refuses_what_would_be_lost(tmp_path: Path) -> None:
    module, other = Module(), Module()
    with pytest.raises(
        ValueError,
        match="EWCCallback: ewc: expected parameters of the model being trained, got 21 that "
        "are not",
    ):
        fit(module, tmp_path, [EWCCallback(other.ewc)])
    with pytest.raises(
        ValueError, match="EWCCallback: where: expected one of 'pre_clip', 'post_clip', got 'prox'"
    ):
        EWCCallback(module.ewc, where="prox")
    callback = EWCCallback(module.ewc)
    state = callback.state_dict()
    callback.load_state_dict(state)
    moved = Module()
    with torch.no_grad():
        next(iter(moved.ewc.anchor.values())).add_(0.1)
    with pytest.raises(
        ValueError, match="expected the anchor that the checkpoint was trained with"
    ):
        EWCCallback(moved.ewc).load_state_dict(state)

    class DeepSpeedStrategy:
        pass

    class Trainer:
        strategy = DeepSpeedStrategy()

    with pytest.raises(
        ValueError, match="EWCCallback: trainer: expected a strategy other than DeepSpeed"
    ):
        callback.on_train_start(Trainer(), module)


def test_lightning_holds_the_parameters_alone(tmp_path: Path) -> None:
    """Beside another holder it is refused, whichever comes first; afterwards they go free."""

    class Attached(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.optimizer = super().configure_optimizers()
            self.handle = self.ewc.attach(self.optimizer)
            return self.optimizer

    module = Attached()
    with pytest.raises(ValueError, match=r"EWCCallback: ewc: .*EWC.attach\(SGD.*count twice"):
        fit(module, tmp_path, [EWCCallback(module.ewc)])
    module.handle.remove()

    class Second(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            trainer.lightning_module.ewc.attach(trainer.optimizers[0])

    plain = Module()
    callback = EWCCallback(plain.ewc)
    with pytest.raises(ValueError, match=r"EWCCallback\(where='pre_clip'\) holds.*count twice"):
        fit(plain, tmp_path, [callback, Second()])
    trainer = fit(plain, tmp_path, [callback])
    for optimizer in trainer.optimizers:
        plain.ewc.attach(optimizer).remove()
    fit(plain, tmp_path, [callback])


def test_accelerate_and_plain_loops_are_one() -> None:
    """add_grad_ between the last backward and clipping, as the examples have it."""
    from accelerate import Accelerator

    def plain(in_loss: bool) -> nn.Module:
        model = tiny_lm.model()
        ewc, optimizer = held(model), torch.optim.SGD(model.parameters(), lr=LR)
        for i, batch in enumerate(batches(), 1):
            loss = model(input_ids=batch, labels=batch).loss + (ewc.penalty() if in_loss else 0.0)
            (loss / ACCUMULATION).backward()
            if i % ACCUMULATION == 0:
                if not in_loss:
                    ewc.add_grad_()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        return model

    def accelerated() -> nn.Module:
        accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
        model = tiny_lm.model()
        ewc = held(model)
        model, optimizer, loader = accelerator.prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=LR),
            torch.utils.data.DataLoader(tiny_lm.ids(2 * STEPS * ACCUMULATION), batch_size=2),
        )
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                if accelerator.sync_gradients:
                    ewc.add_grad_()
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        return accelerator.unwrap_model(model)

    oracle = plain(in_loss=True)
    assert difference(plain(in_loss=False), oracle) <= ROUNDING
    assert difference(accelerated(), oracle) <= ROUNDING
