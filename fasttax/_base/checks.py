"""Errors that name the op, the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fasttax._base import waits
from fasttax._base.modes import compiling, has_tangent, transforming

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """What came, in a few words: a tensor's dtype, shape and device; 80 characters of a repr."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())  # a module's has many lines
    return text if len(text) <= 80 else f"{text[:77]}..."


def fail(
    op: str,
    argument: str,
    expected: str,
    got: Any,
    way_out: str = "",
    error: type[Exception] = ValueError,
) -> Exception:
    """The exception to raise; a str in `got` is a description, anything else is described."""
    came = got if isinstance(got, str) else describe(got)
    message = f"{op}: {argument}: expected {expected}, got {came}"
    return error("; ".join(part for part in (message, way_out) if part))


def tensor(
    op: str,
    argument: str,
    value: Any,
    dtypes: Iterable[torch.dtype] = FLOATS,
    *,
    forward_mode: bool = False,
) -> Tensor:
    """`value`, which must be a tensor of one of the dtypes that lies in memory by strides.

    `forward_mode`: the op is made of torch's own, which carry a forward-mode derivative along.

    Raises:
        TypeError: it is not (a sparse tensor, one in MKL-DNN's layout).
        NotImplementedError: it has a forward-mode derivative, which the op's kernels would drop.
    """
    if not isinstance(value, Tensor):
        way_out = "pass its .logits" if hasattr(value, "logits") else ""
        raise fail(op, argument, "a torch.Tensor", value, way_out, TypeError)
    if value.dtype not in tuple(dtypes):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(
            op,
            argument,
            f"a tensor of dtype {names}",
            value,
            _to_convert(argument, value),
            TypeError,
        )
    dense(op, argument, value)
    if not forward_mode:
        no_tangent(op, argument, value)
    return value


def dense(op: str, argument: str, value: Tensor) -> None:
    """`value` must lie in memory by strides, as kernels read it.

    Raises:
        TypeError: it is sparse, or in MKL-DNN's layout.
    """
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise fail(
            op,
            argument,
            "a dense tensor",
            f"one of layout {layout}",
            f"convert it with {argument}.to_dense()",
            TypeError,
        )


def has_memory(op: str, name: str, parameter: Tensor) -> None:
    """The model's parameter must not be on the device "meta".

    Raises:
        ValueError: it is.
    """
    if parameter.is_meta:
        raise fail(
            op,
            "model",
            "parameters that hold values",
            f"{name} on the device meta",
            "load its weights first (from_pretrained without device_map's offloading, or "
            "to_empty(device=...) and load_state_dict)",
        )


def _to_convert(argument: str, value: Tensor) -> str:
    if value.is_quantized:
        return f"convert it with {argument}.dequantize()"
    return f"convert it with {argument}.to(...)"


def no_tangent(op: str, argument: str, value: Tensor) -> None:
    """`value` must have no forward-mode derivative, which the op's kernels would drop.

    Raises:
        NotImplementedError: it has one (torch.func.jvp, torch.autograd.forward_ad).
    """
    if has_tangent(value):
        raise fail(
            op,
            argument,
            "a tensor without a forward-mode derivative (torch.func.jvp, forward AD)",
            "one with a tangent, or one in a trace inside a level of forward mode",
            "take reverse mode (torch.autograd.grad), or the op's twin in fasttax.reference, which "
            "is plain PyTorch; call the op outside torch.compile where it has none",
            NotImplementedError,
        )


def for_backward(op: str, **tensors: Tensor | None) -> None:
    """Tensors that an op keeps for its backward, where one of them requires grad.

    Raises:
        ValueError: torch.inference_mode made one, which autograd can't keep.
    """
    if not torch.is_grad_enabled() or compiling() or torch.is_inference_mode_enabled():
        return
    given = {name: t for name, t in tensors.items() if t is not None}
    made = [name for name, t in given.items() if t.is_inference()]
    if made and any(t.requires_grad for t in given.values()):
        raise fail(
            op,
            made[0],
            "a tensor that autograd can keep for the backward",
            "one that was made under torch.inference_mode()",
            f"make it under torch.no_grad(), or pass {made[0]}.clone()",
        )


