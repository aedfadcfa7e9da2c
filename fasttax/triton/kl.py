"""token_kl in Triton: one program a row forward, one a row and tile backward.

Both at once where the tokens' weights are known.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax import reference
from fasttax.triton import on_device
from fasttax.triton.rows import (
    JSD,
    LOG2E,
    POLICY_REF,
    REF_POLICY,
    SMALL_GAP,
    TOO_HIGH,
    TRUSTED,
    Params,
    bend,
    bregman,
    divergence,
    first_frame,
    framed,
    geometry,
    is_general,
    jensen_gap,
    launch_options,
    load_pair,
    log1p,
    params,
    row_at,
    row_sums,
    tile_lanes,
    tiles,
    total,
    true_frame,
    with_rows,
)

KEPT = 8  # floats a row keeps for its gradient: csrc/math/kl.h, KlRow


@triton.jit
def log_mix(u, beta):  # log(m/p), m = (1 - beta) p + beta q, without overflow on either side
    e = tl.exp2(-tl.abs(u) * LOG2E)
    return tl.where(u < 0, tl.log(beta + (1 - beta) * e) - u, log1p((e - 1.0) * beta))


@triton.jit
def mix_sums(
    x_row,
    y_row,
    V,
    mx,
    my,
    log_ratio,
    inv_s,
    inv_s_ref,
    k,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The Jensen gap, KL(p||m) and KL(q||m) of a row whose sums are known."""
    gap = tl.zeros([LANES], tl.float32)
    p_to_m = tl.zeros([LANES], tl.float32)
    q_to_m = tl.zeros([LANES], tl.float32)
    SHORT: tl.constexpr = x_row.dtype.element_ty == tl.bfloat16
    for start in range(0, V, LANES * WIDTH):
        x, y, live = load_pair(x_row, y_row, start + tile_lanes(LANES, WIDTH), V, True)
        ax, ay, d = framed(x, y, live, mx, my, 0.0, k, GENERAL, INF_MASK, SHORT)
        p = tl.exp2(ax) * inv_s
        q = tl.exp2(ay) * inv_s_ref
        u = d - log_ratio
        to_mix = log_mix(u, k.beta)
        eps = bregman(u) - u  # e^-u - 1
        # p where q is 0 (u = inf): log(1 - beta).  q where p is 0 (u = -inf): log(m/q) = log(beta)
        p_part = tl.where(p == 0, 0.0, -p * to_mix)
        q_part = tl.where(q == 0, 0.0, tl.where(p == 0, -q * tl.log(k.beta), q * (-u - to_mix)))
        series = p * (k.beta * jensen_gap(eps) - jensen_gap(k.beta * eps))
        gap += tl.sum(
            tl.where(tl.abs(u) <= 0.2, series, k.beta * q_part + (1 - k.beta) * p_part), 1
        )
        p_to_m += tl.sum(p_part, 1)
        q_to_m += tl.sum(q_part, 1)
    return total(gap), total(p_to_m), total(q_to_m)


@triton.jit
def slope_at(
    x,
    y,
    live,
    mx,
    my,
    shift,
    inv_s,
    log_ratio,
    gap,
    ref_center,
    inv_s_ref,
    g,
    k,
    OP: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_Y: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    SHORT: tl.constexpr,
):
    """The gradients at a tile's entries; the formulas of csrc/cpu/kl_kernels.h, KlSlope."""
    ax, ay, d = framed(x, y, live, mx, my, shift, k, GENERAL, INF_MASK, SHORT)
    p = tl.exp2(ax) * inv_s
    q = tl.exp2(ay) * inv_s_ref
    u = d - log_ratio
    # p - q cancels in rows that are close
    by_series = tl.where(tl.abs(gap - log_ratio) < TRUSTED, SMALL_GAP, -1.0)
    apart = tl.where(tl.abs(u) <= by_series, p * (u - bregman(u)), p - q)
    dx = p
    dy = q
    if OP == POLICY_REF:
        dx = tl.where(p == 0, 0.0, p * (d - gap))
        dy = -apart
    if OP == REF_POLICY:
        dx = apart
        dy = tl.where(q == 0, 0.0, q * (gap - d))
    if OP == JSD:
        one_sided = (k.beta == 0) | (k.beta == 1)
        to_mix = log_mix(u, k.beta)
        for_x = tl.where(p == 0, 0.0, (1 - k.beta) * p * (-to_mix - gap))
        for_y = tl.where(
            q == 0, 0.0, k.beta * q * (tl.where(p == 0, -tl.log(k.beta), -u - to_mix) - ref_center)
        )
        dx = tl.where(one_sided, p * 0.0, for_x)  # 0, or NaN in a row that has one
        dy = tl.where(one_sided, q * 0.0, for_y)
    dx = dx * (g * k.row_slope)
    dy = dy * (g * k.ref_row_slope)
    if GENERAL:
        if WANT_X:
            dx = tl.where(k.cap > 0, dx * bend(x, k.over_cap), dx)
        if WANT_Y:
            dy = tl.where(k.ref_cap > 0, dy * bend(y, k.ref_over_cap), dy)
    return dx, dy


