"""Fisher and anchor in fewer bytes than float32, in the layouts that the kernels read.

A Fisher in bfloat16 or as u8log (1 byte a value), an anchor in bfloat16 or as bf16+8 (3 bytes).
`fasttax.reference.decode_u8log` and `decode_split` specify the two layouts of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.mapped import Spec
from fasttax._base.modes import ordinary
from fasttax._base.optional import given

STORAGES = ("fp32", "bf16", "u8log")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the storages that are a dtype
SPLIT = "bf16+8"
BLOCK = 256  # values that share a range in u8log, and 768 bytes in bf16+8


@dataclass(frozen=True)
class Stored:
    """A Fisher tensor as kernels read it.

    `values` are floats or u8log's codes (uint8), `scales` u8log's (lo, step) of each block. Made
    under torch.inference_mode they are copied: penalties are differentiated later.
    """

    values: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", ordinary(self.values))
        object.__setattr__(self, "scales", given(self.scales, ordinary))

    def decode(self) -> Tensor:
        """The values as floats."""
        if self.scales is None:
            return self.values
        return reference.decode_u8log(self.values, self.scales)

    def unbind(self) -> Iterator[Stored]:
        """Those of each index of the first dimension; u8log's as floats where blocks span two."""
        if self.scales is None:
            yield from map(Stored, self.values.unbind())
            return
        flat, size = self.values.reshape(-1), self.values[0].numel()
        for k, values in enumerate(self.values.unbind()):
            start, stop = k * size, (k + 1) * size
            first, last = start // BLOCK, _blocks(stop)
            if start % BLOCK == 0:
                yield Stored(values, self.scales[first:last])
                continue
            codes, scales = flat[first * BLOCK : last * BLOCK], self.scales[first:last]
            floats = reference.decode_u8log(codes, scales)[start - first * BLOCK :][:size]
            yield Stored(floats.view(values.shape))

    def to(self, device: torch.device) -> Stored:
        """The same on `device`."""
        scales = self.scales if self.scales is None else self.scales.to(device)
        return Stored(self.values.to(device), scales)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a file has of it: fisher.<name>, and scales.<name> where it is u8log."""
        values = {f"fisher.{name}": self.values}
        return values if self.scales is None else {**values, f"scales.{name}": self.scales}


def encode(fisher: Tensor, storage: str) -> Stored:
    """A Fisher >= 0 in fp32, bf16 (relative error <= 2^-8) or u8log.

    u8log has 255 steps of log2 F between each block's extremes, and zeros exactly.

    Raises:
        ValueError: a value that u8log has no code for.
    """
    if storage in FLOATS:
        return Stored(fisher.to(FLOATS[storage]).contiguous())
    if not are_squares(fisher):
        raise checks.fail(
            "u8log",
            "fisher",
            "finite values >= 0 in float32's range",
            "others",
            "estimate it anew, on a model whose loss and gradients are finite",
        )
    values = _in_blocks(fisher)
    positive, logs = values > 0, values.log2()
    lo = torch.where(positive, logs, torch.inf).amin(-1)
    hi = torch.where(positive, logs, -torch.inf).amax(-1)
    lo, hi = (torch.where(torch.isfinite(x), x, 0.0) for x in (lo, hi))
    step = (hi - lo) / 254
    wanted = step[:, None] > 0
    steps = torch.where(wanted, (logs - lo[:, None]) / step[:, None].clamp_min(1e-30), 0.0)
    codes = torch.where(positive, steps.round().clamp(0, 254) + 1, 0.0).to(torch.uint8)
    codes = codes.flatten()[: fisher.numel()].view(fisher.shape)
    return Stored(codes.contiguous(), torch.stack((lo, step), -1).contiguous())


def are_squares(fisher: Tensor) -> bool:
    """Whether all values are finite and >= 0, as float32."""
    if not fisher.numel():
        return True
    low, high = fisher.detach().aminmax()  # NaN if one is
    return bool((low >= 0) & torch.isfinite(high.float()))


def check_squares(where: str, tensors: Mapping[str, Tensor]) -> None:
    """What a file has as a Fisher (fisher.NAME with scales.NAME) or sum of squares (sum.NAME).

    Raises:
        ValueError: one is no float tensor of finite values >= 0, nor u8log with its ranges; names
            the file, `where`, and the tensor.
    """
    for key, values in tensors.items():
        kind, _, name = key.partition(".")
        scales = tensors.get(f"scales.{name}")
        wrong = ""
        if kind == "fisher" and values.dtype == torch.uint8:
            wrong = _wrong_ranges(values, scales)
        elif kind in ("fisher", "sum") and values.dtype not in checks.FLOATS:
            wrong = f"expected floats, got {values.dtype}"
        elif kind == "fisher" and scales is not None:
            wrong = f"expected no u8log ranges beside {values.dtype}"
        elif kind in ("fisher", "sum") and not are_squares(values):
            wrong = "expected finite values >= 0, got others"
        elif kind == "scales" and f"fisher.{name}" not in tensors:
            wrong = "expected the codes of these u8log ranges, got none"
        if wrong:
            raise ValueError(f"fasttax: {where}: {key}: {wrong}; estimate it anew")


def _wrong_ranges(codes: Tensor, scales: Tensor | None) -> str:
    """What is wrong with u8log's (lo, step) of each block, "" for nothing."""
    if scales is None:
        return f"expected the u8log ranges scales.* beside {codes.dtype}, got none"
    expected = (_blocks(codes.numel()), 2)
    if scales.dtype != torch.float32 or scales.shape != expected:
        return f"expected u8log ranges in float32 of shape {expected}, got others"
    lo, step = scales.double().unbind(-1)
    if bool(((step >= 0) & (lo + 254 * step < 129) & (lo > -151)).all()):
        return ""
    return "expected u8log ranges within float32's, got others"