def choice(op: str, argument: str, value: Any, choices: Collection[str]) -> str:
    """`value`, which must be one of the choices.

    Raises:
        ValueError: it is not; names all of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise fail(op, argument, "one of " + ", ".join(repr(c) for c in choices), repr(value))
    return value


def keys(
    op: str,
    argument: str,
    given: Iterable[Any],
    accepted: Collection[str],
    required: Mapping[str, str] | None = None,
) -> None:
    """The keys of a mapping: each is accepted, and of `required`, by what each means, none lacks.

    Raises:
        ValueError: it is not so; with the key that was meant, or what is missing.
    """
    there = list(given)
    for key in there:
        if key not in accepted:
            near = difflib.get_close_matches(str(key), accepted, 1)
            near += [name for name in accepted if name.startswith(f"{key}_")]
            way_out = f"did you mean {near[0]!r}?" if near else "leave it out"
            expected = "one of " + ", ".join(repr(c) for c in accepted)
            raise fail(op, argument, expected, repr(key), way_out)
    missing = {key: what for key, what in (required or {}).items() if key not in there}
    if missing:
        expected = "the keys " + " and ".join(repr(key) for key in required or ())
        came = "no " + " and no ".join(repr(key) for key in missing)
        way_out = "; ".join(f"add {key!r}: {what}" for key, what in missing.items())
        raise fail(op, argument, expected, came, way_out)


def number(
    op: str,
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> float:
    """`value` as a finite Python float within the bounds; `open_low` leaves `low` itself out.

    Raises:
        TypeError: it is no number; a tensor would be a host sync.
        ValueError: it is out of bounds.
    """
    if isinstance(value, Tensor):
        way_out = "pass a Python float (.item() once, outside the training step)"
        raise fail(op, argument, _bounds(low, high, open_low), value, way_out, TypeError)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            if isinstance(value, (str, bytes)):  # of which float() would make a number
                raise TypeError
            value = float(value)  # numpy scalars
        except (TypeError, ValueError):
            expected = _bounds(low, high, open_low)
            raise fail(op, argument, expected, describe(value), error=TypeError) from None
    try:
        value = float(value)
    except OverflowError:  # an integer beyond float64
        came = "an integer beyond float64's range"
        raise fail(op, argument, _bounds(low, high, open_low), came) from None
    inside = low < value <= high if open_low else low <= value <= high
    if not inside or abs(value) == math.inf:  # NaN is never inside
        raise fail(op, argument, _bounds(low, high, open_low), repr(value))
    return value


def _bounds(low: float, high: float, open_low: bool) -> str:
    """What `number` expects, in words."""
    bounds = "a finite number"
    if low > -math.inf:
        bounds += f" {'>' if open_low else '>='} {low:g}"
    if high < math.inf:
        bounds += f" and <= {high:g}"
    return bounds


def positive(op: str, argument: str, value: Any) -> float:
    """`value` as a finite Python float > 0."""
    return number(op, argument, value, low=0, open_low=True)


def count(op: str, argument: str, value: Any) -> int:
    """`value`, which must be an integer >= 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise fail(op, argument, "an integer >= 1", value)
    return int(value)  # of numpy's


