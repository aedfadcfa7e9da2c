"""What moves a weight beside an optimizer that steps it: adapters around the layer that owns it.

Of these EWC holds one kind, W + a product of factors (scale B A), and only layers that were seen to
compute with that weight (`prove`). Any other adapter over a held weight is refused: the weight
itself is frozen, so that its penalty would stay 0 however far the adapter moves the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fasttax._base import checks
from fasttax._base.modes import evaluated
from fasttax.ewc import factors
from fasttax.ewc.factors import CONVOLUTIONS, is_packed
from fasttax.ewc.lora import LoraHeld, refuse_unsupported
from fasttax.ewc.names import Names

ROWS = 3  # of the random input
TOLERANCE = 1e-6  # relative error of a layer in float64, whose own rounding is near 1e-15
# of a layer over packed weights, which computes in bfloat16, and of a parameter in its own dtype
COARSE_TOLERANCE = 2e-2
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
    if len(layers) == 1 and factors.has_factors(layer):
        if factors.weight_of(layer) is theta:
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


def refuse_prompts(op: str, model: nn.Module, names: Names, given: Iterable[str]) -> None:
    """Refuses frozen weights of a model that learns what is put before or between its activations.

    Prompt tuning, p-tuning, prefix tuning, CPT, Llama-Adapter: no weight moves.

    Raises:
        ValueError: a name is not of a trainable parameter.
    """
    kinds = {kind for module in model.modules() for kind in _learned_prompts(module)}
    found = {name: names.find(name) for name in given}
    still = [
        n for n, whole in found.items() if not whole or not names.parameters[whole].requires_grad
    ]
    if kinds and still:
        more = f" and {len(still) - 1} more" if len(still) > 1 else ""
        raise checks.fail(
            op,
            "model",
            "weights that training moves",
            f"{still[0]}{more} under {', '.join(sorted(kinds))}, which leaves the weights as they "
            "are: their penalty would stay 0 however far the prompt moves the outputs",
            "train LoRA in place of the prompt, or leave the frozen weights out of the Fisher and "
            "hold the prompt's own parameters",
        )


def _learned_prompts(module: Any) -> list[str]:
    """The kinds of prompts that PEFT put beside a model."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, Mapping):
        return []
    return [
        type(config).__name__.removesuffix("Config")
        for config in configs.values()
        if getattr(config, "is_prompt_learning", False)
        or getattr(config, "is_adaption_prompt", False)
    ]


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
        coarse = is_packed(h.base) or factors.is_of_parameter(h.module)
        bound = COARSE_TOLERANCE if coarse else TOLERANCE
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
    base = layer.base_layer
    kernel = base.weight.shape[2:] if isinstance(base, CONVOLUTIONS) else ()
    return (
        type(layer),
        type(base),
        getattr(layer, "parameter_name", ""),
        factors.weight_of(layer).dtype,
        type(factors.weight_of(layer)),
        kernel,
        getattr(layer, "fan_in_fan_out", False),
        len(factors.adapters_of(layer)) > 1,
        id(layer) if "forward" in vars(layer) else None,
    )


def _error(h: LoraHeld) -> float:
    """The relative error of what a layer computes, where 1 is what the update contributes."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)

    with torch.no_grad(), evaluated(h.module):
        if factors.is_of_parameter(h.module):
            got, moved, plain = _weights_of_parameter(h.module, draw)
        else:
            got, moved, plain = _outputs(h.module, draw)
    return float((got - moved).norm() / (moved - plain).norm())


def _outputs(layer: Any, draw: Callable[[Sequence[int], Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Of a layer, of its base with the update added, and of the base."""
    base = layer.base_layer
    packed = is_packed(base.weight)
    device = base.weight.device if packed else torch.device("cpu")
    like = torch.empty(0, dtype=torch.float32 if packed else torch.float64, device=device)
    drawn = {name: draw(p.shape, like) for name, p in factors.named_factors(layer).items()}
    delta = factors.delta(layer, drawn)
    if factors.is_embedding(layer):
        inputs = torch.arange(min(ROWS, delta.shape[0]), device=device)
    elif isinstance(base, CONVOLUTIONS):
        reach = [d * (k - 1) + 1 for k, d in zip(base.kernel_size, base.dilation, strict=True)]
        inputs = draw((ROWS, base.in_channels, *reach), like)
    else:
        inputs = draw((ROWS, factors.inputs(layer, delta)), like)
    if packed:
        if inputs.is_floating_point():
            # of inputs without one bitsandbytes takes it that nothing trains: on a CPU it lays the
            # weight out anew, from where no gradient goes back
            inputs.requires_grad_()
        plain = base(inputs)
        moved = plain + inputs @ delta.T
        own: dict[str, Tensor] = {}
    else:
        own = {name: draw(p.shape, like) for name, p in base.named_parameters()}
        plain = functional_call(base, own, (inputs,))
        moved = functional_call(base, {**own, "weight": own["weight"] + delta}, (inputs,))
    replaced = {**drawn, **{f"base_layer.{n}": p for n, p in own.items()}}
    return functional_call(layer, replaced, (inputs,)), moved, plain


def _weights_of_parameter(
    layer: Any, draw: Callable[[Sequence[int], Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """The parameter as its module reads it, with the update added, and without.

    Stacks of experts are large: they stay where and as they are, and a few of them are compared.
    """
    module, weight = layer.get_base_layer(), factors.weight_of(layer)
    drawn = {n: draw(p.shape, p.detach()) for n, p in factors.named_factors(layer).items()}
    with _reading(module, layer.parameter_name):
        got = functional_call(layer, drawn, (weight.new_empty(0),))[:ROWS]
    plain = weight[:ROWS].double()
    return got.double(), plain + factors.delta(layer, drawn)[:ROWS].double(), plain


@contextmanager
def _reading(module: nn.Module, parameter: str) -> Iterator[None]:
    """A module whose forward gives one of its parameters as it reads it."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: getattr(module, parameter)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
