"""FisherEstimate: a diagonal Fisher with its provenance, in one of three storages.

float32, bfloat16, or 8-bit logarithms.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, dtensor, file_parts, files
from fasttax._base.packed import STORAGES, Stored, are_squares, encode
from fasttax.fisher.hub import OnHub


class FisherEstimate(OnHub, Mapping[str, Tensor]):
    """A diagonal Fisher by parameter name.

    Items are float tensors (u8log storage is decoded on access).

    Attributes:
        metadata: where it comes from: estimator, labels, unit, examples, tokens, normalize,
            storage, model_hash, versions.

    Example:
        >>> fisher.to("bf16").save("fisher.safetensors")
        >>> loaded = fasttax.FisherEstimate.load("fisher.safetensors")
        >>> loaded.metadata["examples"], loaded["model.norm.weight"].shape
        (4, torch.Size([32]))
    """

    _sharded = True

    def __init__(
        self, values: Mapping[str, Tensor | Stored], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self._stored: dict[str, Stored] = {}
        for name, value in values.items():
            if not isinstance(value, Stored):
                checks.tensor("FisherEstimate", f"values[{name!r}]", value)
                value = Stored(value.detach())
            self._stored[name] = value
        self.metadata: dict[str, Any] = dict(metadata or {})

    def __getitem__(self, name: str) -> Tensor:
        return self.stored(name).decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __repr__(self) -> str:
        numel = sum(s.values.numel() for s in self._stored.values())
        facts = [
            f"{k}={v}"
            for k, v in self.metadata.items()
            if k in ("estimator", "labels", "unit", "examples", "normalize", "storage")
        ]
        return f"FisherEstimate({', '.join([f'{len(self)} tensors', f'{numel:,} values', *facts])})"

    def stored(self, name: str) -> Stored:
        """The tensor of a parameter as it is stored.

        Raises:
            KeyError: there is none; names the nearest.
        """
        if name not in self._stored:
            problem = f"FisherEstimate: no parameter {name!r} among {len(self)}"
            close = difflib.get_close_matches(name, self._stored, 3)
            if close:
                problem += f"; nearest names: {', '.join(close)}"
            raise KeyError(problem)
        return self._stored[name]

    def to(self, storage: str) -> FisherEstimate:
        """The same estimate in "fp32", "bf16" or "u8log" storage."""
        checks.choice("FisherEstimate.to", "storage", storage, STORAGES)
        if storage == "u8log" and any(dtensor.is_sharded(s.values) for s in self._stored.values()):
            raise checks.fail(
                "FisherEstimate.to",
                "storage",
                "'fp32' or 'bf16' for DTensors, whose shards cut u8log's blocks",
                "'u8log'",
                "gather with .save(path) and load it first",
            )
        if storage == "u8log":
            self._refuse_no_squares("FisherEstimate.to")
        return FisherEstimate(
            {name: encode(self[name], storage) for name in self},
            {**self.metadata, "storage": storage},
        )

    def _refuse_no_squares(self, op: str) -> None:
        """Values that u8log has no codes for, by name."""
        wrong = [name for name in self if not are_squares(self[name])]
        if wrong:
            raise checks.fail(
                op,
                "storage",
                "finite values >= 0 in float32's range for 'u8log'",
                f"others in {', '.join(wrong[:5])}",
                "estimate anew, on a model whose loss and gradients are finite",
            )

    def __add__(self, other: FisherEstimate) -> FisherEstimate:
        """Sums two estimates (of normalize="sum" ones: the estimate over both data sets)."""
        if not isinstance(other, FisherEstimate):
            return NotImplemented
        differences = [f"{name}: only in one of them" for name in sorted(set(self) ^ set(other))]
        for n in sorted(set(self) & set(other)):
            mine, theirs = tuple(self[n].shape), tuple(other[n].shape)
            if mine != theirs:
                differences.append(f"{n}: shape {mine} and {theirs}")
        if differences:
            raise ValueError(
                "FisherEstimate.__add__: the estimates do not fit:\n  "
                + "\n  ".join(differences[:20])
            )
        counts: dict[str, Any] = {
            k: self.metadata[k] + other.metadata[k]
            for k in ("examples", "tokens")
            if k in self.metadata and k in other.metadata
        }
        # of one of them alone
        facts = {k: v for k, v in self.metadata.items() if k != "relative_error"}
        return FisherEstimate(
            {n: self[n].float() + other[n].float() for n in self},
            {**facts, **counts, "storage": "fp32"},
        )

    def __mul__(self, factor: float) -> FisherEstimate:
        """Every value times `factor` >= 0."""
        factor = checks.number("FisherEstimate.__mul__", "factor", factor, low=0)
        scale = self.metadata.get("scaled_by", 1.0) * factor
        return FisherEstimate(
            {n: self[n].float() * factor for n in self},
            {**self.metadata, "scaled_by": scale, "storage": "fp32"},
        )

    __rmul__ = __mul__

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        sharded: bool = False,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Writes a safetensors file with the metadata in its header; a crash leaves the old file.

        Of DTensors (FSDP2) the whole is gathered, so that every rank must call it.

        Args:
            path: the file, or a folder.
            sharded: `path` is a folder of files and an index, gathered one tensor at a time and
                written by rank 0.
            max_shard_bytes: about what a file of the folder holds.
        """
        groups = {n: s.tensors(n) for n, s in self._stored.items()}
        if sharded:
            file_parts.write(path, "FisherEstimate", groups, self.metadata, max_shard_bytes)
            return
        every = {k: dtensor.whole(t) for group in groups.values() for k, t in group.items()}
        files.write(path, "FisherEstimate", every, self.metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> FisherEstimate:
        """A file, or a folder that save(sharded=True) wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is damaged, no Fisher, or has values that are not finite and >= 0; names
                the file and the tensor.
        """
        with file_parts.Parts(path, "FisherEstimate") as parts:
            tensors, metadata = parts.every(), parts.metadata
        return FisherEstimate.of_tensors(tensors, metadata)

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> FisherEstimate:
        """Of what a file has: those called fisher.NAME, and scales.NAME of u8log."""
        names = [n.removeprefix("fisher.") for n in tensors if n.startswith("fisher.")]
        return FisherEstimate(
            {n: Stored(tensors[f"fisher.{n}"], tensors.get(f"scales.{n}")) for n in names}, metadata
        )

    @staticmethod
    def from_adam(
        optimizer: torch.optim.Optimizer, model: torch.nn.Module, *, batch_size: int = 1
    ) -> FisherEstimate:
        """Adam's bias-corrected second moment times `batch_size`, labelled as that.

        A stand-in for the empirical Fisher that is free, and no estimate of the Fisher at one
        point: it averages squared batch gradients along the training path, so it is biased by the
        squared mean gradient (Li, Dangel, Tam, Raffel 2025, arXiv:2507.18807).

        Args:
            optimizer: an Adam that has taken a step on `model`.
            model: names the parameters.
            batch_size: examples that a step averaged over.

        Raises:
            ValueError: the optimizer has no second moments of the model's parameters, or
                `batch_size` is no count.
        """
        batch_size = checks.count("FisherEstimate.from_adam", "batch_size", batch_size)
        names = {id(p): n for n, p in model.named_parameters()}
        values: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            beta2 = group.get("betas", (0.0, 0.0))[1]
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if "exp_avg_sq" in state and id(p) in names:
                    scale = batch_size / (1 - beta2 ** float(state["step"]))
                    values[names[id(p)]] = state["exp_avg_sq"].float() * scale
        if not values:
            raise ValueError(
                "FisherEstimate.from_adam: optimizer: expected an Adam that has taken a step on "
                "this model's parameters, got no second moments"
            )
        metadata = {
            "estimator": "adam_second_moment",
            "batch_size": batch_size,
            "normalize": "mean",
            "storage": "fp32",
        }
        return FisherEstimate(values, metadata)
