"""token_stats in Triton: one sweep for all of its values, and one back for any mix of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax import reference
from fasttax.reference.numbers import empty_gradient
from fasttax.reference.rows import SAVED_STATS
from fasttax.reference.rows import STATS as VALUES
from fasttax.reference.tempering import Tempering
from fasttax.triton import on_device
from fasttax.triton.frames import divergence
from fasttax.triton.rows import (
    ALONE,
    LN2,
    PLAIN,
    SMALL_GAP,
    STATS,
    TRUSTED,
    Params,
    bend,
    frame_for,
    framed,
    geometry,
    is_short,
    launch_options,
    load_pair,
    narrower,
    params,
    row_at,
    store,
    tile_lanes,
    tiles,
    with_layout_if_wanted,
    with_layouts,
    zero,
)
from fasttax.triton.series import bregman
from fasttax.triton.sums import sweep


@triton.jit
def at_most(v, bound):
    """The smaller one; NaN passes through."""
    return tl.where(v > bound, bound, v)


@triton.jit
def row_stats(
    x_row,
    y_row,
    V,
    k,
    OP: tl.constexpr,
    FRAME: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A row's sums and what they say.

    The frame (mx, my, shift), sum e^ax and the mean of ax under it, sum e^ay; of each KL its value
    and mean gap; log_ratio.
    """
    sums, frame, _ = sweep(x_row, y_row, V, k, OP, FRAME, False, LANES, WIDTH, False)
    mx, my, shift = frame
    mass = sums[0]
    if OP == STATS:
        y = sums[1]
        value_f, gap_f, log_ratio = divergence(mass, y, sums[2], sums[3], True)
        value_b, gap_b, _ = divergence(mass, y, sums[4], sums[5], False)
        mean = sums[6] * LN2 / mass
        return (
            mx,
            my,
            shift,
            mass,
            mean,
            y,
            value_f.to(tl.float32),
            gap_f.to(tl.float32),
            value_b.to(tl.float32),
            gap_b.to(tl.float32),
            log_ratio.to(tl.float32),
        )
    else:
        none = tl.full((), 0.0, tl.float32)
        mean = sums[1] * LN2 / mass
        return mx, my, shift, mass, mean, mass, none, none, none, none, none


@triton.jit
def log_probs(
    x_row,
    y_row,
    id,
    V,
    mx,
    my,
    shift,
    log_mass,
    y_mass,
    equal,
    k,
    PAIR: tl.constexpr,
    FRAME: tl.constexpr,
):
    """Of the id under both models; NaN outside the vocabulary: a look on the host would be a sync.

    Rows that are `equal` get equal bits.
    """
    SHORT: tl.constexpr = is_short(x_row, y_row)
    nan = tl.full((), float("nan"), tl.float32)
    inside = (id >= 0) & (id < V)
    safe = tl.where(inside, id, 0)
    raw_x = tl.load(x_row + safe).to(tl.float32)
    raw_y = raw_x
    if PAIR:
        raw_y = tl.load(y_row + safe).to(tl.float32)
    ax, ay, d = framed(raw_x, raw_y, inside, mx, my, shift, k, FRAME, False, SHORT)
    logp = tl.where(inside, at_most(ax * LN2 - log_mass, 0.0).to(tl.float32), nan)
    ref_logp = tl.full((), 0.0, tl.float32)
    if PAIR:
        log_y = tl.where(equal, log_mass, tl.log(y_mass))
        ref_logp = tl.where(inside, at_most(ay * LN2 - log_y, 0.0).to(tl.float32), nan)
    return logp, ref_logp


