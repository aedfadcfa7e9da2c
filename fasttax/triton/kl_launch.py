"""token_kl's ops by the Triton kernels of kl.py; float64 is the reference's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax.reference.numbers import empty_gradient
from fasttax.reference.rows import SAVED_KL
from fasttax.reference.tempering import Tempering
from fasttax.triton import on_device
from fasttax.triton.kl import forward_kernel, gradient_kernel
from fasttax.triton.rows import (
    Params,
    approximate,
    frame_for,
    geometry,
    gradient_geometry,
    launch_options,
    narrower,
    params,
    tiles,
    with_layout_if_wanted,
    with_layouts,
)


def _call(
    logits: Tensor, ref_logits: Tensor, options: tuple[Any, ...]
) -> tuple[Params, dict[str, Any]]:
    """The numbers and the compile-time constants of a call."""
    t = Tempering.of_args(options)
    k = params(t)
    frame = frame_for(k, t.inf_mask, t.kind, logits.dtype, ref_logits.dtype)
    shape = geometry(logits.shape[-1], narrower(logits, ref_logits), t.kind, frame)
    constants = {"OP": t.kind, "FRAME": frame, "INF_MASK": t.inf_mask, "APPROX": approximate()}
    return k, {**constants, **shape, **launch_options(t.kind, frame)}


def token_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """As reference.token_kl."""
    if logits.dtype == torch.float64:
        return reference.token_kl(logits, ref_logits, mask, *options)
    k, meta = _call(logits, ref_logits, options)
    V, tokens = logits.shape[-1], logits.shape[:-1]
    kl = logits.new_empty(tokens, dtype=torch.float32)
    saved = logits.new_empty((*tokens, SAVED_KL), dtype=torch.float32)
    if kl.numel():
        (x, y), (of_x, of_y) = with_layouts(logits, ref_logits)
        with on_device(logits):
            forward_kernel[(kl.numel(),)](
                x, y, mask, kl, saved, None, None, V, of_x, of_y, of_x, k, **meta
            )
    return kl, saved


def token_kl_grad(
    token_weight: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.token_kl_grad, in one launch for the policy's gradient alone."""
    *args, need_policy, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_kl_grad(token_weight, logits, ref_logits, mask, *options)
    if need_ref or not need_policy:  # not the common case: two launches
        kl, saved = token_kl(logits, ref_logits, mask, *args)
        return kl, *token_kl_backward(token_weight, logits, ref_logits, mask, saved, *options)
    k, meta = _call(logits, ref_logits, tuple(args))
    V = logits.shape[-1]
    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    d_logits = empty_gradient(logits, True)
    if kl.numel():
        (x, y, dx), (of_x, of_y, of_dx) = with_layouts(logits, ref_logits, d_logits)
        weight = token_weight.contiguous()
        with on_device(logits):
            forward_kernel[(kl.numel(),)](
                x, y, mask, kl, None, weight, dx, V, of_x, of_y, of_dx, k, **meta
            )
    return kl, d_logits, empty_gradient(ref_logits, False)


def token_kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """As reference.token_kl_backward."""
    *args, need_policy, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_kl_backward(grad, logits, ref_logits, mask, saved, *options)
    d_logits = empty_gradient(logits, need_policy)
    d_ref = empty_gradient(ref_logits, need_ref)
    if need_policy or need_ref:
        _write_gradients(grad, logits, ref_logits, mask, saved, tuple(args), d_logits, d_ref)
    return d_logits, d_ref


def token_kl_backward_(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> Tensor:
    """As reference.token_kl_backward_."""
    *args, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_kl_backward_(grad, logits, ref_logits, mask, saved, *options)
    d_ref = empty_gradient(ref_logits, need_ref)
    _write_gradients(grad, logits, ref_logits, mask, saved, tuple(args), logits, d_ref)
    return d_ref


def _write_gradients(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    options: tuple[Any, ...],
    d_logits: Tensor,
    d_ref: Tensor,
) -> None:
    """Over `d_logits`, which may be the logits, and `d_ref`; empty ones are not wanted."""
    k, meta = _call(logits, ref_logits, options)
    meta = gradient_geometry(meta)
    N, V = grad.numel(), logits.shape[-1]
    if N == 0:
        return
    (x, y), (of_x, of_y) = with_layouts(logits, ref_logits)
    dx, of_dx = with_layout_if_wanted(d_logits, of_x)
    dy, of_dy = with_layout_if_wanted(d_ref, of_y)
    grad = grad.contiguous()
    with on_device(logits):
        gradient_kernel[(N, tiles(V, meta))](
            x, y, mask, saved, grad, dx, dy, V, of_x, of_y, of_dx, of_dy, k, **meta
        )
    if dx is not None and dx is not d_logits:  # in place, over strides that do not fold
        d_logits.copy_(dx)