def fisher_specs(name: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, Spec]:
    """What `Stored.tensors` will be for values of `dtype`; uint8 is u8log's."""
    specs: dict[str, Spec] = {f"fisher.{name}": (dtype, tuple(shape))}
    if dtype == torch.uint8:
        specs[f"scales.{name}"] = (torch.float32, (_blocks(shape.numel()), 2))
    return specs


def encode_anchor(anchor: Tensor, dtype: torch.dtype | str) -> Tensor:
    """An anchor in `dtype`, or split: bfloat16 hi and int8 lo, anchor = hi + lo ulp(hi) / 254.

    Split it takes 3 bytes a value, at a relative error below 1.6e-5.
    """
    if isinstance(dtype, torch.dtype):
        return ordinary(anchor.detach().to(dtype).contiguous())
    values = _in_blocks(anchor)
    hi = values.to(torch.bfloat16)
    power = (hi.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power * reference.SPLIT_STEP
    steps = torch.where(step > 0, (values - hi.float()) / step.clamp_min(1e-45), 0.0)
    lo = steps.round().clamp(-127, 127).to(torch.int8)
    return ordinary(torch.cat((hi.view(torch.uint8), lo.view(torch.uint8)), 1).flatten())


def decode_anchor(anchor: Tensor, shape: torch.Size) -> Tensor:
    """The anchor as floats: those of a split one, any other as it is."""
    if anchor.dtype != torch.uint8:
        return anchor
    return reference.decode_split(anchor, shape.numel()).view(shape)


def anchor_spec(shape: torch.Size, dtype: torch.dtype | str) -> Spec:
    """Dtype and shape of what `encode_anchor` gives."""
    if isinstance(dtype, torch.dtype):
        return dtype, tuple(shape)
    return torch.uint8, (3 * BLOCK * _blocks(shape.numel()),)


def _blocks(count: int) -> int:
    return (count + BLOCK - 1) // BLOCK


def _in_blocks(values: Tensor) -> Tensor:
    """(blocks, 256) in float32, filled up with zeros."""
    flat = values.detach().float().flatten()
    out = flat.new_zeros(_blocks(flat.numel()) * BLOCK)
    out[: flat.numel()] = flat
    return out.view(-1, BLOCK)
