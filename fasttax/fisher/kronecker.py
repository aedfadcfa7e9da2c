"""KroneckerEstimate: Kronecker factors for linear layers, and a diagonal for the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, dtensor, files
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.factor import diagonal, problem_of, rows_of
from fasttax.fisher.hub import OnHub

KIND = "KroneckerEstimate"


class KroneckerEstimate(OnHub, Mapping[str, Tensor]):
    """A Fisher whose blocks of linear layers' weights are Kronecker products.

        F_W = A (x) G,   <D, F_W D> = sum (G D A) * D   for a change D (out, in) of W

    A = E[a a^T] over the tokens that a loss reaches, those whose gradient there is more than the
    rounding of the largest, a (in,) what the layer met; G = the sum over an example's tokens of
    g g^T, g (out,) the gradients at its output, averaged over the examples (unit="token": over the
    tokens). It takes a token's a and g, and different tokens, for independent (Martens and Grosse
    2015, arXiv:1503.05671; convolutions and tokens: Grosse and Martens 2016, arXiv:1602.01407).
    Biases, norms, embeddings, what has no such layer and weights that a layer uses as (out, in) and
    another as (in, out) keep their diagonal, exact per example.

    As a mapping it is the diagonal of it all, by parameter name.

    Attributes:
        factors: a weight's name -> (A, G): (n, n), (k, n/k, n/k) of k blocks, or (n,) diagonals.
        diagonal: of all others, a FisherEstimate.
        metadata: where it comes from, as FisherEstimate's; `shapes` of the weights with factors,
            and `turned`, those that lie as (in, out).

    Example:
        >>> estimate = fasttax.estimate_fisher(model, loader, structure="kron")
        >>> A, G = estimate.factors["model.layers.0.mlp.up_proj.weight"]  # of a weight (44, 32)
        >>> A.shape, G.shape
        (torch.Size([32, 32]), torch.Size([44, 44]))
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        diagonal: FisherEstimate | Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(diagonal, FisherEstimate):
            diagonal = FisherEstimate(diagonal)
        self.factors = {name: (a.detach(), g.detach()) for name, (a, g) in factors.items()}
        self.diagonal = diagonal
        self.metadata: dict[str, Any] = dict(metadata or {})
        given = self.metadata.setdefault("shapes", {})
        self.metadata.setdefault("turned", [])
        for name, (a, g) in self.factors.items():
            for argument, t in (("A", a), ("G", g)):
                checks.tensor(KIND, f"factors[{name!r}].{argument}", t)
                problem = problem_of(t)
                if problem:
                    expected = "a symmetric matrix, its blocks or diagonal, of finite values"
                    way_out = "estimate it again in float32 and on finite losses"
                    where = f"factors[{name!r}].{argument}"
                    raise checks.fail(KIND, where, expected, problem, way_out)
            own = [rows_of(g), rows_of(a)]
            if name in self.metadata["turned"]:
                own.reverse()
            shape = given.setdefault(name, own)
            if shape[0] != own[0] or torch.Size(shape[1:]).numel() != own[1]:
                raise checks.fail(KIND, f"factors[{name!r}]", f"those of a weight {shape}", own)
        twice = sorted(set(self.factors) & set(self.diagonal))
        if twice:
            raise checks.fail(KIND, "diagonal", "parameters without factors", twice[0])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.factors:
            return self.diagonal[name]
        left, right = self.sides(name)
        return diagonal(left).outer(diagonal(right)).reshape(self.shape(name))

    def __iter__(self) -> Iterator[str]:
        yield from self.factors
        yield from self.diagonal

    def __len__(self) -> int:
        return len(self.factors) + len(self.diagonal)

    def __repr__(self) -> str:
        numbers = sum(t.numel() for pair in self.factors.values() for t in pair)
        known = [k for k in ("labels", "unit", "examples", "normalize") if k in self.metadata]
        return (
            f"KroneckerEstimate({len(self.factors)} weights of {numbers:,} values, "
            f"{len(self.diagonal)} diagonals"
            + "".join(f", {k}={self.metadata[k]}" for k in known)
            + ")"
        )

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """(left, right): the factors of the weight's rows and of its columns."""
        a, g = self.factors[name]
        return (a, g) if name in self.metadata["turned"] else (g, a)

    def shape(self, name: str) -> torch.Size:
        """A parameter's."""
        if name in self.factors:
            return torch.Size(self.metadata["shapes"][name])
        return self.diagonal.stored(name).values.shape

    def to_diagonal(self) -> FisherEstimate:
        """The diagonal alone: what is left when weights count one by one."""
        facts = {k: v for k, v in self.metadata.items() if k not in ("shapes", "turned", "max_dim")}
        values = {name: self[name] for name in self}
        return FisherEstimate(values, {**facts, "storage": "fp32", "structure": "diagonal"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the metadata in its header; a crash leaves the old file.

        Of an estimate under FSDP2 the diagonals are gathered, so that every rank must call it.
        """
        tensors: dict[str, Tensor] = {}
        for name, (a, g) in self.factors.items():
            tensors |= {f"A.{name}": a, f"G.{name}": g}
        for name in self.diagonal:
            stored = self.diagonal.stored(name).tensors(name)
            tensors |= {k: dtensor.whole(t) for k, t in stored.items()}
        files.write(path, KIND, tensors, self.metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> KroneckerEstimate:
        """A file that `save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is damaged or no Kronecker estimate; names the file and the tensor.
        """
        tensors, metadata = files.read(path, KIND)
        names = [n.removeprefix("A.") for n in tensors if n.startswith("A.")]
        others = [n.removeprefix("G.") for n in tensors if n.startswith("G.")]
        lone = sorted({*names} ^ {*others})
        if lone:
            lacking = "G" if lone[0] in names else "A"
            raise ValueError(
                f"{KIND}.load: {os.fspath(path)}: no {lacking}.{lone[0]}; write it anew"
            )
        factors = {n: (tensors[f"A.{n}"], tensors[f"G.{n}"]) for n in names}
        try:
            return KroneckerEstimate(
                factors, FisherEstimate.of_tensors(tensors, metadata), metadata
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{KIND}.load: {os.fspath(path)}: {error}") from None


def load_estimate(path: str | os.PathLike[str]) -> FisherEstimate | KroneckerEstimate:
    """What a path holds of the two.

    Raises:
        FileNotFoundError, ValueError: as their own load.
    """
    if files.kind_of(path) == KIND:
        return KroneckerEstimate.load(path)
    return FisherEstimate.load(path)
