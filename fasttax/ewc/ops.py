"""Elastic weight consolidation on lists of tensors.

One call, and one pass over memory, for a whole model.

    penalty(theta) = strength/2 * sum fisher * (theta - anchor)^2

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks" (arXiv:1612.00796).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.interrupts import surfaced
from fasttax._base.library import define, lib, no_double_backward
from fasttax._base.modes import transforming

FISHER_DTYPES = (*checks.FLOATS, torch.uint8)
WRITTEN = (("ewc_add_grad_", "grads"), ("ewc_prox_", "params"))  # lists that an op writes in place


def _check(op: str, params: Sequence[Tensor], packed: bool, **others: Sequence[Tensor]) -> None:
    """Checks lists against `params`.

    `packed` allows uint8 Fishers (u8log) and anchors (split), which EWC makes and the kernels
    check.
    """
    checks.lists(op, "parameter", params=params, **others)
    for name, values in {"params": params, **others}.items():
        for i, (value, theta) in enumerate(zip(values, params, strict=True)):
            where = f"{name}[{i}]"
            if not (packed and name == "anchors" and value.dtype == torch.uint8):
                dtypes = FISHER_DTYPES if packed and name == "fishers" else checks.FLOATS
                checks.tensor(op, where, value, dtypes)
                _check_like(op, where, value, f"params[{i}]", theta)
            checks.dense(op, where, value)
            checks.same_device(op, where, value, f"params[{i}]", theta)
            if (op, name) in WRITTEN:
                _check_contiguous(op, where, value)
        if (op, name) in WRITTEN:
            checks.distinct_memory(op, name, values)


def _check_like(op: str, where: str, value: Tensor, other: str, theta: Tensor) -> None:
    if value.shape != theta.shape:
        raise checks.fail(op, where, f"shape {tuple(theta.shape)} as {other}", value)
    _check_wide(op, where, value, "parameter", other, theta)


def _check_contiguous(op: str, where: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise checks.fail(
            op,
            where,
            "a contiguous tensor, since it is written in place",
            f"strides {value.stride()}",
            "call .contiguous() on it first",
        )


def _check_wide(op: str, where: str, value: Tensor, what: str, other: str, like: Tensor) -> None:
    """An error where one of two tensors is float64 and the other is not."""
    if (value.dtype == torch.float64) != (like.dtype == torch.float64):
        raise checks.fail(
            op,
            where,
            f"float64 together with a float64 {what}, and only then",
            value,
            f"convert it with {where}.to({other}.dtype)",
            TypeError,
        )


def beside(value: Tensor, device: torch.device) -> Tensor:
    """A value on `device`, with no wait for a GPU but where the CPU is to have it."""
    return value.to(device, non_blocking=device.type != "cpu")


def _contiguous(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.contiguous() for value in values]


@contextmanager
def contiguous(lists: Mapping[str, Sequence[Tensor]]) -> Iterator[dict[str, list[Tensor]]]:
    """Lists of tensors as kernels write them.

    Those that lie otherwise (a parameter in channels_last, say) stand there as contiguous copies,
    and get the copies' values when the block ends.

    Yields:
        The lists under their names.
    """
    flat = {name: _contiguous(tensors) for name, tensors in lists.items()}
    yield flat
    for name, tensors in lists.items():
        for t, copy in zip(tensors, flat[name], strict=True):
            if copy is not t:
                t.copy_(copy)


def ewc_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor], strength: float
) -> Tensor:
    """strength/2 * sum fisher * (theta - anchor)^2 over all tensors, differentiable by `params`.

    Args:
        params: float32, bfloat16 and float16 in any mix, or float64 throughout; as are the others.
        anchors: one for each parameter, of its shape.
        fishers: >= 0, one for each parameter, of its shape.
        strength: finite, >= 0.

    Returns:
        0-d float32 (float64 for float64 parameters); its gradient by theta is strength * fisher *
        (theta - anchor).

    Raises:
        ValueError, TypeError: a list, shape, dtype, device or strength does not fit.

    Example:
        >>> params, anchors = [torch.tensor([3.0])], [torch.tensor([1.0])]
        >>> fishers = [torch.tensor([0.5])]
        >>> fasttax.functional.ewc_penalty(params, anchors, fishers, strength=10.0)
        tensor(10.)
    """
    return penalty(params, anchors, fishers, None, strength)


def penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    strength: float,
) -> Tensor:
    """`ewc_penalty`; with a list of `scales` Fishers may be u8log and anchors split."""
    strength = checks.number("ewc_penalty", "strength", strength, low=0)
    _check("ewc_penalty", params, scales is not None, anchors=anchors, fishers=fishers)
    if transforming():  # the op's registered autograd is none of torch.func's
        return reference.ewc_penalty(params, anchors, fishers, list(scales or ()), strength)
    kept = {"params": params, "anchors": anchors, "fishers": fishers}
    checks.for_backward(
        "ewc_penalty", **{f"{n}[{i}]": t for n, ts in kept.items() for i, t in enumerate(ts)}
    )
    value: Tensor = torch.ops.fasttax.ewc_penalty(
        _contiguous(params),
        _contiguous(anchors),
        _contiguous(fishers),
        list(scales or ()),
        strength,
    )
    return value


def penalties(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> list[Tensor]:
    """`penalty` of each parameter by itself; `scales` may be empty."""
    each = (slice(i, i + 1) for i in range(len(params)))
    return [penalty(params[i], anchors[i], fishers[i], scales[i], strength) for i in each]


def ewc_add_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    strength: float,
) -> Tensor:
    """Adds strength * fisher * (theta - anchor) to grads, in one pass and with no graph.

    Five passes over the parameters: read theta, anchor, fisher and grad, write grad.

    Args:
        params: as of `ewc_penalty`.
        grads: one for each parameter, of its shape, contiguous; written in place.
        anchors: as of `ewc_penalty`.
        fishers: as of `ewc_penalty`.
        strength: as of `ewc_penalty`.

    Returns:
        The penalty, 0-d, not synchronised with the host.

    Raises:
        ValueError, TypeError: a list, shape, dtype, device or strength does not fit.

    Example:
        >>> params, grads = [torch.tensor([3.0])], [torch.zeros(1)]
        >>> anchors, fishers = [torch.tensor([1.0])], [torch.tensor([0.5])]
        >>> penalty = fasttax.functional.ewc_add_grad_(params, grads, anchors, fishers, 10.0)
        >>> grads
        [tensor([10.])]
    """
    return add_grad_(params, grads, anchors, fishers, None, strength, 1.0)


def add_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    strength: float,
    scale: float,
    times: Tensor | None = None,
) -> Tensor:
    """`ewc_add_grad_` of `scale` times the pull; `scales` as in `penalty`.

    `times`, one value on the parameters' device, multiplies `scale` there, in the same pass.
    """
    strength = checks.number("ewc_add_grad_", "strength", strength, low=0)
    scale = checks.number("ewc_add_grad_", "scale", scale)
    _check(
        "ewc_add_grad_", params, scales is not None, grads=grads, anchors=anchors, fishers=fishers
    )
    with torch.no_grad():
        value: Tensor = torch.ops.fasttax.ewc_add_grad_(
            _contiguous([p.detach() for p in params]),
            [g.detach() for g in grads],
            _contiguous(anchors),
            _contiguous(fishers),
            list(scales or ()),
            strength,
            scale,
            times,
        )
    return value


def ewc_prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    strength_times_lr: float,
) -> None:
    """Moves theta to anchor + (theta - anchor) / (1 + strength_times_lr * fisher), in place.

    Stable for any strength.

    The proximal step of the penalty, argmin_t |t - theta|^2 / (2 lr) + penalty(t). An explicit
    gradient step diverges where lr * strength * fisher > 2; this one contracts towards the anchor
    for every value >= 0.

    Args:
        params: as of `ewc_penalty`, contiguous; written in place.
        anchors: as of `ewc_penalty`.
        fishers: as of `ewc_penalty`.
        strength_times_lr: finite, >= 0.

    Raises:
        ValueError, TypeError: a list, shape, dtype, device or strength does not fit.

    Example:
        >>> params, anchors = [torch.tensor([3.0])], [torch.tensor([1.0])]
        >>> fishers = [torch.tensor([0.5])]
        >>> fasttax.functional.ewc_prox_(params, anchors, fishers, strength_times_lr=2.0)
        >>> params
        [tensor([2.])]
    """
    prox_(params, anchors, fishers, None, strength_times_lr)


def prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    strength_times_lr: float,
    times: Tensor | None = None,
) -> None:
    """`ewc_prox_`; `scales` as in `penalty`, `times` as in `add_grad_`."""
    step = checks.number("ewc_prox_", "strength_times_lr", strength_times_lr, low=0)
    _check("ewc_prox_", params, scales is not None, anchors=anchors, fishers=fishers)
    with torch.no_grad():
        torch.ops.fasttax.ewc_prox_(
            [p.detach() for p in params],
            _contiguous(anchors),
            _contiguous(fishers),
            list(scales or ()),
            step,
            times,
        )


def lora_ewc_penalty(
    lora_A: Tensor, lora_B: Tensor, fisher: Tensor, scale: float, strength: float
) -> Tensor:
    """strength/2 * sum fisher * (scale * lora_B @ lora_A)^2 with the dense product never stored.

    Args:
        lora_A: (r, in).
        lora_B: (out, r).
        fisher: (out, in), the base weight's diagonal Fisher, >= 0.
        scale: LoRA's alpha / r.
        strength: finite, >= 0.

    Returns:
        0-d float32 (float64 for float64 factors), differentiable by lora_A and lora_B:
        with G = strength * scale * fisher * (scale B A), d_A = B^T G and d_B = G A^T. Where one of
        them requires grad, the gradients are made with the value, in one sweep over fisher, and
        kept until the backward pass.

    Raises:
        ValueError, TypeError: a shape, dtype, device, scale or strength does not fit.

    Example:
        >>> lora_A, lora_B, fisher = torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 3)
        >>> fasttax.functional.lora_ewc_penalty(lora_A, lora_B, fisher, scale=0.5, strength=10.0)
        tensor(60.)
    """
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B), ("fisher", fisher)):
        checks.tensor("lora_ewc_penalty", name, value)
    wanted = torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)
    return lora_penalty(lora_A, lora_B, fisher, None, scale, strength, wanted)[0]


@surfaced
def lora_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    fisher: Tensor,
    scales: Tensor | None,
    scale: float,
    strength: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, d_A, d_B), the gradients empty where not asked for; u8log has uint8 and `scales`."""
    op = "lora_ewc_penalty"
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B), ("fisher", fisher)):
        if value.dim() != 2:
            raise checks.fail(op, name, "a matrix", value)
        checks.dense(op, name, value)
        checks.no_tangent(op, name, value)
        checks.same_device(op, name, value, "lora_A", lora_A)
        _check_wide(op, name, value, "lora_A", "lora_A", lora_A)
    if lora_B.shape[1] != lora_A.shape[0]:
        raise checks.fail(
            op, "lora_B", f"shape (out, {lora_A.shape[0]}), the rank of lora_A", lora_B
        )
    if fisher.shape != (lora_B.shape[0], lora_A.shape[1]):
        raise checks.fail(
            op, "fisher", f"shape {(lora_B.shape[0], lora_A.shape[1])} as B @ A", fisher
        )
    strength = checks.number(op, "strength", strength, low=0)
    ranges = lora_A.new_empty(0, dtype=torch.float32) if scales is None else scales
    scale = checks.number(op, "scale", scale)
    if transforming():
        return reference.lora_ewc_penalty(lora_A, lora_B, fisher, ranges, scale, strength, False)
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.fasttax.lora_ewc_penalty(
        lora_A.contiguous(),
        lora_B.contiguous(),
        fisher.contiguous(),
        ranges,
        scale,
        strength,
        gradient,
    )
    return out


