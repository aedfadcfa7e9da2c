"""How a language model's logits follow from hidden states, proven by logits of the model's own.

What a configuration says of a model's logits is a guess: a class may scale them elsewhere or not at
all, put layers before its last matrix, or cut columns off behind it. So a head is taken for the
model's only after it gave the same logits as the model did, of the same hidden states; where none
does, the model's own logits are the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base.gemm import narrow_gemm, project
from fasttax._base.modes import autocast_dtype
from fasttax._base.optional import given

ROWS = 8  # tokens by which a head is proven
# of the largest logit: several roundings of the dtype that multiplies, none of a softmax
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
TF32 = 4e-3  # of float32 where the device multiplies in TF32


@dataclass(frozen=True)
class Head:
    """The head's weight (V, H), its bias (V,), and what its logits meet before the temperature."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def products(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., H), neither scaled nor capped."""
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def wide_products(self) -> Callable[[Tensor], Tensor]:
        """Gives `products` of (N, H) in float32 (float64 of a float64 head), without a graph.

        Both operands are rounded to autocast's dtype where it is on.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        autocast = autocast_dtype(self.weight.device) if wide == torch.float32 else None
        dtype = autocast or self.weight.dtype
        device = self.weight.device
        operands = wide if device.type == "cuda" and not narrow_gemm(device) else dtype
        weight = self.weight.detach().to(dtype).to(operands)
        bias = given(self.bias, lambda bias: bias.detach().to(wide))

        def products(hidden: Tensor) -> Tensor:
            rows = hidden.detach().to(dtype).to(operands)
            out = rows.new_empty((rows.shape[0], weight.shape[0]), dtype=wide)
            return project(rows, weight, bias, out)

        return products

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., H), under the autocast that is on."""
        logits = self.products(hidden) * self.logit_scale
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def detach(self) -> Head:
        """The same without a gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)


@dataclass(frozen=True)
class Way:
    """A module whose output a head turns into the model's logits, and the head's constants."""

    module: nn.Module
    logit_scale: float
    softcap: float | None


class Shortcut:
    """The head on a backbone's hidden states in place of the whole model, where it is proven.

    Args:
        model: a language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = backbones(model)
        # by the names of the model's arguments: text alone and text with images are two forwards
        self._ways: dict[frozenset[str], Way | None] = {}

    def possible(self) -> bool:
        """Whether the head is one plain matrix, which an adapter on it would end, and is called."""
        layer = self.model.get_output_embeddings()
        plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        return plain and bool(self.modules) and "logits_to_keep" in arguments_of(self.model)

    def known(self, names: frozenset[str]) -> bool:
        """Whether such a call has been proven, or has failed to be."""
        return names in self._ways

    def way(self, names: frozenset[str]) -> Way | None:
        """What was proven of such a call."""
        return self._ways.get(names) if self.possible() else None

    def learn(self, names: frozenset[str], way: Way | None) -> None:
        """Keeps what was found."""
        self._ways[names] = way

    def head(self, way: Way) -> Head:
        """The head as its weights are at present; read where sharded ones are whole."""
        layer = self.model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return Head(_whole(layer.weight), _whole(bias), way.logit_scale, way.softcap)

    def proven(self, module: nn.Module, states: Tensor, logits: Tensor, mask: Tensor) -> Way | None:
        """The way from `states` to `logits`, or None where no head that is known gives them.

        Args:
            module: which made the states.
            states: (B, T, H).
            logits: (B, K, V), the model's own of the last K positions.
            mask: (B, K), tokens to compare by; at least one.
        """
        if states.dim() != 3 or states.shape[1] < logits.shape[1]:
            return None
        rows = states[:, -logits.shape[1] :][mask][:ROWS]
        own = logits[mask][:ROWS]
        for logit_scale, softcap in _constants(self.model):
            way = Way(module, logit_scale, softcap)
            head = self.head(way)
            if rows.shape[-1] != head.weight.shape[-1] or own.shape[-1] != head.weight.shape[0]:
                return None
            if _same(head.logits(rows), own, rows):
                return way
        return None


