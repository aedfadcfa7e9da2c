"""A user's script, which test_pyright.py has strict pyright read: no value of it is Any."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import assert_type

import fasttax
from fasttax import functional as F
from fasttax.integrations import AdaptiveKL
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import EWCCallback, attach
from fasttax.integrations.trl import FullKL, patch
from fasttax.tax import ModelCardSection, TaxReport, kl_both_ways, kl_to_base

Kind = Literal["policy_ref", "ref_policy", "jsd"]


def kls(hidden: Tensor, weight: Tensor, mask: Tensor, kind: Kind) -> Tensor:
    """KLs and log-probs."""
    logits = hidden @ weight.T
    kl = fasttax.linear_token_kl(
        hidden, weight, hidden, weight, kind=kind, mask=mask, reduction="mean", scale=0.3
    )
    assert_type(kl, Tensor)
    token = fasttax.token_kl(logits, logits, kind=kind)
    assert_type(token, Tensor)
    fasttax.token_kl(logits, logits, kind="forward")  # pyright: ignore[reportArgumentType]
    fasttax.token_kl(logits, logits, reduction="avg")  # pyright: ignore[reportArgumentType]
    stats = fasttax.token_stats(logits, logits, outputs=("kl_policy_ref", "entropy"))
    assert_type(stats, fasttax.TokenStats)
    assert_type(stats.entropy, Tensor | None)
    ids = logits.argmax(-1)
    picked = fasttax.linear_token_logprobs(hidden, weight, ids)
    assert_type(picked.logp, Tensor | None)
    logp, top = fasttax.topk_logprobs(logits, 4)
    assert_type(logp, Tensor)
    assert_type(top, Tensor)
    assert_type(fasttax.topk_kl(logits, logp, top), Tensor)
    assert_type(fasttax.kl_estimate(logp[:, 0], logp[:, 0], kind="k3"), Tensor)
    both = fasttax.linear_token_kl(hidden, weight, hidden, weight, return_entropy=bool(len(ids)))
    assert_type(both, Tensor | tuple[Tensor, Tensor])
    return kl


def fishers(model: nn.Module, batches: list[Tensor]) -> fasttax.FisherEstimate:
    """Estimates, files, the Hub."""
    fisher = fasttax.DiagonalFisher(model)
    for batch in batches:
        fisher.update({"input_ids": batch})
    assert_type(fisher.relative_error(), float)
    found = fisher.finalize()
    assert_type(found, fasttax.FisherEstimate)
    assert_type(found["weight"], Tensor)
    found.save("fisher.safetensors")
    assert_type(found.push_to_hub("me/fisher"), str)
    assert_type(fasttax.estimate_fisher(model, batches), fasttax.FisherEstimate)
    kron = fasttax.estimate_fisher(model, batches, structure="kron")
    assert_type(kron, fasttax.KroneckerEstimate)
    assert_type(kron.factors, dict[str, tuple[Tensor, Tensor]])
    return fasttax.FisherEstimate.load("fisher.safetensors")


def train(
    model: nn.Module, fisher: fasttax.FisherEstimate, optimizer: Optimizer, losses: list[Tensor]
) -> None:
    """EWC in a loop of one's own."""
    ewc = fasttax.EWC(model, fisher, strength=10.0)
    with ewc.attach(optimizer, mode="grad", every=2) as attached:
        assert_type(attached.active, bool)
        for loss in losses:
            torch.autograd.backward([loss + ewc.penalty()])
            optimizer.step()
    ewc.add_grad_()
    ewc.prox_(0.1)
    assert_type(ewc.penalty(), Tensor)
    assert_type(ewc.distance().total, Tensor)
    assert_type(ewc.anchor, dict[str, Tensor])
    assert_type(ewc.strength, float)
    stepped = fasttax.AdamWEWC(model.parameters(), ewc=ewc, lr=1e-3)
    stepped.step()
    assert_type(stepped.step(lambda: 0.5), float)
    mask = fasttax.FisherMask(model, fisher, share=0.1)
    mask.attach(optimizer).undo()
    out = torch.zeros(4, 4)
    assert_type(F.linear_sqgrad(out[None], out[None]), Tensor)
    assert_type(F.ewc_penalty([out], [out], [out], 0.5), Tensor)
    F.ewc_add_grad_([out], [out], [out], [out], 0.5)
    ewc.save("ewc.safetensors")
    again = fasttax.EWC.load("ewc.safetensors", model)
    assert_type(again, fasttax.EWC)
    assert_type(again.fisher, fasttax.FisherEstimate | fasttax.KroneckerEstimate)
    assert_type(again.parameters(), dict[str, Tensor])
    again.consolidate(fisher, decay=0.9)


def trainers(trainer: object, ewc: fasttax.EWC, base: nn.Module, rows: list[list[int]]) -> None:
    """In others' trainers."""
    callback = EWCCallback(ewc, where="post_clip")
    assert_type(callback.ewc, fasttax.EWC)
    with attach(trainer, ewc=ewc, kl={"ref_model": base, "beta": 0.1}) as handle:
        assert_type(handle.active, bool)
    with FullKL(trainer, base, beta=AdaptiveKL(target=0.05)) as full_kl:
        assert_type(full_kl.beta, float)
    with patch() as patched:
        assert_type(patched.skipped, dict[str, str])
    cache = TopKReference.make(base, rows, k=8)
    logp, ids = cache.lookup(torch.tensor(rows[0]))
    assert_type(logp, Tensor)
    assert_type(ids, Tensor)


def measure(model: nn.Module, base: nn.Module, batches: list[Tensor], ewc: fasttax.EWC) -> None:
    """The tax."""
    both = kl_both_ways(model, base, batches)
    assert_type(both.policy_ref, float)
    assert_type(kl_to_base(model, base, batches, kind="ref_policy"), float)
    report = TaxReport({"mmlu": 0.62}, 0.31)
    report.add("dpo", {"mmlu": 0.6}, 0.5, kl=both.policy_ref, run="dpo", task_kl=both.as_dict())
    tax, low, high, seeds = report.tax_at(0.1)["dpo"]
    assert_type(tax, float)
    assert_type(low, float)
    assert_type(high, float)
    assert_type(seeds, int)
    print(report.fits(), str(ModelCardSection(ewc=ewc, report=report)))
    for checkpoint in report.checkpoints:
        assert_type(report.tax(checkpoint), float)
        assert_type(checkpoint.kl, float | None)
    assert_type(TaxReport.load("report.json"), TaxReport)
    assert_type(report.html("tax.html"), Path)
    assert_type(fasttax.merge.linear("base", "aligned", 0.5, output="merged"), Path)
    print(fasttax.tax, fasttax.integrations.AdaptiveKL(0.1))
