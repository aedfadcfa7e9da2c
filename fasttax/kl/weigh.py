"""The end of every function of tokens: estimates, `scale`, `weight`, `mask` and `reduction`.

What is multiplied here is a few numbers a token; where a sweep over the vocabulary makes gradients
it is given the products (`Weighing.by_token`), and goes over no entry twice for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.library import define, no_double_backward
from fasttax._base.modes import compiling, has_tangent, transforming
from fasttax.reference import weigh
from fasttax.reference.numbers import hide, wide_dtype
from fasttax.reference.weigh import NONE, REDUCTIONS

CLIP = 20.0  # of estimates, whose exponential goes on along its tangent beyond
MOST_SCALE = 3.4e38  # float32 has no more


def by_ops(device: torch.device) -> bool:
    """Whether the ops of this file are worth their dispatch: where an op of torch's is a launch.

    On a CPU they are Python, and torch's own autograd takes 80 to 200 us less a call.
    """
    return device.type != "cpu"


@dataclass(frozen=True)
class Weighing:
    """What becomes of the values of tokens: checked arguments of the public function `op`.

    `mask` and `weight` have the tokens' shape; the weight has a Tensor scale in it.
    """

    op: str
    mask: Tensor | None
    weight: Tensor | None
    reduction: int
    scale: float

    @property
    def reduces(self) -> bool:
        """Whether the result is one number."""
        return self.reduction != NONE

    def by_token(self, like: Tensor) -> Tensor:
        """The gradient of the result by every token's value, which it need not know.

        `like` gives shape and dtype.
        """
        weight = _fitting(self.weight, like)
        if compiling() or not by_ops(like.device):
            return weigh.token_weights(like, self.mask, weight, self.reduction, self.scale)
        by_token: Tensor = torch.ops.fasttax.token_weights(
            like, self.mask, weight, self.reduction, self.scale
        )
        return by_token

    def flat(self) -> Weighing:
        """The same of tokens in one dimension."""
        mask, weight = (None if t is None else t.reshape(-1) for t in (self.mask, self.weight))
        return replace(self, mask=mask, weight=weight)

    def of(self, values: Tensor) -> Tensor:
        """The values of the tokens, weighed and reduced."""
        if not self.reduces and self.weight is None and self.scale == 1:
            return values
        (result,) = self.of_rows([values[None]], (0,))
        return result

    def of_rows(
        self,
        values: Sequence[Tensor],
        outputs: Sequence[int],
        pair: Sequence[int] = (),
        clip: float = CLIP,
        reverse: bool = False,
    ) -> list[Tensor]:
        """As reference.weigh.weigh_tokens, of values of one dtype."""
        first = values[0]
        weight = _fitting(self.weight, first[0])
        rest = (self.mask, weight, self.reduction, self.scale, clip, reverse)
        call = _Call(self.op, len(values), tuple(outputs), tuple(pair), rest)
        tensors = [t for t in (*values, weight) if t is not None]
        if (
            not by_ops(first.device)
            or compiling()
            or transforming()
            or (weight is not None and weight.requires_grad)
            or any(has_tangent(t) for t in tensors)
        ):
            return call.plainly(values)
        return list(_Weighed.apply(call, *values))


def weighing(
    op: str,
    mask: Tensor | None,
    weight: Any,
    reduction: Any,
    scale: Any,
    tokens: Tensor,
    argument: str = "weight",
    forward_mode: bool = False,
) -> Weighing:
    """The arguments of `op`, checked.

    Args:
        op: the public function.
        mask: checked already.
        weight: None, or what broadcasts to the tokens.
        reduction: of REDUCTIONS.
        scale: a finite number, or a 0-d tensor.
        tokens: (..., width), for shape and device.
        argument: what `op` calls the weight.
        forward_mode: the op carries a forward-mode derivative along.

    Raises:
        ValueError, TypeError: one does not fit.
        NotImplementedError: one has a forward-mode derivative, which the op would drop.
    """
    number = REDUCTIONS.index(checks.choice(op, "reduction", reduction, REDUCTIONS))
    shape = tokens.shape[:-1]
    if weight is not None:
        weight = checks.per_token(op, argument, weight, shape, tokens.device)
    for name, value in ((argument, weight), ("scale", scale)):
        if isinstance(value, Tensor) and not forward_mode:
            checks.no_tangent(op, name, value)
    if isinstance(scale, Tensor):
        dtype = wide_dtype(tokens)
        by_tensor = _scale_tensor(op, scale, tokens, argument).to(dtype).expand(shape)
        if weight is not None:
            weight = weight.to(dtype)
            if by_tensor.requires_grad:  # whose gradient is a sum over the weights
                weight = hide(weight, mask)
            by_tensor = weight * by_tensor
        weight, scale = by_tensor, 1.0
    else:
        scale = checks.number(op, "scale", scale, low=-MOST_SCALE, high=MOST_SCALE)
    return Weighing(op, mask, weight, number, scale)


def _scale_tensor(op: str, scale: Tensor, tokens: Tensor, argument: str) -> Tensor:
    """A scale that is a tensor: a factor of the tokens' weights, whose value is not looked at."""
    if scale.dim() != 0:
        raise checks.fail(
            op,
            "scale",
            "a finite number or a 0-d tensor",
            scale,
            f"pass a factor a token as {argument}=",
        )
    checks.same_device(op, "scale", scale, "the logits", tokens)
    return scale


