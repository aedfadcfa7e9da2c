"""What moves a weight beside an optimizer that steps it: adapters around the layer that owns it.

Of these EWC holds one kind, W + scale B A, and only layers that were seen to compute with that
weight (`prove`). Any other adapter over a held weight is refused: the weight itself is frozen, so
that its penalty would stay 0 however far the adapter moves the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fasttax._base import checks
from fasttax.ewc.lora import LoraHeld, is_embedding, is_packed, refuse_unsupported
from fasttax.ewc.names import Names

ROWS = 3  # of the random input
TOLERANCE = 1e-6  # relative error of a layer in float64, whose own rounding is near 1e-15
PACKED_TOLERANCE = 2e-2  # of a layer over packed weights, which computes in bfloat16
OTHERWISE = (
    "train it with plain LoRA (target_modules), merge the adapter (merge_and_unload()) and make "
    "the EWC of the merged model, or leave it out of the Fisher"
)


def wrappers_of(model: nn.Module, whole: str) -> list[nn.Module]:
    """The adapter layers around the module that owns a parameter, the outermost first.

    A layer of one parameter of several, as PEFT's of fused experts, is one of that parameter alone.
    """
    *path, leaf = whole.split(".")
    found, module = [], model
    for part in path:
        only = getattr(module, "parameter_name", leaf)
        if part == "base_layer" and only == leaf:
            found.append(module)
        module = module.get_submodule(part)
    return found


def moving(model: nn.Module, names: Names, theta: Tensor) -> list[nn.Module]:
    """The adapter layers over a parameter under any of its names: one may be tied to it."""
    layers = [layer for name in names.names_of(theta) for layer in wrappers_of(model, name)]
    return list({id(layer): layer for layer in layers}.values())


def lora_layer(op: str, model: nn.Module, names: Names, whole: str) -> nn.Module | None:
    """The LoRA layer that moves a parameter, None where nothing but its optimizer does.

    Raises:
        ValueError: another adapter does, or several.
    """
    theta = names.parameters[whole]
    layers = moving(model, names, theta)
    if not layers:
        _refuse_own_factors(op, model, names, whole)
        return None
    layer = layers[0]
    if len(layers) == 1 and _looks_like_lora(layer):
        if getattr(layer.base_layer, "weight", None) is theta:
            return layer
        if _is_its_bias(layer, theta):
            refuse_unsupported(op, whole, layer)
            return None
    kinds = " over ".join(_kind(layer) for layer in layers)
    raise checks.fail(
        op,
        "model",
        "weights that move by their optimizer's steps, or by one LoRA layer's scale B A",
        f"{whole} under {kinds}, which moves it otherwise: it is frozen, and its own penalty would "
        "stay 0",
        OTHERWISE,
    )


def _kind(layer: nn.Module) -> str:
    module = type(layer).__module__.removeprefix("peft.tuners.")
    return f"{module}.{type(layer).__name__}"


def _is_its_bias(layer: Any, theta: Tensor) -> bool:
    """Whether a parameter is the bias that the base layer adds, which plain LoRA leaves alone."""
    return getattr(layer.base_layer, "bias", None) is theta


def _looks_like_lora(layer: Any) -> bool:
    """Whether it has factors as PEFT's LoRA layers have them, over one layer's weight."""
    factors = getattr(layer, "lora_embedding_A" if is_embedding(layer) else "lora_A", None)
    kind = nn.ParameterDict if is_embedding(layer) else nn.ModuleDict
    return (
        isinstance(factors, kind)
        and all(hasattr(layer, name) for name in ("lora_B", "scaling"))
        and not hasattr(layer, "parameter_name")
    )


def _refuse_own_factors(op: str, model: nn.Module, names: Names, whole: str) -> None:
    """Refuses a layer that has its factors beside its weight, as those of loralib."""
    owner = model.get_submodule(whole.rpartition(".")[0])
    if whole.rpartition(".")[2].lower().startswith("lora_"):
        return
    own = [n for n, _ in owner.named_parameters() if n.lower().startswith("lora_")]
    if own and not names.parameters[whole].requires_grad:
        raise checks.fail(
            op,
            "model",
            "weights that move by their optimizer's steps, or by PEFT's LoRA layers",
            f"{whole} beside {own[0]} in one {type(owner).__name__}",
            "use PEFT's LoRA, merge the factors into the weight, or leave it out of the Fisher",
        )


# --- the proof ---------------------------------------------------------------------------------


def prove(op: str, held: Sequence[LoraHeld]) -> None:
    """Sees layers compute with W + scale B A: one of each kind, the smallest, on a random input.

    In float64 on the CPU, with random factors and a random W in their places for one call; packed
    weights stay, on their device.

    Raises:
        ValueError: one computes something else, or can't be seen.
    """
    kinds: dict[Any, LoraHeld] = {}
    for h in held:
        if h.adapters():
            kind = _proof_kind(h.module)
            best = kinds.setdefault(kind, h)
            kinds[kind] = min(best, h, key=lambda x: x.fisher.values.numel())
    for h in kinds.values():
        try:
            error = _error(h)
        except Exception as problem:
            raise _unproven(op, h, f"one that could not be run alone ({problem})") from problem
        bound = PACKED_TOLERANCE if is_packed(h.base) else TOLERANCE
        if not error <= bound:
            raise _unproven(op, h, f"another, {error:.2g} of the update away from it")


def _unproven(op: str, h: LoraHeld, came: str) -> Exception:
    return checks.fail(
        op,
        "model",
        f"a layer that computes with its weight + scale B A in {h.name}",
        f"{_kind(h.module)}: {came}",
        OTHERWISE,
    )


def _proof_kind(layer: Any) -> Any:
    """What layers have in common that compute alike; one with a forward of its own is its own."""
    patched = id(layer) if "forward" in vars(layer) else None
    flag = getattr(layer, "fan_in_fan_out", False)
    several = len(LoraHeld.adapters_of(layer)) > 1
    return (
        type(layer),
        type(layer.base_layer),
        layer.base_layer.weight.dtype,
        flag,
        several,
        patched,
    )


def _error(h: LoraHeld) -> float:
    """The relative error of a layer's output, where 1 is what the update contributes."""
    generator = torch.Generator().manual_seed(0)
    packed = is_packed(h.base)
    device = h.base.device if packed else torch.device("cpu")
    dtype = torch.float32 if packed else torch.float64

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            device, dtype
        )

    factors = {name: draw(p.shape) for name, p in h.named_factors().items()}
    base: Any = h.module.base_layer
    with torch.no_grad(), _evaluated(h.module):
        delta = h.delta(factors)
        if is_embedding(h.module):
            inputs = torch.arange(min(ROWS, delta.shape[0]), device=device)
        else:
            inputs = draw((ROWS, h.inputs(delta)))
        if packed:
            plain = base(inputs)
            moved = plain + inputs @ delta.T
            own: dict[str, Tensor] = {}
        else:
            own = {name: draw(p.shape) for name, p in base.named_parameters()}
            plain = functional_call(base, own, (inputs,))
            moved = functional_call(base, {**own, "weight": own["weight"] + delta}, (inputs,))
        replaced = {**factors, **{f"base_layer.{n}": p for n, p in own.items()}}
        got = functional_call(h.module, replaced, (inputs,))
    return float((got - moved).norm() / (moved - plain).norm())


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Without dropout, and in each part's own mode afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
