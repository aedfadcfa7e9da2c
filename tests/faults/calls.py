"""Every public op called once, on inputs that a seed gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fasttax
from fasttax import EWC, AdamWEWC, DiagonalFisher, FisherEstimate, functional
from tests.faults.written import Model

N, V, H, O = 24, 300, 20, 17


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _leaf(*shape: int, by: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=by).requires_grad_()


def token_kl(seed: int) -> list[Tensor]:
    g = _draw(seed)
    x, y = _leaf(N, V, by=g), torch.randn(N, V, generator=g)
    kl = fasttax.token_kl(x, y)
    return [kl.detach(), *torch.autograd.grad(kl.sum(), x)]


def token_stats(seed: int) -> list[Tensor]:
    g = _draw(seed)
    x, y = _leaf(N, V, by=g), torch.randn(N, V, generator=g)
    ids = torch.randint(V, (N,), generator=g)
    out = fasttax.token_stats(x, y, ids, outputs=("logp", "kl", "entropy"))
    total = out.logp.sum() + out.kl.sum() + out.entropy.sum()
    return [out.logp.detach(), out.entropy.detach(), *torch.autograd.grad(total, x)]


def linear_token_kl(seed: int) -> list[Tensor]:
    g = _draw(seed)
    h, w = _leaf(N, H, by=g), _leaf(V, H, by=g)
    kl = fasttax.linear_token_kl(h, w, h.detach() + 0.1, w.detach(), token_chunk=8)
    return [kl.detach(), *torch.autograd.grad(kl.sum(), (h, w))]


def linear_token_logprobs(seed: int) -> list[Tensor]:
    g = _draw(seed)
    h, w = _leaf(N, H, by=g), _leaf(V, H, by=g)
    out = fasttax.linear_token_logprobs(h, w, torch.randint(V, (N,), generator=g)).logp
    return [out.detach(), *torch.autograd.grad(out.sum(), (h, w))]


def topk_kl(seed: int) -> list[Tensor]:
    g = _draw(seed)
    x = _leaf(N, V, by=g)
    logp, ids = fasttax.topk_logprobs(torch.randn(N, V, generator=g), 9)
    kl = fasttax.topk_kl(x, logp, ids)
    return [kl.detach(), logp, *torch.autograd.grad(kl.sum(), x)]


def kl_estimate(seed: int) -> list[Tensor]:
    g = _draw(seed)
    x = _leaf(N, by=g)
    k3 = fasttax.kl_estimate(x, torch.randn(N, generator=g))
    return [k3.detach(), *torch.autograd.grad(k3.sum(), x)]


def squares(seed: int) -> list[Tensor]:
    g = _draw(seed)
    x, d = torch.randn(3, 8, H, generator=g), torch.randn(3, 8, O, generator=g)
    ids = torch.randint(V, (3, 8), generator=g)
    sums = [torch.zeros(O, H)]
    functional.accumulate_sqgrad_(sums, [torch.randn(O, H, generator=g)], 0.5)
    return [
        functional.linear_sqgrad(x, d),
        functional.embedding_sqgrad(ids, d, V),
        functional.norm_sqgrad(d, d),
        functional.bias_sqgrad(d),
        functional.lm_head_fisher(x[0], torch.randn(V, H, generator=g)),
        *sums,
    ]


def quadratics(seed: int) -> list[Tensor]:
    g = _draw(seed)
    theta, anchor = torch.randn(V, H, generator=g), torch.randn(V, H, generator=g)
    fisher, grad = torch.rand(V, H, generator=g), torch.zeros(V, H)
    penalty = functional.ewc_penalty([theta], [anchor], [fisher], 2.0)
    added = functional.ewc_add_grad_([theta], [grad], [anchor], [fisher], 2.0)
    moved = theta.clone()
    functional.ewc_prox_([moved], [anchor], [fisher], 0.3)
    b, a = torch.randn(V, 3, generator=g), torch.randn(3, H, generator=g)
    return [
        penalty,
        added,
        grad,
        moved,
        functional.lora_ewc_penalty(a, b, fisher, 0.5, 2.0),
    ]


def models(seed: int) -> list[Tensor]:
    g = _draw(seed)
    model, ids = Model(), torch.randint(7, (2, 5), generator=g)
    estimator = DiagonalFisher(model, labels="true")
    estimator.update(ids)
    estimate = estimator.finalize()
    ewc = EWC(model, FisherEstimate(dict(estimate)), strength=3.0)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    ewc.prox_(0.1)
    return [*estimate.values(), ewc.penalty().detach(), *(p.detach() for p in model.parameters())]


CALLS: dict[str, Callable[[int], list[Tensor]]] = {
    call.__name__: call
    for call in (
        token_kl,
        token_stats,
        linear_token_kl,
        linear_token_logprobs,
        topk_kl,
        kl_estimate,
        squares,
        quadratics,
        models,
    )
}


def all_of_them(seed: int) -> list[Tensor]:
    """What every call gives, one after the other."""
    return [t for call in CALLS.values() for t in call(seed)]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of results are equal."""
    return len(one) == len(other) and all(map(torch.equal, one, other))
