"""EWC in Lightning's Trainer: callbacks=[EWCCallback(ewc)]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.ewc.attach import innermost
from fasttax.ewc.claims import claim
from fasttax.integrations._models import WHERE, anchor_hash, check_anchor, check_ewc, on_model

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.lightning: {error.name} is not installed; run `pip install "
        "'fasttax[lightning]'`",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC

OP = "EWCCallback"


class EWCCallback(Callback):
    """The EWC penalty's gradient at every optimizer step; logs `ewc/penalty` and `ewc/distance`.

    Args:
        ewc: an `fasttax.EWC` over parameters of the LightningModule (under FSDP2 made anew on the
            sharded ones).
        where: "pre_clip" adds it in `on_before_optimizer_step`, which Lightning calls after
            unscaling and before clipping (under manual optimization, when your code calls step:
            clipping is yours). "post_clip" adds it after `configure_gradient_clipping`, which only
            automatic optimization calls.

    Raises:
        TypeError, ValueError: when made; or as fitting begins: DeepSpeed, FSDP1, parameters that
            are not the module's or all frozen, or that something else applies EWC to in this run, a
            checkpoint made with another anchor.

    Example:
        >>> from fasttax.integrations.lightning import EWCCallback
        >>> trainer = lightning.Trainer(callbacks=[EWCCallback(ewc)], **options)
        >>> trainer.fit(module, rows)
    """

    def __init__(self, ewc: EWC, where: str = "pre_clip") -> None:
        check_ewc(OP, ewc)
        self.ewc = ewc
        self.where = checks.choice(OP, "where", where, WHERE)
        self._handle = Handle()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the penalty reaches the weights that are trained; wraps the clipping."""
        strategy = type(trainer.strategy).__name__
        if "DeepSpeed" in strategy:
            raise checks.fail(
                OP,
                "trainer",
                "a strategy other than DeepSpeed",
                strategy,
                "its engine keeps the gradients to itself; use ddp or fsdp2 "
                "(ModelParallelStrategy)",
            )
        self.ewc = on_model(OP, self.ewc, pl_module)
        self._claim(trainer.optimizers)
        if self.where == "post_clip":
            if not pl_module.automatic_optimization:
                raise checks.fail(
                    OP,
                    "where",
                    "'pre_clip' under manual optimization, where clipping is yours",
                    "'post_clip'",
                )
            self._handle.replace(
                pl_module,
                "configure_gradient_clipping",
                self._then_add(pl_module.configure_gradient_clipping),
                "configure_gradient_clipping",
            )

    def _claim(self, optimizers: Sequence[Any]) -> None:
        """The parameters for this callback, at the steps of each of the run's optimizers."""
        held, holder = self.ewc.parameters(), f"{OP}(where={self.where!r})"
        for optimizer in optimizers:
            own = claim(OP, "ewc", holder, held, innermost(optimizer))
            self._handle.on_undo(own.release)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """After unscaling and before clipping: adds the gradient, and logs."""
        if self.where == "pre_clip":
            self._add(optimizer)
        pl_module.log_dict(
            {"ewc/penalty": self.ewc.penalty().detach(), "ewc/distance": self.ewc.distance().total},
            on_step=True,
            on_epoch=False,
        )

    def _add(self, optimizer: Any) -> None:
        """The gradient of what this optimizer holds: another one steps the rest."""
        self.ewc.add_grad_(only=[p for group in optimizer.param_groups for p in group["params"]])

    def _then_add(self, clip: Callable[..., None]) -> Callable[..., None]:
        def configure_gradient_clipping(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clip(optimizer, *args, **kwargs)
            self._add(optimizer)

        return configure_gradient_clipping

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the module its own clipping back, and lets others hold the parameters."""
        self._handle.undo()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As `on_train_end`, which does not come after an exception."""
        self._handle.undo()

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The anchor's hash, which Lightning keeps in its checkpoints."""
        return {"anchor_hash": anchor_hash(self.ewc)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses another anchor than the one that the checkpoint was trained with."""
        check_anchor(OP, self.ewc, state_dict.get("anchor_hash"))