def _fitting(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """The weight as the ops take it."""
    return None if weight is None else weight.to(like.dtype).contiguous()


@dataclass(frozen=True)
class _Call:
    """One call of the op `weigh_tokens`, but for the values."""

    op: str
    count: int  # of the values
    outputs: tuple[int, ...]
    pair: tuple[int, ...]
    rest: tuple[Any, ...]

    def plainly(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The results by torch's own ops."""
        return weigh.weigh_tokens(values, self.outputs, self.pair, *self.rest)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        mask, weight, *options = call.rest
        ctx.call = replace(call, rest=tuple(options))
        # not beside the call: autograd sees that one was written into before the backward
        ctx.save_for_backward(mask, weight, *values)
        given = [value.contiguous() for value in values]
        return tuple(torch.ops.fasttax.weigh_tokens(given, call.outputs, call.pair, *call.rest))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        mask, weight, *values = ctx.saved_tensors
        call = replace(ctx.call, rest=(mask, weight, *ctx.call.rest))
        which = [i for i, grad in enumerate(grads) if grad is not None]
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (1 + call.count)
        if torch.is_grad_enabled():  # create_graph: a second derivative goes through torch's ops
            results = call.plainly(values)
            wanted = [v for v in values if v.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [results[i] for i in which],
                    wanted,
                    given,
                    create_graph=True,
                    allow_unused=True,
                )
            )
            return None, *[next(found) if v.requires_grad else None for v in values]
        arguments = (given, which, values, call.outputs, call.pair, *call.rest)
        if transforming() or any(has_tangent(grad) for grad in given):
            d = weigh.weigh_tokens_backward(*arguments)
        else:
            d = torch.ops.fasttax.weigh_tokens_backward(*arguments)
        return None, *d.split([len(v) for v in values])


# schemas, shapes

_OPTIONS = (
    "Tensor[] values, int[] outputs, int[] pair, Tensor? mask, Tensor? weight, int reduction, "
    "float scale, float clip, bool reverse"
)


def _fake(values: Sequence[Tensor], outputs: Sequence[int], *others: Any) -> list[Tensor]:
    *_, reduction, _, _, _ = others
    first = values[0][0]
    return [first.new_empty(first.shape if reduction == NONE else ()) for _ in outputs]


def _backward_fake(
    grads: Sequence[Tensor], which: Sequence[int], values: Sequence[Tensor], *others: Any
) -> Tensor:
    return values[0].new_empty((sum(len(v) for v in values), *values[0].shape[1:]))


def _weights_fake(like: Tensor, *others: Any) -> Tensor:
    return like.new_empty(like.shape)


define(
    "token_weights(Tensor like, Tensor? mask, Tensor? weight, int reduction, float scale) "
    "-> Tensor",
    reference.token_weights,
    _weights_fake,
)
define(f"weigh_tokens({_OPTIONS}) -> Tensor[]", reference.weigh_tokens, _fake)
define(
    f"weigh_tokens_backward(Tensor[] grads, int[] which, {_OPTIONS}) -> Tensor",
    reference.weigh_tokens_backward,
    _backward_fake,
)
no_double_backward("weigh_tokens_backward", "weigh_tokens")
