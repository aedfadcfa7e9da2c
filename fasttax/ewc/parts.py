"""The tensors of an EWC's file or state by what they are, and whether they can be that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttax._base import checks, packed
from fasttax._base.packed import SPLIT, Stored
from fasttax.ewc.fit import survey
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.factor import problem_of, rows_of

# what a tensor's name begins with, and what must be there beside it under that name
PAIRS = {
    "fisher": "",
    "scales": "fisher",
    "anchor": "",
    "lora_b": "lora_a",
    "lora_a": "lora_b",
    "left": "right",
    "right": "left",
}


def _goes_with(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensor is one of an EWC's, and what it goes with is there."""
    kind, _, name = key.partition(".")
    return kind in PAIRS and (not PAIRS[kind] or f"{PAIRS[kind]}.{name}" in tensors)


@dataclass
class Parts:
    """Each by its parameter's name."""

    fishers: dict[str, Stored]
    anchors: dict[str, Tensor]
    updates: dict[str, tuple[Tensor, Tensor]]  # the anchors (b, a) of LoRA updates
    sides: dict[str, tuple[Tensor, Tensor]]  # Kronecker factors, of rows and of columns

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Parts:
        """From names that begin with what a tensor is.

        It is one of fisher, scales, anchor, lora_b, lora_a, left, right.

        Raises:
            ValueError: one is none of these, or lacks the one that it goes with.
        """
        lone = [n for n in tensors if not _goes_with(n, tensors)]
        if lone:
            known = ", ".join(PAIRS)
            raise ValueError(
                f"expected tensors {known} of a parameter, scales with fisher, lora_b with lora_a, "
                f"left with right, got {lone[0]} alone"
            )

        def named(kind: str) -> dict[str, Tensor]:
            start = kind + "."
            return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

        scales, left, right = named("scales"), named("lora_b"), named("lora_a")
        rows, columns = named("left"), named("right")
        return Parts(
            {n: Stored(t, scales.get(n)) for n, t in named("fisher").items()},
            named("anchor"),
            {n: (b, right[n]) for n, b in left.items() if n in right},
            {n: (t, columns[n]) for n, t in rows.items() if n in columns},
        )


def check_parts(
    op: str, argument: str, shapes: Mapping[str, tuple[int, ...]], parts: Parts
) -> None:
    """Every part must have its parameter's shape, a dtype of its kind and finite values.

    Fishers also values >= 0, in float32, bfloat16 or u8log with its scales.

    Raises:
        ValueError: it names the first that has not.
    """
    for name, shape in shapes.items():
        for what, wrong in _wrong(parts, name, torch.Size(shape)):
            raise checks.fail(
                op,
                argument,
                f"what EWC wrote for {name}",
                f"{what}: {wrong}",
                "write it anew with .state_dict() or .save()",
            )
    # decodes one at a time
    survey(op, FisherEstimate(parts.fishers), [n for n in shapes if n in parts.fishers], None, None)


def _wrong(parts: Parts, name: str, shape: torch.Size) -> list[tuple[str, str]]:
    """(tensor, what is wrong with it) of one parameter."""
    found: list[tuple[str, str]] = []
    if name in parts.sides:
        found.append(("factors", _wrong_sides(parts.sides[name], shape)))
    else:
        found.append(("fisher", _wrong_fisher(parts.fishers[name], shape)))
    if name in parts.anchors:
        found.append(("anchor", _wrong_anchor(parts.anchors[name], shape)))
    if name in parts.updates:
        found.append(("LoRA anchor", _wrong_update(parts.updates[name], shape)))
    return [(f"{what}.{name}", wrong) for what, wrong in found if wrong]


def _wrong_fisher(fisher: Stored, shape: torch.Size) -> str:
    coded = fisher.values.dtype == torch.uint8
    if tuple(fisher.values.shape) != tuple(shape):
        return f"shape {tuple(fisher.values.shape)} for {tuple(shape)}"
    if coded != (fisher.scales is not None):
        return "u8log without its scales" if coded else "scales beside floats"
    if fisher.scales is not None:
        dtype, expected = packed.fisher_specs("", shape, torch.uint8)["scales."]
        if fisher.scales.dtype != dtype or tuple(fisher.scales.shape) != expected:
            return f"scales of {fisher.scales.dtype} {tuple(fisher.scales.shape)} for {expected}"
        if not bool(torch.isfinite(fisher.scales).all()):
            return "scales that are not finite"
    elif fisher.values.dtype not in checks.FLOATS:
        return f"dtype {fisher.values.dtype}"
    return ""


def _wrong_sides(sides: tuple[Tensor, Tensor], shape: torch.Size) -> str:
    rows = [rows_of(t) for t in sides if 1 <= t.dim() <= 3]
    if rows != [shape[0], shape[1:].numel()]:
        return f"of shapes {tuple(sides[0].shape)} and {tuple(sides[1].shape)} for {tuple(shape)}"
    return problem_of(sides[0]) or problem_of(sides[1])


def _wrong_anchor(anchor: Tensor, shape: torch.Size) -> str:
    split = anchor.dtype == torch.uint8
    if not split and anchor.dtype not in checks.FLOATS:
        return f"dtype {anchor.dtype}"
    expected = packed.anchor_spec(shape, SPLIT if split else anchor.dtype)[1]
    if tuple(anchor.shape) != expected:
        return f"shape {tuple(anchor.shape)} for {expected}"
    return _wrong_values(packed.decode_anchor(anchor, shape))


def _wrong_update(update: tuple[Tensor, Tensor], shape: torch.Size) -> str:
    b, a = update
    several = b.dim() == 3 and len(shape) == 3  # experts, or else a convolution's weight in rows
    if b.dim() != a.dim() or b.dim() != 2 + several or b.shape[-1] != a.shape[-2]:
        return f"shapes {tuple(b.shape)} and {tuple(a.shape)}, which do not multiply"
    matrix = tuple(shape) if several else (shape[0], shape[1:].numel())
    if (*b.shape[:-1], a.shape[-1]) != matrix or a.shape[:-2] != b.shape[:-2]:
        return f"shapes {tuple(b.shape)} and {tuple(a.shape)} for {tuple(shape)}"
    return _wrong_values(b) or _wrong_values(a)


def _wrong_values(values: Tensor) -> str:
    return "" if bool(torch.isfinite(values).all()) else "values that are not finite"
