"""EWC under DeepSpeed, whose engine clips, steps and clears the gradients by itself.

    engine, *_ = deepspeed.initialize(model=model, ...)
    handle = attach(engine, ewc)               # ewc = fasttax.EWC(model, ...), made before

In transformers' Trainer `fasttax.integrations.transformers.attach(trainer, ewc=ewc)` does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax._base import checks, dtensor
from fasttax._base.handle import Handle
from fasttax.ewc import ops
from fasttax.ewc.claims import claim
from fasttax.ewc.drift import Drift
from fasttax.ewc.hold import Hold
from fasttax.integrations._models import check_ewc
from fasttax.integrations._shares import Share, Shares, trainable

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC

OP = "deepspeed.attach"
WAY_OUT = "use ZeRO-2, or FSDP2"
SHARDED = 3  # the ZeRO stage whose parameters lie scattered over the ranks


class UnderDeepSpeed(Handle):
    """What `attach` returns: `undo()`, and the penalty as it is, for a log.

    Without ZeRO and under ZeRO-1 and 2 parameters are whole on every rank: the penalty is part of
    the loss of an accumulation window's last backward. Under ZeRO-3 the gradient is added to each
    rank's own share of the averaged gradient, before the engine's step clips it.

    Example:
        >>> from fasttax.integrations import deepspeed
        >>> handle = deepspeed.attach(engine, ewc)
        >>> penalty, drift = handle.penalty(), handle.distance()
        >>> handle.undo()
    """

    def __init__(self, engine: Any, ewc: EWC) -> None:
        super().__init__()
        self.engine, self.ewc = engine, ewc
        self._added = False
        shared = engine.zero_optimization_stage() >= SHARDED
        self.shares = _ZeroShares(engine, ewc.hold) if shared else None
        holder = f"{OP}(ZeRO-{engine.zero_optimization_stage()})"
        with self.or_undone():
            self.on_undo(claim(OP, "ewc", holder, ewc.parameters()).release)
            if self.shares is None:
                self.replace(engine, "backward", self._backward(engine.backward), "engine.backward")
            self.replace(engine, "step", self._step(engine.step), "engine.step")

    def penalty(self) -> Tensor:
        """strength/2 * sum fisher * (theta - anchor)^2, 0-d, without a graph; a collective."""
        if self.shares is None:
            return self.ewc.penalty().detach()
        return self.shares.penalty()

    def distance(self) -> Drift:
        """As `EWC.distance`; under ZeRO-3 a collective."""
        return self.ewc.distance() if self.shares is None else self.shares.distance()

    def _backward(self, backward: Any) -> Any:
        def with_penalty(loss: Any, *args: Any, **kwargs: Any) -> Any:
            if args:  # of which DeepSpeed's own decorators hide the names
                raise TypeError(
                    f"{OP}: engine.backward: expected the loss alone by position, got "
                    f"{len(args)} arguments more; give retain_graph and scale_wrt_gas by name"
                )
            if self.engine.is_gradient_accumulation_boundary():
                divided = kwargs.get("scale_wrt_gas", True)
                times = self.engine.gradient_accumulation_steps() if divided else 1
                loss = loss + self.ewc.penalty() * times
                self._added = True
            return backward(loss, **kwargs)

        return with_penalty

    def _step(self, step: Any) -> Any:
        def with_penalty(*args: Any, **kwargs: Any) -> Any:
            if self.engine.is_gradient_accumulation_boundary():
                if self.shares is not None:
                    self.shares.add_grad_()
                elif not self._added:
                    raise RuntimeError(
                        f"{OP}: engine.step: expected the window's last engine.backward(loss) "
                        "before it, got none that knew it was the last, so that the penalty would "
                        "be missing; call engine.backward(loss), not loss.backward(), and leave "
                        "managed_gradient_accumulation on"
                    )
                self._added = False
            return step(*args, **kwargs)

        return with_penalty


def attach(engine: Any, ewc: EWC) -> UnderDeepSpeed:
    """The penalty's gradient at every step of a DeepSpeed engine, whatever its ZeRO stage.

    Once a step whatever the accumulation, before clipping, with fp16's loss scale. What
    `engine.backward` returns has the penalty in it; the trainer's own loss is left alone.

    Args:
        engine: as `deepspeed.initialize` returns it, for training.
        ewc: an `fasttax.EWC` of the engine's model, made before it. For a model that ZeRO-3 has
            scattered already (`zero.Init`, or `from_pretrained` under a live ZeRO-3 configuration)
            make it `with deepspeed.zero.GatheredParameters(list(model.parameters())):`. Under
            ZeRO-3 each rank takes its share of Fisher and anchor; drop `ewc` itself to free the
            whole ones.

    Returns:
        A handle with `undo()`, `penalty()` and `distance()`.

    Raises:
        TypeError, ValueError: no engine or EWC; parameters that are not the engine's, or that
            something else holds; under ZeRO-3 LoRA updates, Kronecker factors, or parameters on
            NVMe.

    Example:
        >>> from fasttax.integrations import deepspeed
        >>> with deepspeed.attach(engine, ewc):
        ...     for batch in loader:
        ...         loss = engine.backward(engine(**batch).loss)
        ...         engine.step()
    """
    needed = ("zero_optimization_stage", "is_gradient_accumulation_boundary", "backward", "step")
    if not all(callable(getattr(engine, name, None)) for name in needed):
        raise checks.fail(
            OP,
            "engine",
            "a deepspeed.DeepSpeedEngine",
            engine,
            "pass what deepspeed.initialize returns first",
            TypeError,
        )
    check_ewc(OP, ewc)
    live = {id(p) for p in engine.module.parameters()}
    strangers = [name for name, p in ewc.parameters().items() if id(p) not in live]
    if strangers:
        raise checks.fail(
            OP,
            "ewc",
            "parameters of engine.module",
            f"{len(strangers)} that are not, as {strangers[0]}",
            "build the EWC on the model that was given to deepspeed.initialize",
        )
    return UnderDeepSpeed(engine, ewc)


@torch.no_grad()
def penalty(ewc: EWC) -> Tensor:
    """`ewc.penalty()` without a graph and without an engine's steps, 0-d; a collective.

    Of parameters that ZeRO-3 has scattered one after another is whole on a rank.

    Args:
        ewc: an `fasttax.EWC` of the model, made while its parameters were whole.

    Returns:
        strength/2 * sum fisher * (theta - anchor)^2, 0-d.

    Raises:
        ValueError: LoRA updates or Kronecker factors under ZeRO-3.

    Example:
        >>> from fasttax.integrations import deepspeed
        >>> value = deepspeed.penalty(ewc)
    """
    hold = ewc.hold
    if not any(hasattr(p, "ds_id") for p in hold.parameters().values()):
        return hold.penalty()
    from deepspeed import zero

    values = []
    for held in trainable(OP, hold, "ZeRO-3", WAY_OUT):
        with zero.GatheredParameters([held.theta]):
            values += [hold.value_of(x) for x in hold.store.stream([[held]])]
    return torch.stack(values).sum()


class _ZeroShares(Shares):
    """An EWC's trainable parameters as ZeRO-3 has them: a share of master and gradient each.

    Shares are filled up to a size that all ranks have.
    """

    def __init__(self, engine: Any, hold: Hold) -> None:
        held = trainable(OP, hold, "ZeRO-3", WAY_OUT)
        scattered = [h for h in held if hasattr(h.theta, "ds_id")]
        if len(scattered) != len(held) or not held:
            raise checks.fail(
                OP,
                "ewc",
                "trainable parameters that ZeRO-3 has scattered",
                f"{len(scattered)} of {len(held)}",
                "make the EWC before deepspeed.initialize, on the same model",
            )
        self.optimizer = engine.optimizer
        self.group = held[0].theta.ds_process_group  # type: ignore[attr-defined]
        shares = []
        for h in held:
            fisher, anchor = (_share(h.theta, t) for t in (h.fisher.decode(), h.decoded_anchor()))
            shares.append(Share.of(h, fisher, anchor, hold.storage))
        super().__init__(hold, shares)

    @torch.no_grad()
    def add_grad_(self) -> None:
        """Adds the gradient to this rank's share of the averaged one."""
        grads = [self.optimizer.get_local_fp32_grad_for_param(s.theta) for s in self.shares]
        grads = [g.contiguous() for g in grads]
        scale = float(self.optimizer.loss_scale)
        values = self.values()
        ops.add_grad_(values, grads, *self.beside(values), self.hold.strength, scale)
        for s, grad in zip(self.shares, grads, strict=True):
            self.optimizer.set_local_grad_for_param(grad, s.theta)

    def values(self) -> list[Tensor]:
        """The masters."""
        return [self.optimizer.get_local_fp32_param(s.theta) for s in self.shares]

    def over_ranks(self, values: Tensor) -> Tensor:
        """Over ZeRO's ranks."""
        dist.all_reduce(values, group=self.group)
        return values


def _share(theta: Any, whole: Tensor) -> Tensor:
    """This rank's share of a tensor of theta's shape, as ZeRO-3 cuts: flat, in equal parts."""
    size = int(theta.ds_tensor.ds_numel)
    rank = dist.get_rank(theta.ds_process_group)
    first, count = dtensor.part_size(
        whole.numel(), dist.get_world_size(theta.ds_process_group), rank
    )
    share = whole.new_zeros(size)
    share[:count] = whole.reshape(-1)[first : first + count]
    return share
