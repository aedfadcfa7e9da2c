"""AdamW and EWC in one pass over the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from fasttax import reference
from fasttax._base import checks, dtensor
from fasttax._base.library import define
from fasttax.ewc.attach import check_optimizer
from fasttax.ewc.ewc import EWC
from fasttax.ewc.store import Lists

MODES = ("grad", "prox")
FISHERS = ("ewc", "second_moment")


class AdamWEWC(AdamW):
    """AdamW whose step holds the parameters that `ewc` covers, in the pass over memory that AdamW
    makes anyway.

    With g the gradient (negated under maximize), a the anchor and F the Fisher,

        mode "grad":  g <- g + strength F (theta - a), before the moments see it: `ewc.add_grad_()`
        and torch.optim.AdamW in one m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,
        D = sqrt(v / (1 - beta2^t)) + eps u  = theta (1 - lr weight_decay) - lr / (1 - beta1^t) m /
        D mode "grad":  theta <- u
        mode "prox":  theta <- a + (u - a) D / (D + lr strength F)

    "prox" is the closed form of the penalised step in AdamW's own metric. AdamW's step is u =
    argmin_t of its quadratic model 1/(2 lr) sum D (t - theta (1 - lr weight_decay))^2 + m t / (1 -
    beta1^t); completing the square, that model is 1/(2 lr) sum D (t - u)^2 but for a constant.
    Adding the penalty, argmin_t 1/(2 lr) sum D (t - u)^2 + strength/2 sum F (t - a)^2 sets D/lr (t
    - u) + strength F (t - a) = 0, which is the line above: a weighted mean of u and a, so a
    coordinate never passes its anchor whatever lr, strength and F are. Without weight decay it
    comes to rest where the loss's gradient is -strength F (theta - a), as gradient descent on the
    penalised loss does; the moments hold the loss's gradient alone. Mode "grad" puts the penalty
    through Adam's normalisation: a step is about lr whatever the strength, so a large strength
    makes it oscillate about the anchor by about lr instead of diverging, and drowns the loss's
    gradient in v.

    Args:
        params: parameters or groups, as torch.optim.AdamW's; those that `ewc` does not cover get
            plain AdamW.
        ewc: a fasttax.EWC; None for plain AdamW. LoRA factors that it covers are pulled by their
            gradient (mode "grad" alone).
        lr, betas, eps, weight_decay, amsgrad, maximize: as torch.optim.AdamW's; lr may be a 0-d
            tensor.
        mode: "grad" or "prox".
        fisher: "ewc" for that of `ewc`, or "second_moment" for `fisher_scale` times Adam's own
            bias-corrected second moment. That is no Fisher of what is to be kept: it is the mean
            squared batch gradient of the present training (Li, Dangel, Tam, Raffel 2025,
            arXiv:2507.18807), which holds most where the loss pulls most. It reads nothing that
            AdamW does not; anchors and strength come from `ewc`. Mode "grad" uses the moment before
            the step (0 at the first), "prox" the one after.
        fisher_scale: for "second_moment"; the batch size makes it an estimate of the sum over
            examples.
        every: hold at every k-th step, with k times the strength.

    The state is AdamW's: state_dict and load_state_dict exchange with torch.optim.AdamW both ways,
    and at strength 0 the steps are its steps to rounding. A parameter without a gradient is left
    alone, by penalty and decay too, as AdamW does. Sparse gradients are refused. A GradScaler's
    scale and found_inf are used inside the step, with no sync. `.penalty` is the value before the
    last step, a 0-d tensor, 0 where the scaler skipped it.

    Raises:
        ValueError, TypeError: options that do not fit; an `ewc` that covers none of the parameters.
        RuntimeError: a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        *,
        ewc: EWC | None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        mode: str = "grad",
        amsgrad: bool = False,
        maximize: bool = False,
        fisher: str = "ewc",
        fisher_scale: float = 1.0,
        every: int = 1,
    ) -> None:
        op = "AdamWEWC"
        if ewc is not None and not isinstance(ewc, EWC):
            raise checks.fail(
                op, "ewc", "a fasttax.EWC, or None for plain AdamW", ewc, error=TypeError
            )
        self.mode = checks.choice(op, "mode", mode, MODES)
        self.fisher = checks.choice(op, "fisher", fisher, FISHERS)
        self.fisher_scale = checks.number(op, "fisher_scale", fisher_scale, low=0, open_low=True)
        self.every = checks.count(op, "every", every)
        self.ewc = ewc
        self.penalty: Tensor | None = None
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._step_supports_amp_scaling = (
            True  # GradScaler hands over grad_scale and found_inf instead of reading them
        )
        if ewc is not None:
            check_optimizer(op, "params", ewc, self.param_groups)
            if mode == "prox":
                ewc.refuse_prox_of_lora(op)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, makes the loss and the gradients anew and its value is
        returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(
            p.grad is not None and p.grad.is_sparse
            for group in self.param_groups
            for p in group["params"]
        ):  # before anything is written
            raise RuntimeError(
                "AdamWEWC: a parameter has a sparse gradient: expected dense ones; build its "
                "Embedding with sparse=False"
            )
        turn = self.param_groups[0]["ewc_turn"] = self.param_groups[0].get("ewc_turn", 0) + 1
        ewc = self.ewc if turn % self.every == 0 else None
        parts: list[Any] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            blocks = [] if ewc is None else ewc._store.blocks(params)
            if ewc is not None and ewc._lora:
                scale = (-1.0 if group["maximize"] else 1.0) * self.every
                grad_scale = getattr(self, "grad_scale", None)
                parts += ewc._add_grad_(
                    [], scale if grad_scale is None else grad_scale * scale, params
                )
            if ewc is not None:
                parts += [
                    (x.key, self._update(group, x.owners, x)) for x in ewc._store.stream(blocks)
                ]
            held = {id(h.theta) for block in blocks for h in block}
            for plain in _by_kind([p for p in params if id(p) not in held]):
                self._update(group, plain, None)
        if ewc is not None:
            self.penalty = ewc._total(parts)
        return loss

    def _update(
        self, group: dict[str, Any], params: Sequence[Tensor], held: Lists | None
    ) -> Tensor:
        """One call of the op on `params`, all of one device; returns their penalty."""
        states = [self._state_of(p, group) for p in params]
        moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        written = {"theta": [dtensor.local(p).detach() for p in params]} | {
            key: [dtensor.local(s[key]) for s in states] for key in moments
        }
        flat = {key: [t.contiguous() for t in tensors] for key, tensors in written.items()}
        nothing = [torch.empty(0)] * len(params)
        second = self.fisher_scale if held is not None and self.fisher == "second_moment" else 0.0
        own = held is not None and not second
        lr = (
            group["lr"]
            if isinstance(group["lr"], Tensor)
            else torch.tensor(group["lr"], dtype=torch.float64)
        )
        strength = 0.0 if self.ewc is None else self.ewc.strength * self.every
        amp = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        value: Tensor = torch.ops.fasttax.ewc_adamw_(
            flat["theta"],
            [dtensor.local(p.grad).contiguous() for p in params],
            flat["exp_avg"],
            flat["exp_avg_sq"],
            flat.get("max_exp_avg_sq", []),
            [s["step"] for s in states],
            nothing if held is None else held.anchors,
            held.fishers if held is not None and own else nothing,
            held.scales if held is not None and own else [],
            self.mode == "prox",
            strength,
            second,
            lr,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            *amp,
        )
        for key, tensors in written.items():
            for t, copy in zip(tensors, flat[key], strict=True):
                if copy is not t:  # a parameter in channels_last, say: the kernel ran on a copy
                    t.copy_(copy)
        return value / self.every

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if (
            state["step"].device != p.device
        ):  # a checkpoint of torch's unfused AdamW counts on the CPU
            state["step"] = state["step"].to(p.device)
        return state


def _by_kind(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """One list for each device and for float64 apart from the rest: one call each."""
    groups: dict[Any, list[Tensor]] = {}
    for p in params:
        groups.setdefault((p.device, p.dtype == torch.float64), []).append(p)
    return list(groups.values())


# --- schema and shape --------------------------------------------------------------------------------------------------

define(
    "ewc_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor[] anchors, Tensor[] fishers, Tensor[] scales, bool prox, float "
    "strength, float second_moment, Tensor lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf) -> Tensor",
    reference.ewc_adamw_,
    lambda params, *others: params[0].new_empty(
        (), dtype=torch.float64 if params and params[0].dtype == torch.float64 else torch.float32
    ),
)
