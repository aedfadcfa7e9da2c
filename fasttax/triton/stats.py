"""token_stats in Triton: log-prob of an id, entropy, lse and the KL both ways out of one sweep, and
one sweep back for any mix of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax import reference
from fasttax.triton import on_device
from fasttax.triton.kl import zero
from fasttax.triton.rows import (
    ALONE,
    DOMINATED,
    LN2,
    SMALL_GAP,
    STATS,
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
    launch_options,
    load_pair,
    params,
    row_at,
    row_sums,
    tile_lanes,
    tiles,
    true_frame,
    with_rows,
)

VALUES, KEPT = 6, 11  # csrc/math/kl.h: TokenStat, StatsRow


@triton.jit
def at_most(v, bound):  # NaN passes through
    return tl.where(v > bound, bound, v)


@triton.jit
def rounded(
    found,
):  # a row's results live through its next sweep: as float32 they leave it registers
    value, gap, size, log_ratio, recentre = found
    return (
        value.to(tl.float32),
        gap.to(tl.float32),
        size.to(tl.float32),
        log_ratio.to(tl.float32),
        recentre,
    )


@triton.jit(do_not_specialize=["N"])  # a constant 1 has no .to()
def forward_kernel(
    x_ptr,
    y_ptr,
    ids_ptr,
    mask_ptr,
    values_ptr,
    kept_ptr,
    N,
    V,
    x_rows,
    y_rows,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: rows."""
    n = tl.program_id(0)
    PAIR: tl.constexpr = OP == STATS
    SHORT: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    live_row = True
    if mask_ptr is not None:
        live_row = tl.load(mask_ptr + n) != 0
    kept = kept_ptr + n.to(tl.int64) * 11
    none = tl.full((), 0.0, tl.float32)
    logp = none
    ref_logp = none
    entropy = none
    lse = none
    kl_forwards = none
    kl_backwards = none
    if live_row:
        x_row = row_at(x_ptr, x_rows, n)
        y_row = x_row
        if PAIR:
            y_row = row_at(y_ptr, y_rows, n)
        mx, my, exact = first_frame(x_row, y_row, V, k, PAIR, GENERAL, False, LANES, WIDTH)
        shift = 0.0
        mass = tl.full((), 0.0, tl.float64)
        mean = mass
        y = mass
        value_f = none
        gap_f = none
        size_f = none
        log_ratio = none
        value_b = none
        gap_b = none
        size_b = none
        recentred = False
        again = True
        while again:
            s, y, g, b, a, c, back, beside, moment, peaks = row_sums(
                x_row, y_row, V, mx, my, shift, k, OP, GENERAL, False, LANES, WIDTH
            )
            again = False
            now_mass = beside + peaks
            # or a peak outside the first tile holds most of the mass
            too_high = (now_mass > TOO_HIGH) | (moment > now_mass * DOMINATED)
            if PAIR:
                too_high = too_high | (s > TOO_HIGH) | (y > TOO_HIGH)
            if too_high & (exact == 0) & (recentred == 0):
                mx, my = true_frame(x_row, y_row, V, k, PAIR, GENERAL, False, LANES, WIDTH)
                exact = True
                again = True
            elif PAIR:
                f_value, f_gap, f_size, f_ratio, f_recentre = rounded(
                    divergence(s, y, g, b, a, True)
                )
                b_value, b_gap, b_size, b_ratio, b_recentre = rounded(
                    divergence(s, y, g, c, back, False)
                )
                # after a shift each keeps the better of its two values; entropy and log-probs stay
                # with the first frame
                value_f = tl.where(recentred & (f_size > size_f), value_f, f_value)
                value_b = tl.where(recentred & (b_size > size_b), value_b, b_value)
                size_f = f_size
                size_b = b_size
                gap_f = f_gap
                gap_b = b_gap
                log_ratio = f_ratio
                if recentred == 0:
                    mass = now_mass
                    mean = moment / now_mass
                    if (
                        f_recentre | b_recentre
                    ):  # the frame is that of the smaller one, where digits are scarce
                        first = f_recentre & ((b_recentre == 0) | (b_value >= f_value))
                        shift = tl.where(first, f_gap, b_gap)
                        recentred = True
                        again = True
            else:
                mass = now_mass
                mean = moment / now_mass
        log_mass = tl.log(mass)
        if ids_ptr is not None:
            id = tl.load(ids_ptr + n)
            inside = (id >= 0) & (id < V)
            safe = tl.where(inside, id, 0)
            raw_x = tl.load(x_row + safe).to(tl.float32)
            raw_y = raw_x
            if PAIR:
                raw_y = tl.load(y_row + safe).to(tl.float32)
            ax, ay, d = framed(raw_x, raw_y, inside, mx, my, shift, k, GENERAL, False, SHORT)
            # to look for ids out of range on the host would be a sync
            nan = tl.full((), float("nan"), tl.float32)
            logp = tl.where(inside, at_most(ax * LN2 - log_mass, 0.0).to(tl.float32), nan)
            if PAIR:
                same = (value_f == 0) & (log_ratio == 0)  # equal rows get equal bits
                ref_logp = tl.where(
                    inside,
                    at_most(ay * LN2 - tl.where(same, log_mass, tl.log(y)), 0.0).to(tl.float32),
                    nan,
                )
        spread = log_mass - mean
        entropy = tl.where(spread < 0, 0.0, spread).to(tl.float32)
        lse = (mx.to(tl.float64) * k.row_scale + log_mass).to(tl.float32)
        if PAIR:
            kl_forwards = tl.where(value_f < 0, 0.0, value_f)
            kl_backwards = tl.where(value_b < 0, 0.0, value_b)
        tl.store(kept, mx)
        tl.store(kept + 1, my)
        tl.store(kept + 2, shift)
        tl.store(kept + 3, (1.0 / mass).to(tl.float32))
        tl.store(kept + 4, log_ratio)
        tl.store(kept + 5, gap_f)
        tl.store(kept + 6, gap_b)
        tl.store(kept + 7, (1.0 / y).to(tl.float32) if PAIR else 0.0)
        tl.store(kept + 8, mean.to(tl.float32))
        tl.store(kept + 9, logp)
        tl.store(kept + 10, ref_logp)
    else:
        eleven = tl.arange(0, 16)
        tl.store(kept + eleven, tl.zeros([16], tl.float32), mask=eleven < 11)
    rows = N.to(tl.int64)
    tl.store(values_ptr + n, logp)
    tl.store(values_ptr + rows + n, ref_logp)
    tl.store(values_ptr + 2 * rows + n, entropy)
    tl.store(values_ptr + 3 * rows + n, lse)
    tl.store(values_ptr + 4 * rows + n, kl_forwards)
    tl.store(values_ptr + 5 * rows + n, kl_backwards)


