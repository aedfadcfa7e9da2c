"""Options of what is measured and fitted: which tokens count, one run's points, how sure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fasttax
from fasttax.tax import TaxReport
from tests.tools.models import causal_lm


def test_kl_both_ways_of_answers_leaves_prompts_out() -> None:
    base: Any = causal_lm("llama")
    model: Any = causal_lm("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ids = torch.randint(3, 20, (2, 7))
    labels = ids.clone()
    labels[0, :4], labels[1, :2] = -100, -100
    batch = {"input_ids": ids, "labels": labels}
    found = fasttax.tax.kl_both_ways(model, base, [batch], answers=True)
    with torch.no_grad():
        p, q = (m.eval()(input_ids=ids).logits.double().log_softmax(-1) for m in (model, base))
    counts = labels[:, 1:] != -100
    wanted = [
        float((a.exp() * (a - b)).sum(-1)[:, :-1][counts].mean()) for a, b in ((p, q), (q, p))
    ]
    assert [found.policy_ref, found.ref_policy] == pytest.approx(wanted, rel=1e-4)
    assert found.tokens == int(counts.sum())
    assert fasttax.tax.kl_both_ways(model, base, [batch]).tokens == 12


def report() -> TaxReport:
    """Two runs whose taxes are 0.1 KL^2 and 0.3 KL^2, but for a wobble."""
    made = TaxReport(1.0, 0.0)
    for run, factor in (("low", 0.1), ("high", 0.3)):
        for k in range(1, 7):
            tax = factor * k * k * (1 + 0.02 * (-1) ** k)
            kls = {"ref_policy": float(k), "policy_ref": 2.0 * k}
            made.add(str(k), 1 - tax, 0.1 * k, run=run, step=k, kl=float(k), task_kl=kls)
    return made


def test_a_law_of_one_run_and_of_the_other_kl() -> None:
    r = report()
    for run, b in (("low", 0.1), ("high", 0.3)):
        assert r.tax_vs_task_kl(run=run).b == pytest.approx(b, rel=0.1)
        assert r.tax_vs_task_kl("policy_ref", run).b == pytest.approx(b / 4, rel=0.1)


def test_less_confidence_is_a_narrower_interval() -> None:
    r = report()
    for law in (r.tax_vs_kl, r.forgetting, r.tax_vs_task_kl):
        sure, half = (law(run="low", confidence=c).b_interval for c in (0.95, 0.5))
        assert sure[0] < half[0] < half[1] < sure[1]
    seeds = TaxReport(1.0, 0.0)
    for seed in range(3):
        seeds.add("a", 0.9 - 0.01 * seed, 0.2, run="kl", seed=seed)
    (_, low, high, _), (_, inner_low, inner_high, _) = (
        seeds.tax_at(0.1, confidence=c)["kl"] for c in (0.95, 0.5)
    )
    assert low < inner_low < inner_high < high
