"""Errors that name the op, the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fail(
    op: str,
    argument: str,
    expected: str,
    got: Any,
    way_out: str = "",
    error: type[Exception] = ValueError,
) -> Exception:
    """The exception to raise; a str in `got` is taken as a description, anything else is described."""
    came = got if isinstance(got, str) else describe(got)
    return error(
        f"{op}: {argument}: expected {expected}, got {came}" + (f"; {way_out}" if way_out else "")
    )


def tensor(op: str, argument: str, value: Any, dtypes: Iterable[torch.dtype] = FLOATS) -> Tensor:
    if not isinstance(value, Tensor):
        raise fail(op, argument, "a torch.Tensor", value, error=TypeError)
    if value.dtype not in tuple(dtypes):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(
            op,
            argument,
            f"a tensor of dtype {names}",
            value,
            f"convert it with {argument}.to(...)",
            TypeError,
        )
    return value


def choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise fail(op, argument, "one of " + ", ".join(repr(c) for c in choices), repr(value))
    return str(value)


def number(
    op: str,
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> float:
    bounds = (
        f"a finite number {'>' if open_low else '>='} {low:g}"
        if low > -math.inf
        else "a finite number"
    )
    if high < math.inf:
        bounds += f" and <= {high:g}"
    if isinstance(value, Tensor):
        raise fail(
            op,
            argument,
            bounds,
            value,
            "pass a Python float (.item() once, outside the training step)",
            TypeError,
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            value = float(value)  # numpy scalars
        except (TypeError, ValueError):
            raise fail(op, argument, bounds, value, error=TypeError) from None
    value = float(value)
    if (
        value != value
        or abs(value) == math.inf
        or value < low
        or value > high
        or (open_low and value == low)
    ):
        raise fail(op, argument, bounds, repr(value))
    return value


def count(op: str, argument: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise fail(op, argument, "an integer >= 1", value)
    return value


def same_device(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
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
    """A mask or weight broadcast to the tokens' shape."""
    if not isinstance(value, Tensor):
        raise fail(op, argument, "a torch.Tensor", value, error=TypeError)
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


def ids_in_range(op: str, name: str, ids: Tensor, V: int) -> None:
    """On the CPU alone: on a GPU the look would be a host sync, and the gather checks there."""
    looks = (
        ids.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    if looks and ids.numel() and not bool(((ids >= 0) & (ids < V)).all()):
        raise fail(
            op,
            name,
            f"values in [0, {V})",
            f"{int(ids.min())} to {int(ids.max())}",
            "leave tokens without a label (-100) out with mask=",
            IndexError,
        )


def lists(op: str, per: str, **values: Sequence[Tensor]) -> None:
    """Lists of tensors as long as the first of them, which has one `per` each."""
    first: int | None = None
    for name, value in values.items():
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise fail(op, name, "a list of tensors", value, f"pass [{name}]", TypeError)
        first = len(value) if first is None else first
        if len(value) != first:
            raise fail(op, name, f"{first} tensors, one per {per}", f"{len(value)}")