def _empty_like(t: Tensor, shape: Sequence[int]) -> Tensor:
    """In float64 for a float64 tensor, in float32 for others."""
    return t.new_empty(shape, dtype=torch.promote_types(t.dtype, torch.float32))


def scalar_like(params: Sequence[Tensor]) -> Tensor:
    """The shape of an op's penalty."""
    if not params:
        return torch.empty((), dtype=torch.float32)
    return _empty_like(params[0], ())


def _lora_like(lora_A: Tensor, lora_B: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (lora_A.shape, lora_B.shape) if gradient else ((0, 0), (0, 0))
    d_A, d_B = (_empty_like(x, shape) for x, shape in zip((lora_A, lora_B), shapes, strict=True))
    return scalar_like([lora_A]), d_A, d_B


# --- schemas, shapes, autograd -----------------------------------------------------------------

define(
    "ewc_penalty(Tensor[] params, Tensor[] anchors, Tensor[] fishers, Tensor[] scales, float "
    "strength) -> Tensor",
    reference.ewc_penalty,
    lambda params, anchors, fishers, scales, strength: scalar_like(params),
)
define(
    "ewc_penalty_backward(Tensor grad, Tensor[] params, Tensor[] anchors, Tensor[] fishers, "
    "Tensor[] scales, float strength) -> Tensor[]",
    reference.ewc_penalty_backward,
    lambda grad, params, anchors, fishers, scales, strength: [torch.empty_like(p) for p in params],
)
define(
    "ewc_add_grad_(Tensor[] params, Tensor(a!)[] grads, Tensor[] anchors, Tensor[] fishers, "
    "Tensor[] scales, float strength, float scale, Tensor? times=None) -> Tensor",
    reference.ewc_add_grad_,
    lambda params, grads, anchors, fishers, scales, strength, scale, times=None: scalar_like(
        params
    ),
)
define(
    "ewc_prox_(Tensor(a!)[] params, Tensor[] anchors, Tensor[] fishers, Tensor[] scales, float "
    "strength_times_lr, Tensor? times=None) -> ()",
    reference.ewc_prox_,
    lambda params, anchors, fishers, scales, strength_times_lr, times=None: None,
)
define(
    "lora_ewc_penalty(Tensor lora_A, Tensor lora_B, Tensor fisher, Tensor scales, float scale, "
    "float strength, bool gradient) -> (Tensor, Tensor, Tensor)",
    reference.lora_ewc_penalty,
    lambda lora_A, lora_B, fisher, scales, scale, strength, gradient: _lora_like(
        lora_A, lora_B, gradient
    ),
)

define(
    "lora_ewc_penalty_backward(Tensor grad, Tensor lora_A, Tensor lora_B, Tensor d_A, Tensor d_B) "
    "-> (Tensor, Tensor)",
    reference.lora_ewc_penalty_backward,
    lambda grad, lora_A, lora_B, d_A, d_B: (torch.empty_like(lora_A), torch.empty_like(lora_B)),
)


def _penalty_setup(ctx: Any, inputs: Any, output: Any) -> None:
    params, anchors, fishers, scales, ctx.strength = inputs
    ctx.count = len(params)
    ctx.save_for_backward(*params, *anchors, *fishers, *scales)


def _penalty_backward(ctx: Any, grad: Tensor) -> Any:
    checks.no_tangent("ewc_penalty", "the gradient of its result", grad)
    saved, n = ctx.saved_tensors, ctx.count
    params, anchors, fishers = (saved[i * n : (i + 1) * n] for i in range(3))
    scales = saved[3 * n :]
    d_params = torch.ops.fasttax.ewc_penalty_backward(
        grad, params, anchors, fishers, scales, ctx.strength
    )
    return d_params, [None] * n, [None] * n, [None] * len(scales), None


def _lora_setup(ctx: Any, inputs: Any, output: Any) -> None:
    lora_A, lora_B, *_, ctx.made = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(lora_A, lora_B, *output[1:])


def _lora_backward(ctx: Any, grad: Tensor, *others: Any) -> Any:
    checks.no_tangent("lora_ewc_penalty", "the gradient of its result", grad)
    if not ctx.made:
        raise RuntimeError(
            "lora_ewc_penalty: expected gradient=True where lora_A or lora_B requires grad, got "
            "False; use fasttax.functional.lora_ewc_penalty"
        )
    d_A, d_B = torch.ops.fasttax.lora_ewc_penalty_backward(grad, *ctx.saved_tensors)
    return d_A, d_B, None, None, None, None, None


torch.library.register_autograd(
    "fasttax::ewc_penalty", _penalty_backward, setup_context=_penalty_setup, lib=lib
)
torch.library.register_autograd(
    "fasttax::lora_ewc_penalty", _lora_backward, setup_context=_lora_setup, lib=lib
)
no_double_backward("ewc_penalty_backward", "ewc_penalty")
no_double_backward("lora_ewc_penalty_backward", "lora_ewc_penalty")