def backbones(model: Any) -> list[nn.Module]:
    """The modules whose output may be the hidden states of the head, the outermost first."""
    # `model` is where classes with a head have it, though some name another as their base_model
    found = [getattr(model, "base_model", None), getattr(model, "model", None)]
    if callable(decoder := getattr(model, "get_decoder", None)):
        found.append(decoder())
    modules = [m for m in found if isinstance(m, nn.Module) and m is not model]
    return list(dict.fromkeys(modules))


def hidden_states(output: Any) -> Any:
    """A backbone's last hidden states (B, T, H), whatever form its output has."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def logits_of(output: Any) -> Tensor | None:
    """The (B, T, V) logits in a model's output, or None."""
    if isinstance(output, tuple):
        found = [x for x in output if isinstance(x, Tensor) and x.dim() == 3]
        return found[0] if found else None
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def arguments_of(model: Any) -> list[str]:
    """The names of a module's arguments."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in kinds]


def vocabulary(model: Any) -> int | None:
    """Columns of a model's logits by the rows of its head; None where it has none of one matrix."""
    layer = model.get_output_embeddings()
    if isinstance(size := getattr(layer, "out_features", None), int):
        return size
    weight = getattr(layer, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


# --- watching and standing in ---------------------------------------------------------------------


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Fills a dictionary with the outputs of the modules that are called meanwhile."""
    seen: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Bypassed(Exception):
    """A model reaches into the module that was replaced, where it should call it."""


class StandIn(nn.Module):
    """Gives the output that another module gave already, and that one's data, not its parts."""

    def __init__(self, module: nn.Module, output: Any) -> None:
        super().__init__()
        vars(self).update(replaced=module, output=output, called=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The other module's output, whatever is asked."""
        vars(self)["called"] = True
        return self.output

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.replaced, name)
        if callable(found):
            raise Bypassed(name)
        return found


def replayed(model: Any, module: nn.Module, output: Any, inputs: Mapping[str, Any]) -> Any:
    """What a model makes of a module's output, which is not computed again; None if it can't.

    `model.forward` is called, not the model: no hook on it runs, and a sharded one stays gathered.
    """
    parent, name = _place(model, module)
    stand_in = StandIn(module, output)
    parent._modules[name] = stand_in
    try:
        found = model.forward(**inputs)
    except Bypassed:
        return None
    finally:
        parent._modules[name] = module
    return found if stand_in.called else None


def _place(model: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """Where a module hangs in a model."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                return parent, name
    raise AssertionError(f"{type(module).__name__} is no part of {type(model).__name__}")


# --- comparing ------------------------------------------------------------------------------------


def _same(rebuilt: Tensor, own: Tensor, hidden: Tensor) -> bool:
    """Whether two (N, V) are the same numbers up to rounding; constant ones prove nothing."""
    device = hidden.device.type
    dtypes = {hidden.dtype, rebuilt.dtype}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, TF32)
    wide = torch.promote_types(rebuilt.dtype, torch.float32)
    rebuilt, own = rebuilt.to(wide), own.to(wide)
    if not bool(own.isfinite().all()) or not bool((own.amax(-1) > own.amin(-1)).any()):
        return False
    return bool((rebuilt - own).abs().max() <= tolerance * own.abs().max())


def _whole(tensor: Any) -> Any:
    """A tensor as it is, all of a sharded one, None for None."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _constants(model: Any) -> list[tuple[float, float | None]]:
    """(logit_scale, softcap) as the configuration has them, and as a class that applies neither."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    found = [(_logit_scale(config), softcap), (1.0, softcap), (1.0, None)]
    return list(dict.fromkeys(found))


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits by, under the name that its family has for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scale = getattr(config, "logits_scaling", None)
    if scale is None:
        return 1.0
    # HyperCLOVA X multiplies by it, Granite divides
    return float(scale) if config.model_type == "hyperclovax" else 1.0 / float(scale)
