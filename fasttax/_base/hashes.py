"""Short hashes of a model's weights and of batches: whether two estimates are of the same."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax._base import dtensor, inner

SAMPLES = 256  # of each tensor, evenly spaced
BATCH_SAMPLES = 4096  # of each tensor of a batch: all of 8 rows of 512 ids; 30 us a tensor
HALF = 8  # hex digits of the hash in float16
FINGERPRINT = "crc1"  # which a change of how it is made changes
PART = 1 << 24  # entries that come from a GPU at a time


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and up to 256 values a tensor, evenly spaced: in bfloat16, "-", fp16.

    A float32 checkpoint has the first part in common with its load in bfloat16, and the second with
    its load in float16 (which rounds otherwise: of values in both, 1 in 16 differs as bfloat16).
    `same_weights` compares. 1 ms per hundred tensors whatever their size. It tells models apart,
    not edits: a change of a few rows may lie between the samples.
    """
    wide, half = hashlib.sha256(), hashlib.sha256()
    for name, t in sorted(tensors, key=lambda item: item[0]):
        values = _sample(t)
        for digest, dtype in ((wide, torch.bfloat16), (half, torch.float16)):
            digest.update(f"{name} {tuple(t.shape)}".encode())
            digest.update(values.to(dtype).view(torch.int16).numpy().tobytes())
    return f"{wide.hexdigest()[:16]}-{half.hexdigest()[:HALF]}"


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, dtypes, shapes and every byte, behind the version of how it is made.

    `weights_hash` is of samples, which an edited row of an embedding may lie between. 0.24 s a GB
    on one core, by the CRC-32 of each tensor.
    """
    digest = hashlib.sha256()
    for name, t in sorted(tensors, key=lambda item: item[0]):
        flat = dtensor.whole(t.detach()).reshape(-1)
        found = 0
        for part in flat.split(PART) if flat.numel() else ():
            found = zlib.crc32(part.cpu().contiguous().view(torch.uint8).numpy().data, found)
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} {found:08x} ".encode())
    return f"{FINGERPRINT}-{digest.hexdigest()[:16]}"


def same_weights(one: str | None, other: str | None) -> bool:
    """Whether two hashes are of the same weights, whatever of the three dtypes they lay in.

    One of 16 digits alone, as files of fasttax 0.1 have, is compared in bfloat16.
    """
    if one is None or other is None:
        return one == other
    wide, _, half = one.partition("-")
    other_wide, _, other_half = other.partition("-")
    return wide == other_wide or (half != "" and half == other_half)


def chained(hashed: str, batch: Any) -> str:
    """The hash of a sequence of batches, by that of those before this one ("" for none).

    Of a batch its tensors by their names, with dtype, shape and up to 4096 values each.
    """
    digest = hashlib.sha256(hashed.encode())
    for name, t in _tensors(batch):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(_sample(t, BATCH_SAMPLES).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    if isinstance(batch, Mapping):
        named = [(str(key), value) for key, value in batch.items()]
    elif isinstance(batch, Sequence):
        named = [(str(place), value) for place, value in enumerate(batch)]
    else:
        named = [("", batch)]
    strided = [(n, t) for n, t in named if isinstance(t, Tensor) and t.layout == torch.strided]
    return sorted(strided, key=lambda item: item[0])


def _sample(t: Tensor, count: int = SAMPLES) -> Tensor:
    """The values that are hashed, on the CPU; of a tensor that lies in others, some of each."""
    if inner.lies_in_others(t):
        return torch.cat([_sample(part, count).float() for part in inner.parts(t.detach())])
    flat = dtensor.whole(t.detach()).reshape(-1)
    index = torch.linspace(
        0,
        max(0, flat.numel() - 1),
        min(count, flat.numel()),
        dtype=torch.float64,
        device=flat.device,
    ).long()
    return flat[index].cpu().contiguous()