@triton.jit
def forward_row(
    x_row,
    y_row,
    V,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Value, then a KlRow: mx, my, shift, inv_s, log_ratio, mean_gap, ref_center, inv_s_ref."""
    mx, my, exact = first_frame(x_row, y_row, V, k, True, GENERAL, INF_MASK, LANES, WIDTH)
    shift = 0.0
    s = tl.full((), 0.0, tl.float64)
    y = s
    value = s
    gap = s
    log_ratio = s
    again = True
    while again:
        s, y, g, b, a, c, back, mass, moment, peaks = row_sums(
            x_row, y_row, V, mx, my, shift, k, OP, GENERAL, INF_MASK, LANES, WIDTH
        )
        if OP == REF_POLICY:
            value, gap, size, log_ratio, recentre = divergence(s, y, g, c, back, False)
        else:
            value, gap, size, log_ratio, recentre = divergence(s, y, g, b, a, True)
        again = False
        if ((s > TOO_HIGH) | (y > TOO_HIGH)) & (exact == 0):
            mx, my = true_frame(x_row, y_row, V, k, True, GENERAL, INF_MASK, LANES, WIDTH)
            shift = 0.0
            exact = True
            again = True
        elif (
            (OP != JSD) & recentre & (shift == 0)
        ):  # frames that do not fit: moved onto the mean gap, the value keeps its digits
            shift = gap.to(tl.float32)
            again = shift != 0
    inv_s = (1.0 / s).to(tl.float32)
    inv_s_ref = (1.0 / y).to(tl.float32)
    ref_center = tl.full((), 0.0, tl.float64)
    if OP == JSD:
        value = (s + y) * 0.0  # 0, or NaN for a NaN row
        if (k.beta > 0) & (k.beta < 1):
            value, gap, ref_center = mix_sums(
                x_row,
                y_row,
                V,
                mx,
                my,
                log_ratio.to(tl.float32),
                inv_s,
                inv_s_ref,
                k,
                GENERAL,
                INF_MASK,
                LANES,
                WIDTH,
            )
    value = tl.where(value < 0, 0.0, value)  # NaN passes through
    return (
        value.to(tl.float32),
        mx,
        my,
        shift,
        inv_s,
        log_ratio.to(tl.float32),
        gap.to(tl.float32),
        ref_center.to(tl.float32),
        inv_s_ref,
    )


@triton.jit
def write_slopes(
    x_row,
    y_row,
    dx_row,
    dy_row,
    at,
    V,
    mx,
    my,
    shift,
    inv_s,
    log_ratio,
    gap,
    ref_center,
    inv_s_ref,
    g,
    k,
    OP: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_Y: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
):
    x, y, live = load_pair(x_row, y_row, at, V, True)
    dx, dy = slope_at(
        x,
        y,
        live,
        mx,
        my,
        shift,
        inv_s,
        log_ratio,
        gap,
        ref_center,
        inv_s_ref,
        g,
        k,
        OP,
        WANT_X,
        WANT_Y,
        GENERAL,
        INF_MASK,
        x_row.dtype.element_ty == tl.bfloat16,
    )
    if WANT_X:
        tl.store(dx_row + at, dx.to(dx_row.dtype.element_ty), mask=live)
    if WANT_Y:
        tl.store(dy_row + at, dy.to(dy_row.dtype.element_ty), mask=live)


@triton.jit
def zero(row, at, V):
    tl.store(row + at, tl.zeros(at.shape, row.dtype.element_ty), mask=at < V)


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    value_ptr,
    kept_ptr,
    weight_ptr,
    dx_ptr,
    V,
    x_rows,
    y_rows,
    dx_rows,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: rows.

    With weights it writes the policy's gradient too, last tiles first: those are the ones still in
    L2.
    """
    n = tl.program_id(0)
    live_row = True
    if mask_ptr is not None:
        live_row = tl.load(mask_ptr + n) != 0
    GRADIENT: tl.constexpr = weight_ptr is not None
    tiles = tl.cdiv(V, LANES * WIDTH)
    if live_row:
        x_row = row_at(x_ptr, x_rows, n)
        y_row = row_at(y_ptr, y_rows, n)
        value, mx, my, shift, inv_s, log_ratio, gap, ref_center, inv_s_ref = forward_row(
            x_row, y_row, V, k, OP, GENERAL, INF_MASK, LANES, WIDTH
        )
        tl.store(value_ptr + n, value)
        if GRADIENT:
            g = tl.load(weight_ptr + n)
            dx_row = row_at(dx_ptr, dx_rows, n)
            for back in range(0, tiles):
                at = (tiles - 1 - back) * (LANES * WIDTH) + tile_lanes(LANES, WIDTH)
                write_slopes(
                    x_row,
                    y_row,
                    dx_row,
                    dx_row,
                    at,
                    V,
                    mx,
                    my,
                    shift,
                    inv_s,
                    log_ratio,
                    gap,
                    ref_center,
                    inv_s_ref,
                    g,
                    k,
                    OP,
                    True,
                    False,
                    GENERAL,
                    INF_MASK,
                )
        else:
            kept = kept_ptr + n.to(tl.int64) * 8
            tl.store(kept, mx)
            tl.store(kept + 1, my)
            tl.store(kept + 2, shift)
            tl.store(kept + 3, inv_s)
            tl.store(kept + 4, log_ratio)
            tl.store(kept + 5, gap)
            tl.store(kept + 6, ref_center)
            tl.store(kept + 7, inv_s_ref)
    else:
        tl.store(value_ptr + n, 0.0)
        if GRADIENT:
            for tile in range(0, tiles):
                zero(
                    row_at(dx_ptr, dx_rows, n), tile * (LANES * WIDTH) + tile_lanes(LANES, WIDTH), V
                )
        else:
            tl.store(kept_ptr + n.to(tl.int64) * 8 + tl.arange(0, 8), tl.zeros([8], tl.float32))


@triton.jit
def gradient_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    kept_ptr,
    upstream_ptr,
    dx_ptr,
    dy_ptr,
    V,
    x_rows,
    y_rows,
    dx_rows,
    dy_rows,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (rows, tiles). dx may be the policy's logits themselves."""
    n = tl.program_id(0)
    at = tl.program_id(1) * (LANES * WIDTH) + tile_lanes(LANES, WIDTH)
    WANT_X: tl.constexpr = dx_ptr is not None
    WANT_Y: tl.constexpr = dy_ptr is not None
    x_row = row_at(x_ptr, x_rows, n)
    dx_row = x_row
    dy_row = x_row
    if WANT_X:
        dx_row = row_at(dx_ptr, dx_rows, n)
    if WANT_Y:
        dy_row = row_at(dy_ptr, dy_rows, n)
    live_row = True
    if mask_ptr is not None:
        live_row = tl.load(mask_ptr + n) != 0
    if live_row:
        kept = kept_ptr + n.to(tl.int64) * 8
        g = tl.load(upstream_ptr + n)
        write_slopes(
            x_row,
            row_at(y_ptr, y_rows, n),
            dx_row,
            dy_row,
            at,
            V,
            tl.load(kept),
            tl.load(kept + 1),
            tl.load(kept + 2),
            tl.load(kept + 3),
            tl.load(kept + 4),
            tl.load(kept + 5),
            tl.load(kept + 6),
            tl.load(kept + 7),
            g,
            k,
            OP,
            WANT_X,
            WANT_Y,
            GENERAL,
            INF_MASK,
        )
    else:
        if WANT_X:
            zero(dx_row, at, V)
        if WANT_Y:
            zero(dy_row, at, V)


# --- the ops -----------------------------------------------------------------------------------------------------------


def _call(logits: Tensor, options: tuple[Any, ...]) -> tuple[Params, dict[str, Any]]:
    kind, beta, scale, ref_scale, softcap, ref_softcap, inv_t, ref_inv_t, inf_mask = options
    k = params(beta, scale, ref_scale, softcap, ref_softcap, inv_t, ref_inv_t)
    general = is_general(k, inf_mask)
    shape = geometry(logits.shape[-1], logits.dtype, kind, general)
    return k, {"OP": kind, "GENERAL": general, "INF_MASK": inf_mask, **shape, **launch_options()}


def token_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return reference.token_kl(logits, ref_logits, mask, *options)
    k, meta = _call(logits, options)
    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    kept = logits.new_empty((*logits.shape[:-1], KEPT), dtype=torch.float32)
    if kl.numel():
        (x, x_rows), (y, y_rows) = with_rows(logits), with_rows(ref_logits)
        with on_device(logits):
            forward_kernel[(kl.numel(),)](
                x,
                y,
                mask,
                kl,
                kept,
                None,
                None,
                logits.shape[-1],
                x_rows,
                y_rows,
                x_rows,
                k,
                **meta,
            )
    return kl, kept


def token_kl_grad(
    token_weight: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *kl_options, need_policy, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_kl_grad(token_weight, logits, ref_logits, mask, *options)
    if need_ref or not need_policy:  # not the common case: two launches
        kl, kept = token_kl(logits, ref_logits, mask, *kl_options)
        return (kl, *token_kl_backward(token_weight, logits, ref_logits, mask, kept, *options))
    k, meta = _call(logits, tuple(kl_options))
    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    d_logits = logits.new_empty(logits.shape)
    if kl.numel():
        (x, x_rows), (y, y_rows), (dx, dx_rows) = (
            with_rows(logits),
            with_rows(ref_logits),
            with_rows(d_logits),
        )
        with on_device(logits):
            forward_kernel[(kl.numel(),)](
                x,
                y,
                mask,
                kl,
                None,
                token_weight.contiguous(),
                dx,
                logits.shape[-1],
                x_rows,
                y_rows,
                dx_rows,
                k,
                **meta,
            )
    return kl, d_logits, ref_logits.new_empty((0,))


def _write_gradients(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    options: tuple[Any, ...],
    d_logits: Tensor | None,
    d_ref: Tensor | None,
) -> None:
    k, meta = _call(logits, options)
    N, V = grad.numel(), logits.shape[-1]
    if N == 0 or (d_logits is None and d_ref is None):
        return
    (x, x_rows), (y, y_rows) = with_rows(logits), with_rows(ref_logits)
    dx, dx_rows = (None, x_rows) if d_logits is None else with_rows(d_logits)
    dy, dy_rows = (None, y_rows) if d_ref is None else with_rows(d_ref)
    with on_device(logits):
        gradient_kernel[(N, tiles(V, meta))](
            x,
            y,
            mask,
            kept,
            grad.contiguous(),
            dx,
            dy,
            V,
            x_rows,
            y_rows,
            dx_rows,
            dy_rows,
            k,
            **meta,
        )
    if (
        d_logits is not None and dx is not None and dx is not d_logits
    ):  # in place, over strides that do not fold
        d_logits.copy_(dx)


def token_kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *kl_options, need_policy, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_kl_backward(grad, logits, ref_logits, mask, stats, *options)
    d_logits = logits.new_empty(logits.shape if need_policy else (0,))
    d_ref = ref_logits.new_empty(ref_logits.shape if need_ref else (0,))
    _write_gradients(
        grad,
        logits,
        ref_logits,
        mask,
        stats,
        tuple(kl_options),
        d_logits if need_policy else None,
        d_ref if need_ref else None,
    )
    return d_logits, d_ref


def token_kl_backward_(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    *options: Any,
) -> Tensor:
    *kl_options, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_kl_backward_(grad, logits, ref_logits, mask, stats, *options)
    d_ref = ref_logits.new_empty(ref_logits.shape if need_ref else (0,))
    _write_gradients(
        grad,
        logits,
        ref_logits,
        mask,
        stats,
        tuple(kl_options),
        logits,
        d_ref if need_ref else None,
    )
    return d_ref
