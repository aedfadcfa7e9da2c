"""One small file of every kind that fasttax writes, and how each is read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, DiagonalFisher, FisherEstimate, KroneckerEstimate
from fasttax.integrations.reference import TopKReference
from fasttax.tax import TaxReport


class Model(nn.Module):
    """Two weights and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        g = torch.Generator().manual_seed(0)  # of its own: threads share torch's
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids))
        return out


@dataclass(frozen=True)
class Kind:
    """How a file comes to be, and how it is read."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _ids() -> Tensor:
    return torch.arange(10).view(2, 5) % 7


def _fisher() -> FisherEstimate:
    g = torch.Generator().manual_seed(0)
    values = {n: torch.rand(p.shape, generator=g) for n, p in Model().named_parameters()}
    return FisherEstimate(values, {"examples": 3})


def _kronecker() -> KroneckerEstimate:
    found = fasttax.estimate_fisher(Model(), [_ids()], structure="kron", progress=False)
    assert isinstance(found, KroneckerEstimate)
    return found


def _ewc(fisher: Any, **options: Any) -> EWC:
    return EWC(Model(), fisher, strength=2.0, **options)


def _checkpoint(path: Path) -> None:
    estimator = DiagonalFisher(Model())
    estimator.update(_ids())
    estimator.checkpoint(path)


def _resumed(path: Path) -> DiagonalFisher:
    estimator = DiagonalFisher(Model())
    estimator.resume(path)
    return estimator


def _cache() -> TopKReference:
    logp = torch.log_softmax(torch.randn(5, 8), -1).topk(3)
    offsets = torch.tensor([0, 2, 5])
    about = {"vocabulary": 8}
    return TopKReference(torch.arange(5), offsets, logp.values, logp.indices.int(), about)


def report() -> TaxReport:
    """A report of a base and two checkpoints."""
    made = TaxReport({"mmlu": 0.62, "gsm8k": 0.38}, 0.31, n=200)
    made.add("dpo-100", {"mmlu": 0.61, "gsm8k": 0.35}, 0.42, kl=0.25, run="dpo", step=100)
    made.add("dpo-200", {"mmlu": 0.60, "gsm8k": 0.33}, 0.52, kl=0.8, run="dpo", step=200)
    return made


def _merged(path: Path) -> Any:
    values = {n: p.detach() for n, p in Model().named_parameters()}
    return fasttax.merge.linear(values, values, 0.5, output=path)


def _read_merged(path: Path) -> Any:
    values = {n: p.detach() for n, p in Model().named_parameters()}
    return dict(fasttax.merge.linear(path, values, 0.0))


KINDS: dict[str, Kind] = {
    "fisher": Kind(lambda p: _fisher().save(p), FisherEstimate.load),
    "fisher-u8log": Kind(lambda p: _fisher().to("u8log").save(p), FisherEstimate.load),
    "kronecker": Kind(lambda p: _kronecker().save(p), KroneckerEstimate.load),
    "checkpoint": Kind(_checkpoint, _resumed),
    "ewc": Kind(lambda p: _ewc(_fisher()).save(p), lambda p: EWC.load(p, Model())),
    "ewc-u8log": Kind(
        lambda p: _ewc(_fisher(), storage="u8log", anchor_dtype="bf16+8").save(p),
        lambda p: EWC.load(p, Model()),
    ),
    "ewc-kronecker": Kind(lambda p: _ewc(_kronecker()).save(p), lambda p: EWC.load(p, Model())),
    "cache": Kind(lambda p: _cache().save(p), TopKReference.load),
    "merged": Kind(_merged, _read_merged),
    "report": Kind(lambda p: report().save(p), TaxReport.load),
}