@triton.jit(do_not_specialize=["N"])  # a constant 1 has no .to()
def forward_kernel(
    x_ptr,
    y_ptr,
    ids_ptr,
    mask_ptr,
    values_ptr,
    saved_ptr,
    N,
    V,
    x_layout,
    y_layout,
    k,
    OP: tl.constexpr,
    FRAME: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: rows."""
    n = tl.program_id(0)
    PAIR: tl.constexpr = OP == STATS
    live_row = True
    if mask_ptr is not None:
        live_row = tl.load(mask_ptr + n) != 0
    saved = saved_ptr + n.to(tl.int64) * 11
    none = tl.full((), 0.0, tl.float32)
    logp = none
    ref_logp = none
    entropy = none
    lse = none
    kl_forwards = none
    kl_backwards = none
    if live_row:
        x_row = row_at(x_ptr, x_layout, n)
        y_row = x_row
        if PAIR:
            y_row = row_at(y_ptr, y_layout, n)
        mx, my, shift, mass, mean, y, value_f, gap_f, value_b, gap_b, log_ratio = row_stats(
            x_row, y_row, V, k, OP, FRAME, LANES, WIDTH
        )
        log_mass = tl.log(mass)
        if ids_ptr is not None:
            equal = (value_f == 0) & (log_ratio == 0)
            id = tl.load(ids_ptr + n)
            logp, ref_logp = log_probs(
                x_row, y_row, id, V, mx, my, shift, log_mass, y, equal, k, PAIR, FRAME
            )
        spread = log_mass - mean
        entropy = tl.where(spread < 0, 0.0, spread).to(tl.float32)
        lse = (mx.to(tl.float64) * k.row_scale + log_mass).to(tl.float32)
        if PAIR:
            kl_forwards = tl.where(value_f < 0, 0.0, value_f)
            kl_backwards = tl.where(value_b < 0, 0.0, value_b)
        inv_s = (1.0 / mass).to(tl.float32)
        inv_s_ref = none
        if PAIR:
            inv_s_ref = (1.0 / y).to(tl.float32)
        row = (
            mx,
            my,
            shift,
            inv_s,
            log_ratio,
            gap_f,
            gap_b,
            inv_s_ref,
            mean.to(tl.float32),
            logp,
            ref_logp,
        )
        store(saved, 1, row, 11)
    else:
        eleven = tl.arange(0, 16)
        tl.store(saved + eleven, tl.zeros([16], tl.float32), mask=eleven < 11)
    values = (logp, ref_logp, entropy, lse, kl_forwards, kl_backwards)
    store(values_ptr + n, N.to(tl.int64), values, 6)


@triton.jit
def expm1_of(logp):
    """Of a float32 <= 0, by way of float64: 1e-16 absolute."""
    return (tl.exp(logp.to(tl.float64)) - 1.0).to(tl.float32)


@triton.jit
def slopes(ax, ay, d, here, saved, g, HAS_IDS: tl.constexpr, PAIR: tl.constexpr):
    """By both models' tempered logits; the formulas of csrc/cpu/stats_kernels.h, StatsSlope.

    `saved` are a row's numbers, `g` the six coefficients, `here` is where the id stands.
    """
    g_logp, g_ref_logp, g_entropy, g_lse, g_forwards, g_backwards = g
    p = tl.exp2(ax) * tl.load(saved + 3)
    centred = tl.fma(ax, -LN2, tl.load(saved + 8)) * g_entropy + g_lse
    q = p
    apart = p
    about = 0.0
    if PAIR:
        log_ratio = tl.load(saved + 4)
        gap = tl.load(saved + 5)
        ref_center = tl.load(saved + 6)
        q = tl.exp2(ay) * tl.load(saved + 7)
        u = d - log_ratio
        smaller = tl.where(
            gap - log_ratio < log_ratio - ref_center, gap - log_ratio, log_ratio - ref_center
        )
        by_series = tl.where(smaller < TRUSTED, SMALL_GAP, -1.0)
        apart = tl.where(tl.abs(u) <= by_series, p * (u - bregman(u)), p - q)
        # d may be inf where nobody asks for it
        centred = tl.where(g_forwards != 0, centred + (d - gap) * g_forwards, centred)
        about = tl.where(g_backwards != 0, (ref_center - d) * g_backwards, 0.0)
    dx = tl.where(p == 0, 0.0, p * centred)
    dy = tl.where(q == 0, 0.0, q * about)
    if HAS_IDS:
        # d logp at its id is 1 - p = -expm1(logp), which p in float would round away
        dx -= g_logp * tl.where(here, expm1_of(tl.load(saved + 9)), p)
        dy -= g_ref_logp * tl.where(here, expm1_of(tl.load(saved + 10)), q)
    if PAIR:
        dx = tl.where(g_backwards != 0, dx + apart * g_backwards, dx)
        dy = tl.where(g_forwards != 0, dy - apart * g_forwards, dy)
        # the reference may have no mass, and q be no number, where nobody asks for it
        asked = (g_forwards != 0) | (g_backwards != 0) | (g_ref_logp != 0)
        dy = tl.where(asked, dy, 0.0)
    return dx, dy


@triton.jit(do_not_specialize=["N"])
def gradient_kernel(
    x_ptr,
    y_ptr,
    ids_ptr,
    mask_ptr,
    saved_ptr,
    upstream_ptr,
    dx_ptr,
    dy_ptr,
    N,
    V,
    x_layout,
    y_layout,
    dx_layout,
    dy_layout,
    k,
    OP: tl.constexpr,
    FRAME: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (rows, tiles)."""
    n = tl.program_id(0)
    at = tl.program_id(1) * (LANES * WIDTH) + tile_lanes(LANES, WIDTH)
    PAIR: tl.constexpr = OP == STATS
    SHORT: tl.constexpr = is_short(x_ptr, x_ptr if y_ptr is None else y_ptr)
    WANT_X: tl.constexpr = dx_ptr is not None
    WANT_Y: tl.constexpr = dy_ptr is not None
    HAS_IDS: tl.constexpr = ids_ptr is not None
    g = coefficients(upstream_ptr + n, N.to(tl.int64))
    live_row = (g[0] != 0) | (g[1] != 0) | (g[2] != 0) | (g[3] != 0) | (g[4] != 0) | (g[5] != 0)
    if mask_ptr is not None:
        live_row = live_row & (tl.load(mask_ptr + n) != 0)
    if live_row:
        saved = saved_ptr + n.to(tl.int64) * 11
        x_row = row_at(x_ptr, x_layout, n)
        y_row = x_row
        if PAIR:
            y_row = row_at(y_ptr, y_layout, n)
        x, y, live = load_pair(x_row, y_row, at, V, PAIR)
        mx = tl.load(saved)
        my = tl.load(saved + 1)
        shift = tl.load(saved + 2)
        ax, ay, d = framed(x, y, live, mx, my, shift, k, FRAME, False, SHORT)
        id = tl.full((), -1, tl.int64)
        if HAS_IDS:
            id = tl.load(ids_ptr + n)
        dx, dy = slopes(ax, ay, d, at == id, saved, g, HAS_IDS, PAIR)
        if WANT_X:
            dx = dx * k.row_slope
            if FRAME != PLAIN:
                dx = tl.where(k.cap > 0, dx * bend(x, k.over_cap), dx)
            tl.store(row_at(dx_ptr, dx_layout, n) + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        if WANT_Y:
            dy = dy * k.ref_row_slope
            if FRAME != PLAIN:
                dy = tl.where(k.ref_cap > 0, dy * bend(y, k.ref_over_cap), dy)
            tl.store(row_at(dy_ptr, dy_layout, n) + at, dy.to(dy_ptr.dtype.element_ty), mask=live)
    else:
        if WANT_X:
            zero(row_at(dx_ptr, dx_layout, n), at, V)
        if WANT_Y:
            zero(row_at(dy_ptr, dy_layout, n), at, V)


@triton.jit
def coefficients(first, rows):
    """A token's six, `rows` apart."""
    return (
        tl.load(first),
        tl.load(first + rows),
        tl.load(first + 2 * rows),
        tl.load(first + 3 * rows),
        tl.load(first + 4 * rows),
        tl.load(first + 5 * rows),
    )


# the ops


def _call(
    logits: Tensor, ref_logits: Tensor | None, sides: tuple[float, ...]
) -> tuple[Params, dict[str, Any]]:
    """The numbers and the compile-time constants of a call."""
    t = Tempering.of_sides(sides)
    pair = ref_logits is not None
    if not pair:  # one row stands for both
        t = Tempering.of_sides(t.alone(t.policy))
    k = params(t)
    op = (STATS if pair else ALONE).value
    frame = frame_for(k, False, op)
    dtype = narrower(logits, logits if ref_logits is None else ref_logits)
    shape = geometry(logits.shape[-1], dtype, op, frame)
    return k, {"OP": op, "FRAME": frame, **shape, **launch_options(op, frame)}


def token_stats(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor]:
    """As reference.token_stats."""
    if logits.dtype == torch.float64:
        return reference.token_stats(logits, ref_logits, ids, mask, *options)
    k, meta = _call(logits, ref_logits, options)
    tokens = logits.shape[:-1]
    values = logits.new_empty((len(VALUES), *tokens), dtype=torch.float32)
    saved = logits.new_empty((*tokens, SAVED_STATS), dtype=torch.float32)
    N, V = values[0].numel(), logits.shape[-1]
    if N:
        (x, y), (of_x, of_y) = with_layouts(logits, logits if ref_logits is None else ref_logits)
        with on_device(logits):
            forward_kernel[(N,)](x, y, ids, mask, values, saved, N, V, of_x, of_y, k, **meta)
    return values, saved


def token_stats_backward(
    grads: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """As reference.token_stats_backward."""
    *sides, need_policy, need_ref = options
    if logits.dtype == torch.float64:
        return reference.token_stats_backward(grads, logits, ref_logits, ids, mask, saved, *options)
    k, meta = _call(logits, ref_logits, tuple(sides))
    ref = logits if ref_logits is None else ref_logits
    d_logits, d_ref = empty_gradient(logits, need_policy), empty_gradient(ref, need_ref)
    N, V = grads[0].numel(), logits.shape[-1]
    if N and (need_policy or need_ref):
        (x, y), (of_x, of_y) = with_layouts(logits, ref)
        dx, of_dx = with_layout_if_wanted(d_logits, of_x)
        dy, of_dy = with_layout_if_wanted(d_ref, of_y)
        grads = grads.contiguous()
        with on_device(logits):
            gradient_kernel[(N, tiles(V, meta))](
                x, y, ids, mask, saved, grads, dx, dy, N, V, of_x, of_y, of_dx, of_dy, k, **meta
            )
    return d_logits, d_ref
