"""AdamW and EWC in one pass over the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import AdamW

from fasttax import reference
from fasttax._base import checks, dtensor
from fasttax._base.library import define
from fasttax.ewc.attach import check_optimizer, checked_mode, stepped
from fasttax.ewc.claims import claim
from fasttax.ewc.ewc import EWC
from fasttax.ewc.ops import beside, contiguous, scalar_like
from fasttax.ewc.store import Lists

PROX = "prox_adam"  # "prox" is its short name here
STATE = ("mode", "fisher", "fisher_scale", "every", "ewc", "penalty")  # beside torch's own
FISHERS = ("ewc", "second_moment")
L = TypeVar("L")  # of a loss that a closure gives


class AdamWEWC(AdamW):
    """AdamW whose step holds the parameters that `ewc` covers, in AdamW's own pass over memory.

    With g the gradient (negated under maximize), a the anchor and F the Fisher,

        mode "grad":  g <- g + strength F (theta - a), before the moments see it:
                      `ewc.add_grad_()` and torch.optim.AdamW in one
        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        D = sqrt(v / (1 - beta2^t)) + eps
        u = theta (1 - lr weight_decay) - lr / (1 - beta1^t) m / D
        mode "grad":  theta <- u
        mode "prox_adam":  theta <- a + (u - a) D / (D + lr strength F)

    "prox_adam" is the closed form of the penalised step in AdamW's own metric. AdamW's step is u =
    argmin_t of its quadratic model 1/(2 lr) sum D (t - theta (1 - lr weight_decay))^2 + m t / (1 -
    beta1^t); completing the square, that model is 1/(2 lr) sum D (t - u)^2 but for a constant.
    Adding the penalty, argmin_t 1/(2 lr) sum D (t - u)^2 + strength/2 sum F (t - a)^2 sets
    D/lr (t - u) + strength F (t - a) = 0, which is the line above: a weighted mean of u and a, so
    a coordinate never passes its anchor whatever lr, strength and F are. Without weight decay it
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
        lr: as torch.optim.AdamW's, as are betas, eps, weight_decay, amsgrad and maximize; it may be
            a 0-d tensor.
        mode: "grad" or "prox_adam" (or "prox"); the "prox_euclidean" of EWC.attach is another step,
            a + (u - a) / (1 + lr strength F).
        fisher: "ewc" for that of `ewc`, or "second_moment" for `fisher_scale` times Adam's own
            bias-corrected second moment. That is no Fisher of what is to be kept: it is the mean
            squared batch gradient of the present training (Li, Dangel, Tam, Raffel 2025,
            arXiv:2507.18807), which holds most where the loss pulls most. It reads nothing that
            AdamW does not; anchors and strength come from `ewc`. Mode "grad" uses the moment before
            the step (0 at the first), "prox_adam" the one after.
        fisher_scale: for "second_moment"; the batch size makes it an estimate of the sum over
            examples.
        every: hold at every k-th step, with k times the strength; a step that a GradScaler skips
            counts.

    The state is AdamW's: state_dict and load_state_dict exchange with torch.optim.AdamW both ways,
    and at strength 0 the steps are its steps to rounding. A parameter without a gradient is left
    alone, by penalty and decay too, as AdamW does. Sparse gradients are refused. A GradScaler's
    scale and found_inf are used inside the step, with no sync. `.penalty` is the value before the
    last step, a 0-d tensor, 0 where the scaler skipped it.

    Raises:
        ValueError, TypeError: options that do not fit; an `ewc` that covers none of the parameters.
        RuntimeError: a sparse gradient.

    Example:
        >>> optimizer = fasttax.AdamWEWC(model.parameters(), ewc=ewc, lr=1e-4, mode="prox_adam")
        >>> model(**batch).loss.backward()
        >>> optimizer.step()
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
        self.mode = checked_mode(op, mode, PROX)
        self.fisher = checks.choice(op, "fisher", fisher, FISHERS)
        self.fisher_scale = checks.number(op, "fisher_scale", fisher_scale, low=0, open_low=True)
        self.every = checks.count(op, "every", every)
        self.ewc = ewc
        self.penalty: Tensor | None = None
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        # GradScaler hands over grad_scale and found_inf instead of reading them
        self._step_supports_amp_scaling = True
        if ewc is not None:
            ewc.hold.check(op)
            check_optimizer(op, "params", ewc.hold, self.param_groups)
            if self.mode == PROX:
                ewc.hold.refuse_prox_of_lora(op)
            self._refuse_factors(op, ewc)
            self._claim = claim(op, "ewc", op, ewc.parameters(), self)

    def _refuse_factors(self, op: str, ewc: EWC) -> None:
        """What weights with Kronecker factors have no form of."""
        if not ewc.hold.kronecker:
            return
        if self.mode == PROX:
            raise checks.fail(
                op,
                "mode",
                "'grad' with Kronecker factors",
                repr(self.mode),
                "Adam's metric is diagonal in the weights, the penalty in its eigenbasis, so that "
                "the step has no closed form; ewc.attach(optimizer, mode='prox_euclidean') has",
            )
        if self.fisher == "second_moment":
            expected = "'ewc' with Kronecker factors"
            raise checks.fail(op, "fisher", expected, repr(self.fisher))

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with the options: a deepcopy of (model, optimizer) holds the copied model."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in STATE}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; a copy claims what it holds for its own steps.

        load_state_dict comes here, too, with torch's part alone.
        """
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        if state.get("ewc") is not None and self.ewc is not None:
            self._claim = claim("AdamWEWC", "ewc", "AdamWEWC", self.ewc.parameters(), self)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], L]) -> L: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], L] | None = None) -> L | None:
        """One step; `closure`, if given, makes loss and gradients anew, and its value is returned.

        Raises:
            RuntimeError: a sparse gradient; nothing is written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if any(grad is not None and grad.is_sparse for grad in grads):
            raise RuntimeError(
                "AdamWEWC: a parameter has a sparse gradient: expected dense ones; build its "
                "Embedding with sparse=False"
            )
        counter = self.param_groups[0]
        counter["ewc_turn"] = counter.get("ewc_turn", 0) + 1
        if self.ewc is None or counter["ewc_turn"] % self.every:
            for group in self.param_groups:
                self._update_free(group, _with_grad(group))
            return loss
        hold = self.ewc.hold
        hold.check("AdamWEWC")
        every, uphill = stepped(self.param_groups)
        touched = [p for p in every if p.grad is not None]
        times = getattr(self, "grad_scale", None)
        products = hold.add_product_grad_parts_(float(self.every), touched, times, uphill)
        parts = [(key, self._unless_skipped(value)) for key, value in products]
        for group in self.param_groups:
            params = _with_grad(group)
            blocks = hold.store.blocks(params)
            parts += [(x.key, self._update(group, x.owners, x)) for x in hold.store.stream(blocks)]
            held = {id(h.theta) for block in blocks for h in block}
            self._update_free(group, [p for p in params if id(p) not in held])
        self.penalty = hold.total(parts)
        return loss

    def _update_free(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Plain AdamW: one call for each device, and for float64 apart from the rest."""
        kinds: dict[Any, list[Tensor]] = {}
        for p in params:
            kinds.setdefault((p.device, p.dtype == torch.float64), []).append(p)
        for alike in kinds.values():
            self._update(group, alike, None)

    def _update(
        self, group: dict[str, Any], params: Sequence[Tensor], held: Lists | None
    ) -> Tensor:
        """One call of the op on `params`, all of one device; returns their penalty."""
        states = [self._state_of(p, group) for p in params]
        moments = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}
        if group["amsgrad"]:
            moments["max_exp_avg_sqs"] = "max_exp_avg_sq"
        written = {"params": [dtensor.local(p).detach() for p in params]}
        for argument, key in moments.items():
            written[argument] = [dtensor.local(state[key]) for state in states]
        none = torch.empty(0, dtype=torch.float32, device=params[0].device)
        anchors = fishers = [none] * len(params)
        scales: list[Tensor] = []
        second_moment = 0.0
        if held is not None:
            anchors = held.anchors
            if self.fisher == "second_moment":
                second_moment = self.fisher_scale
            else:
                fishers, scales = held.fishers, held.scales
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        with contiguous(written) as flat:
            value: Tensor = torch.ops.fasttax.ewc_adamw_(
                **{"max_exp_avg_sqs": [], **flat},
                grads=[dtensor.local(p.grad).contiguous() for p in params],
                steps=[state["step"] for state in states],
                anchors=anchors,
                fishers=fishers,
                scales=scales,
                prox_mode=self.mode == PROX,
                strength=0.0 if self.ewc is None else self.ewc.strength * self.every,
                second_moment=second_moment,
                lr=as_scalar(lr),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                grad_scale=self._scalers("grad_scale", params[0].device),
                found_inf=self._scalers("found_inf", params[0].device),
            )
        return value / self.every

    def _unless_skipped(self, penalty: Tensor) -> Tensor:
        """The penalty, 0 where the scaler skips the step, as the op gives its own."""
        found_inf = self._scalers("found_inf", penalty.device)
        if found_inf is None:
            return penalty
        return penalty.masked_fill(found_inf.reshape(()) != 0, 0.0)

    def _scalers(self, name: str, device: torch.device) -> Tensor | None:
        """A GradScaler's value, which lies on one device, beside the parameters of another."""
        value: Tensor | None = getattr(self, name, None)
        return None if value is None else beside(value, device)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        # a checkpoint of torch's unfused AdamW counts on the CPU
        state["step"] = state["step"].to(p.device)
        return state


def as_scalar(lr: float | Tensor) -> Tensor:
    """A learning rate as the op takes it: a number as float64 on the CPU."""
    if isinstance(lr, Tensor):
        return lr
    return torch.tensor(lr, dtype=torch.float64, device="cpu")


def _with_grad(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


# --- schema and shape --------------------------------------------------------------------------

# the order of the arguments: every call names them
define(
    "ewc_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] anchors, Tensor[] "
    "fishers, Tensor[] scales, bool prox_mode, float strength, float second_moment, Tensor lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf) -> Tensor",
    reference.ewc_adamw_,
    lambda params, *others: scalar_like(params),
)