def same_device(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    """`value` must be where `like`, the argument `other`, is.

    Raises:
        ValueError: it is not.
    """
    if value.device != like.device:
        raise fail(
            op,
            argument,
            f"a tensor on {like.device}, where {other} is",
            value,
            f"move it with {argument}.to({other}.device)",
        )


def per_token(
    op: str, argument: str, value: Any, shape: torch.Size, device: torch.device
) -> Tensor:
    """A mask or weight broadcast to the tokens' shape.

    Raises:
        TypeError: it is no tensor of real numbers.
        ValueError: it is on another device, or does not broadcast.
    """
    if not isinstance(value, Tensor):
        raise fail(op, argument, "a torch.Tensor", value, error=TypeError)
    if value.is_complex() or value.is_quantized:
        raise fail(op, argument, "real numbers", value, _to_convert(argument, value), TypeError)
    dense(op, argument, value)
    if value.device != device:
        raise fail(
            op,
            argument,
            f"a tensor on {device}, where the logits are",
            value,
            f"move it with {argument}.to({str(device)!r})",
        )
    try:
        return value.broadcast_to(shape)
    except RuntimeError:
        raise fail(
            op, argument, f"a shape that broadcasts to {tuple(shape)} (one value a token)", value
        ) from None


def has_values(value: Tensor) -> bool:
    """Whether a look at the values costs no sync, and there are values to look at.

    On a GPU it would be one; under torch.compile and torch.func there are none.
    """
    return not waits.waits(value) and not compiling() and not transforming()


def token_mask(op: str, mask: Any, shape: torch.Size, device: torch.device, factors: str) -> Tensor:
    """A mask as bool of the tokens' `shape`; `factors` says where an op takes those.

    Raises:
        TypeError, ValueError: it is no tensor of that shape; as `counted`.
    """
    given = per_token(op, "mask", mask, shape, device)
    way_out = "of labels pass mask=labels != -100"
    return counted(op, "mask", given, f"{way_out}; {factors}" if factors else way_out).contiguous()


def counted(op: str, argument: str, mask: Tensor, way_out: str) -> Tensor:
    """Which tokens a mask counts: 0 leaves out, packed documents' numbers are in.

    Raises:
        ValueError: on a CPU, where a look is no sync, it has labels' -100, fractions, or what a
            model adds to its scores.
    """
    if mask.dtype == torch.bool:
        return mask
    if has_values(mask):
        whole = mask >= 0
        if mask.is_floating_point():
            whole &= mask == mask.floor()
        if not bool(whole.all()):
            came = f"a value of {mask[~whole][0].item():g}"
            raise fail(op, argument, "bool, or 0 and 1", came, way_out)
    return mask != 0


def attention_mask(op: str, argument: str, mask: Tensor) -> Tensor:
    """Which tokens of a batch are no padding.

    Raises:
        ValueError: as `counted`.
    """
    return counted(op, argument, mask, "pass 1 for tokens and 0 for padding")


def ids_in_range(op: str, name: str, ids: Tensor, V: int, of: str = "logits") -> None:
    """Token ids on a CPU must be of the vocabulary, which is that of the argument `of`.

    On a GPU the look would be a host sync, and the gather checks there; under torch.compile and
    torch.func there are no values to look at.

    Raises:
        IndexError: one is not.
    """
    if has_values(ids) and ids.numel() and not bool(((ids >= 0) & (ids < V)).all()):
        low, high = int(ids.min()), int(ids.max())
        way_out = "leave tokens without a label (-100) out with mask="
        if high >= V:
            way_out = (
                f"the vocabulary of {of} has {V} tokens, and {name} are of a larger one: take both "
                "from models with one tokenizer"
            )
        raise fail(op, name, f"values in [0, {V})", f"{low} to {high}", way_out, IndexError)


def lists(op: str, per: str, **values: Sequence[Tensor]) -> None:
    """Lists of tensors as long as the first of them, which has one `per` each.

    Raises:
        TypeError: one is not a list.
        ValueError: one is of another length.
    """
    for name, value in values.items():
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise fail(op, name, "a list of tensors", value, f"pass [{name}]", TypeError)
        first = len(next(iter(values.values())))
        if len(value) != first:
            raise fail(op, name, f"{first} tensors, one per {per}", f"{len(value)}")


def distinct_memory(op: str, argument: str, written: Sequence[Tensor]) -> None:
    """Tensors that an op writes in place must not share memory: threads would race for it.

    Raises:
        ValueError: two of them do.
    """
    if compiling() or transforming():  # tensors without an address
        return
    spans = []
    for i, t in enumerate(written):
        if t.numel() and t.device.type != "meta":
            start = t.data_ptr()
            spans.append((start, start + t.numel() * t.element_size(), i, t.device))
    spans.sort(key=lambda span: (str(span[3]), span[0]))
    for (_, end, i, device), (start, _, j, other) in pairwise(spans):
        if device == other and start < end:
            raise fail(
                op,
                f"{argument}[{max(i, j)}]",
                f"memory of its own, since it is written in place, apart from {argument}"
                f"[{min(i, j)}]",
                "shared memory",
                "list each tensor once, or call the op once for each",
            )
