"""Norms with an elementwise weight: its gradient is the sum of d times what it multiplied."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import Piece
from fasttax.fisher.proof import alike
from fasttax.fisher.tap import Call, Kept, Tap, computing_with

# their statistics run over examples, or over the positions of a channel
_OTHERS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_LAST = (nn.LayerNorm.forward, nn.RMSNorm.forward)  # whose weight lies along the last dimension


class ElementwiseTap(Tap):
    """y = xhat(x) * weight + bias elementwise, whatever xhat and the weight's offset are.

    LayerNorm, any RMSNorm, Gemma's (1 + w), norms over channels in another dimension than the last.
    xhat is the module's own output at weight 1 less that at weight 0, so nothing is divided by a
    weight and no eps is guessed.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._axes: dict[int, int] = {}

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Leaves called a norm with nothing but a weight and a bias of one dimension.

        By name: transformers has an RMSNorm of its own in every model.
        """
        own = dict(module.named_parameters(recurse=False))
        named = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (
            "norm" in type(module).__name__.lower() and not isinstance(module, _OTHERS)
        )
        leaf = not any(True for _ in module.children())
        vectors = set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())
        return named and leaf and vectors

    def keep(self, call: Call) -> Kept:
        """See Tap."""
        self.axis(call.input, call.output)
        return super().keep(call)

    def leading(self, x: Tensor) -> int:
        """All but the features, or the examples alone where features are not last."""
        last = x.dim() - 1
        return last if self._axes[x.dim()] == last else 1

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """`d` and x (..., H), or with the weight along another dimension."""
        axis = self._axes[x.dim()]
        needed = "weight" in self.names
        if axis == x.dim() - 1:
            flat = d.reshape(-1, d.shape[-1])
            if needed:
                xhat = self.xhat_of(x).reshape(flat.shape)
        else:
            given, layout = bounds, current.layout
            bounds, flat = layout.by_position(given, d.movedim(axis, 1))
            if needed:
                xhat = layout.by_position(given, self.xhat_of(x).movedim(axis, 1))[1]
        self.give(current, "bias", Piece("bias", bounds, flat))
        if needed:
            self.give(current, "weight", Piece("scale", bounds, flat, xhat))

    def xhat_of(self, x: Tensor) -> Tensor:
        """xhat, from what was kept."""
        return self.normalised(x)

    def axis(self, x: Tensor, y: Tensor) -> int:
        """The dimension of x and y that the weight lies along, found once for each number of them.

        Where the module's class does not say so, from its output at another weight.

        Raises:
            TypeError: along none.
        """
        if x.dim() not in self._axes:
            self._axes[x.dim()] = self._find_axis(x, y)
        return self._axes[x.dim()]

    @torch.no_grad()
    def _find_axis(self, x: Tensor, y: Tensor) -> int:
        last = y.dim() - 1
        if type(self.module).forward in _LAST:
            return last
        own = dict(self.module.named_parameters(recurse=False))
        p = own.get("weight", own.get("bias"))
        assert p is not None, self.where
        H = p.numel()
        if own.get("weight") is None or x.shape != y.shape:
            return last
        some = x[:1].detach()
        weight = torch.linspace(1, 2, H, dtype=p.dtype, device=x.device)
        plain, scaled = self.normalised(some), self._at(weight, some) - self._at(weight * 0, some)
        for axis in range(last, 0, -1):
            if plain.shape[axis] == H:
                along = weight.view([-1 if i == axis else 1 for i in range(y.dim())])
                if alike(scaled, plain * along):
                    return axis
        raise self.refusal("no dimension of its output that its weight multiplies elementwise")

    def normalised(self, *args: Any, **kwargs: Any) -> Tensor:
        """xhat, what the weight multiplies, for the module's arguments."""
        weight = self.module.get_parameter("weight")
        one = torch.ones(weight.shape, dtype=weight.dtype, device=weight.device)
        return self._at(one, *args, **kwargs) - self._at(one * 0, *args, **kwargs)

    def _at(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output at that weight and without its bias."""
        plain = {"weight": weight}
        if getattr(self.module, "bias", None) is not None:
            plain["bias"] = torch.zeros_like(weight)
        with computing_with(self.module, plain):
            out: Tensor = self.module.forward(*args, **kwargs)
        return out


class GatedNormTap(ElementwiseTap):
    """A norm that takes more than its input (a gate, as Mamba2's): xhat is kept in x's place."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Those of ElementwiseTap whose forward has another argument."""
        takes = len(inspect.signature(module.forward).parameters)
        return ElementwiseTap.fits(module) and hasattr(module, "weight") and takes > 1

    @torch.no_grad()
    def keep(self, call: Call) -> Kept:
        """See Tap."""
        weight = self.module.get_parameter("weight")
        if weight.shape != call.output.shape[-1:]:
            raise self.refusal("expected a weight along the last dimension of its output")
        xhat = self.normalised(*call.args, **call.kwargs)
        self._axes[xhat.dim()] = xhat.dim() - 1
        return Kept(*call.current.layout.per_example(call.output, xhat.detach()))

    def xhat_of(self, x: Tensor) -> Tensor:
        """What was kept."""
        return x