@triton.jit
def expm1_of(logp):  # of a float32 <= 0, by way of float64: 1e-16 absolute
    return (tl.exp(logp.to(tl.float64)) - 1.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def gradient_kernel(
    x_ptr,
    y_ptr,
    ids_ptr,
    mask_ptr,
    kept_ptr,
    upstream_ptr,
    dx_ptr,
    dy_ptr,
    N,
    V,
    x_rows,
    y_rows,
    dx_rows,
    dy_rows,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (rows, tiles). The formulas of csrc/cpu/stats_kernels.h, StatsSlope."""
    n = tl.program_id(0)
    at = tl.program_id(1) * (LANES * WIDTH) + tile_lanes(LANES, WIDTH)
    PAIR: tl.constexpr = OP == STATS
    SHORT: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    WANT_X: tl.constexpr = dx_ptr is not None
    WANT_Y: tl.constexpr = dy_ptr is not None
    rows = N.to(tl.int64)
    g = upstream_ptr + n
    g_logp = tl.load(g)
    g_ref_logp = tl.load(g + rows)
    g_entropy = tl.load(g + 2 * rows)
    g_lse = tl.load(g + 3 * rows)
    g_forwards = tl.load(g + 4 * rows)
    g_backwards = tl.load(g + 5 * rows)
    live_row = (
        (g_logp != 0)
        | (g_ref_logp != 0)
        | (g_entropy != 0)
        | (g_lse != 0)
        | (g_forwards != 0)
        | (g_backwards != 0)
    )
    if mask_ptr is not None:
        live_row = live_row & (tl.load(mask_ptr + n) != 0)
    if live_row:
        kept = kept_ptr + n.to(tl.int64) * 11
        inv_s = tl.load(kept + 3)
        log_ratio = tl.load(kept + 4)
        gap = tl.load(kept + 5)
        ref_center = tl.load(kept + 6)
        mean = tl.load(kept + 8)
        x_row = row_at(x_ptr, x_rows, n)
        y_row = x_row
        if PAIR:
            y_row = row_at(y_ptr, y_rows, n)
        x, y, live = load_pair(x_row, y_row, at, V, PAIR)
        ax, ay, d = framed(
            x,
            y,
            live,
            tl.load(kept),
            tl.load(kept + 1),
            tl.load(kept + 2),
            k,
            GENERAL,
            False,
            SHORT,
        )
        p = tl.exp2(ax) * inv_s
        id = tl.full((), -1, tl.int64)
        if ids_ptr is not None:
            id = tl.load(ids_ptr + n)
        here = at == id
        centred = tl.fma(ax, -LN2, mean) * g_entropy + g_lse
        q = p
        apart = p
        if PAIR:
            # d may be inf where nobody asks for it
            centred = tl.where(g_forwards != 0, centred + (d - gap) * g_forwards, centred)
            q = tl.exp2(ay) * tl.load(kept + 7)
            u = d - log_ratio
            smaller = tl.where(
                gap - log_ratio < log_ratio - ref_center, gap - log_ratio, log_ratio - ref_center
            )
            apart = tl.where(
                tl.abs(u) <= tl.where(smaller < TRUSTED, SMALL_GAP, -1.0),
                p * (u - bregman(u)),
                p - q,
            )
        if WANT_X:  # d logp at its id is 1 - p = -expm1(logp), which p in float would round away
            dx = tl.where(p == 0, 0.0, p * centred) - g_logp * tl.where(
                here, expm1_of(tl.load(kept + 9)), tl.where(ids_ptr is not None, p, 0.0)
            )
            if PAIR:
                dx = tl.where(g_backwards != 0, dx + apart * g_backwards, dx)
            dx = dx * k.row_slope
            if GENERAL:
                dx = tl.where(k.cap > 0, dx * bend(x, k.over_cap), dx)
            tl.store(row_at(dx_ptr, dx_rows, n) + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        if WANT_Y:
            about = tl.where(g_backwards != 0, (ref_center - d) * g_backwards, 0.0)
            dy = tl.where(q == 0, 0.0, q * about) - g_ref_logp * tl.where(
                here, expm1_of(tl.load(kept + 10)), tl.where(ids_ptr is not None, q, 0.0)
            )
            dy = tl.where(g_forwards != 0, dy - apart * g_forwards, dy)
            dy = dy * k.ref_row_slope
            if GENERAL:
                dy = tl.where(k.ref_cap > 0, dy * bend(y, k.ref_over_cap), dy)
            tl.store(row_at(dy_ptr, dy_rows, n) + at, dy.to(dy_ptr.dtype.element_ty), mask=live)
    else:
        if WANT_X:
            zero(row_at(dx_ptr, dx_rows, n), at, V)
        if WANT_Y:
            zero(row_at(dy_ptr, dy_rows, n), at, V)


# --- the ops -----------------------------------------------------------------------------------------------------------


def _call(logits: Tensor, pair: bool, options: tuple[float, ...]) -> tuple[Params, dict[str, Any]]:
    scale, ref_scale, softcap, ref_softcap, inv_t, ref_inv_t = options
    if not pair:  # one row stands for both
        ref_scale, ref_softcap, ref_inv_t = scale, softcap, inv_t
    k = params(0.0, scale, ref_scale, softcap, ref_softcap, inv_t, ref_inv_t)
    op, general = (STATS if pair else ALONE).value, is_general(k, False)
    return k, {
        "OP": op,
        "GENERAL": general,
        **geometry(logits.shape[-1], logits.dtype, op, general),
        **launch_options(),
    }


def token_stats(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return reference.token_stats(logits, ref_logits, ids, mask, *options)
    k, meta = _call(logits, ref_logits is not None, options)
    values = logits.new_empty((VALUES, *logits.shape[:-1]), dtype=torch.float32)
    kept = logits.new_empty((*logits.shape[:-1], KEPT), dtype=torch.float32)
    N, V = values[0].numel(), logits.shape[-1]
    if N:
        (x, x_rows), (y, y_rows) = (
            with_rows(logits),
            with_rows(logits if ref_logits is None else ref_logits),
        )
        with on_device(logits):
            forward_kernel[(N,)](x, y, ids, mask, values, kept, N, V, x_rows, y_rows, k, **meta)
    return values, kept


def token_stats_backward(
    grads: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *numbers, need_policy, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_stats_backward(grads, logits, ref_logits, ids, mask, stats, *options)
    k, meta = _call(logits, ref_logits is not None, tuple(numbers))
    d_logits = logits.new_empty(logits.shape if need_policy else (0,))
    d_ref = logits.new_empty(logits.shape if need_ref else (0,))
    N, V = grads[0].numel(), logits.shape[-1]
    if N and (need_policy or need_ref):
        (x, x_rows), (y, y_rows) = (
            with_rows(logits),
            with_rows(logits if ref_logits is None else ref_logits),
        )
        (dx, dx_rows), (dy, dy_rows) = (
            with_rows(d) if d.numel() else (None, x_rows) for d in (d_logits, d_ref)
        )
        with on_device(logits):
            gradient_kernel[(N, tiles(V, meta))](
                x,
                y,
                ids,
                mask,
                stats,
                grads.contiguous(),
                dx,
                dy,
                N,
                V,
                x_rows,
                y_rows,
                dx_rows,
                dy_rows,
                k,
                **meta,
            )
    return d_logits, d_ref
