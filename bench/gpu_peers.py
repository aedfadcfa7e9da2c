"""What a GPU's user has beside fasttax: Liger, TRL's kernels, torch's AdamW; or why not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import baselines
from fasttax.cli.bench import step

LIGER, TRL = "Liger", "TRL"


def missing(module: str, package: str) -> str:
    """Why a peer's module is not to be had, or ""."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error}); pip install {package}"
    return ""


def liger_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(policy || ref): Liger's Jensen-Shannon at beta 1, of log-probs."""
    from liger_kernel.transformers import LigerJSD

    value: Tensor = LigerJSD(beta=1.0)(x.log_softmax(-1), y.log_softmax(-1))
    return value


def liger_linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    """The same of hidden states."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    value: Tensor = LigerFusedLinearJSD(jsd_beta=1.0)(hidden, weight, ref_hidden, ref_weight)
    return value


def kl_peers(x: Tensor, y: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(contenders, absent ones) of a KL of logits, forward and backward."""
    why = missing("liger_kernel.transformers", "liger-kernel")
    if why:
        return {}, {LIGER: why}
    return {LIGER: step(liger_kl, (x,), (y,))}, {}


def linear_peers(
    own: Sequence[Tensor], ref: Sequence[Tensor]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(contenders, absent ones) of a KL of hidden states, forward and backward."""
    contenders: dict[str, Callable[[], Any]] = {}
    absent = {}
    for name, function, module, package in (
        (TRL, baselines.trl_linear_kl, "trl.kernels.chunked_divergence", "trl"),
        (LIGER, liger_linear_kl, "liger_kernel.transformers", "liger-kernel"),
    ):
        why = missing(module, package)
        if why:
            absent[name] = why
        else:
            contenders[name] = step(function, own, ref)
    return contenders, absent


def logprob_peers(
    hidden: Tensor, weight: Tensor, ids: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(contenders, absent ones) of log-probs of hidden states."""
    why = missing("trl.kernels.chunked_logprob", "trl")
    if why:
        return {}, {TRL: why}
    return {TRL: step(baselines.trl_linear_logprobs, (hidden, weight), (ids,))}, {}


def adamw_peers(
    params: Sequence[nn.Parameter], anchors: Sequence[Tensor], fishers: Sequence[Tensor]
) -> dict[str, Callable[[], Any]]:
    """Torch's own AdamW, without EWC and after it by torch._foreach; one set of moments for all."""
    fused = torch.optim.AdamW(params, lr=1e-6, fused=True)
    foreach = torch.optim.AdamW(params, lr=1e-6, foreach=True)
    fused.step()
    for p in params:  # lists count their steps on the host
        foreach.state[p] = {**fused.state[p], "step": fused.state[p]["step"].cpu()}
    grads = [p.grad for p in params if p.grad is not None]
    add = partial(baselines.foreach_ewc, params, grads, anchors, fishers, 0.5)

    def both() -> None:
        add()
        fused.step()

    return {
        "fused AdamW alone": fused.step,
        "foreach AdamW alone": foreach.step,
        "foreach EWC, then fused AdamW": both,
    }
