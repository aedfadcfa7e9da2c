"""What the tests of token_kl share: the float64 oracle written out, and a run of every backend
judged by it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fasttax
from fasttax import reference
from fasttax.kl.call import tempering
from tests.tools.utils import assert_within, own_result

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


def _without_gaps(logp: Tensor, where: Tensor) -> Tensor:
    """Log-probs with 0 where the other factor of a product is 0."""
    return logp.masked_fill(where == -INF, 0.0)


def policy_ref(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    return (lp.exp() * (_without_gaps(lp, lp) - _without_gaps(lq, lp))).sum(-1)


def ref_policy(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    return policy_ref(lq, lp, beta)


def jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return (lp.exp() + lq.exp()).sum(-1) * 0
    both = (lp == -INF) & (lq == -INF)
    lm = torch.logaddexp(
        lp.masked_fill(both, 0.0) + math.log1p(-beta), lq.masked_fill(both, 0.0) + math.log(beta)
    )
    q_to_m = lq.exp() * (_without_gaps(lq, lq) - _without_gaps(lm, lq))
    p_to_m = lp.exp() * (_without_gaps(lp, lp) - _without_gaps(lm, lp))
    return (beta * q_to_m + (1 - beta) * p_to_m).sum(-1)


def renyi(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    terms = beta * _without_gaps(lp, lp) + (1 - beta) * _without_gaps(lq, lp)
    return terms.masked_fill(lp == -INF, -INF).logsumexp(-1) / (beta - 1)


# the textbook sum of every kind, of both log-probs and beta
ORACLES = {"policy_ref": policy_ref, "ref_policy": ref_policy, "jsd": jsd, "renyi": renyi}
KINDS = tuple(ORACLES)


def oracle(
    x: Tensor, y: Tensor, *, kind: str = "policy_ref", beta: float = 0.5, **scaled: Any
) -> Tensor:
    """The textbook sums over log_softmax, in the dtype of x: float64 is the truth, float32
    PyTorch's own composition. `scaled`: as `log_probs` takes them.
    """
    return ORACLES[kind](*log_probs(x, y, **scaled), beta)


def log_probs(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    inf: str = "propagate",
) -> tuple[Tensor, Tensor]:
    """Both rows' log-softmax, of what an op's options make of the logits."""
    gone = (x == -INF) | (y == -INF)
    x, y = x * logit_scale, y * ref_logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    y = y if ref_softcap is None else ref_softcap * torch.tanh(y / ref_softcap)
    x, y = x / temperature, y / (temperature if ref_temperature is None else ref_temperature)
    if inf == "mask":
        x, y = x.masked_fill(gone, -INF), y.masked_fill(gone, -INF)
    return x.log_softmax(-1), y.log_softmax(-1)


Result = tuple[Tensor, Tensor, Tensor]


def run_oracle(
    x: Tensor, y: Tensor, upstream: Tensor, dtype: torch.dtype, **options: Any
) -> Result:
    a, b = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()
    kl = oracle(a, b, **options)
    d_a, d_b = torch.autograd.grad(kl, (a, b), upstream.to(dtype))
    return kl.detach(), d_a, d_b


def device_of(backend: str | int) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def functions(backend: str | int) -> Any:
    """Where the backend's token_kl, token_kl_backward, token_stats, token_stats_backward are."""
    if backend == "reference":
        return reference
    if device_of(backend) == "cpu" or backend == "cuda":
        return torch.ops.fasttax
    from fasttax.triton import kl_launch, stats  # on a GPU whose op is CUDA C++'s

    return SimpleNamespace(
        **{
            name: getattr(module, name)
            for module in (kl_launch, stats)
            for name in vars(module)
            if name.startswith("token_")
        }
    )


def run(
    backend: str | int,
    x: Tensor,
    y: Tensor,
    upstream: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Result:
    """Value and both gradients, by the backend's functions or the public op; on the CPU."""
    device = device_of(backend)
    x, y = x.detach().to(device), y.detach().to(device)
    upstream = torch.ones(x.shape[:-1]) if upstream is None else upstream
    upstream = upstream.to(device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    mask = None if mask is None else mask.to(device)
    ops = functions(backend)
    if ops is not torch.ops.fasttax:
        args = tempering("test", **options).args()
        kl, stats = ops.token_kl(x, y, mask, *args)
        out = (kl, *ops.token_kl_backward(upstream, x, y, mask, stats, *args, True, True))
    else:
        x, y = x.requires_grad_(), y.requires_grad_()
        kl = fasttax.token_kl(x, y, mask=mask, **options)
        out = (kl.detach(), *torch.autograd.grad(kl, (x, y), upstream))
    return out[0].cpu(), out[1].cpu(), out[2].cpu()


def check(backend: str | int, x: Tensor, y: Tensor, **options: Any) -> None:
    """Value and gradients within twice PyTorch's own error; `x`, `y` are rows of one sort, so that
    one scale fits them.
    """
    upstream = torch.linspace(-1.5, 2.0, x.shape[0])
    out = run(backend, x, y, upstream, **options)
    truth = run_oracle(x, y, upstream, torch.float64, **options)
    own = run_oracle(x, y, upstream, torch.float32, **options)
    assert [o.dtype for o in out] == [
        torch.float64 if x.dtype == torch.float64 else torch.float32,
        x.dtype,
        y.dtype,
    ]
    for o, w, t, name in zip(out, own, truth, ("value", "d_logits", "d_ref_logits"), strict=True):
        # logits of magnitude M carry a rounding of eps * M into the exponent from each step:
        # centring and scaling, on each of two rows
        size = max(1.0, float(x.float().abs().max()), float(y.float().abs().max()))
        magnitude = (
            size * options.get("logit_scale", 1.0) / min(1.0, options.get("temperature", 1.0))
        )
        assert_within(
            o, own_result(w, t, o.dtype), t, ulps=max(4.0, 4 * min(magnitude, 64.0)), name=name
        )
