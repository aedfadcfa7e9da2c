"""token_kl in Triton: one program a row forward, one a row and tile backward.

Both at once where the tokens' weights are known. The launches are in kl_launch.py.

A row's numbers travel as one tuple: mx, my, shift, inv_s, log_ratio, gap, ref_center, inv_s_ref.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttax.triton.caps import framed_capped, through_cap
from fasttax.triton.frames import divergence, log_ratio_of
from fasttax.triton.jsd import doubtful, mix_slopes, mix_sums_again, refitted_mix
from fasttax.triton.rows import (
    CAPPED,
    GENERAL,
    GRADIENT_ENTRIES,
    INF,
    JSD,
    LN2,
    LOG2E,
    POLICY_REF,
    REF_POLICY,
    RENYI,
    SMALL_GAP,
    TRUSTED,
    bend,
    framed,
    is_short,
    load_pair,
    log1p,
    row_at,
    store,
    tile_lanes,
    total,
    zero,
)
from fasttax.triton.series import bregman
from fasttax.triton.sums import LANES_OF_STEP, sweep
from fasttax.triton.tuples import added, zeros

MOST = tl.constexpr(3e38)  # a weight's log that float32 has no larger one of


@triton.jit
def inverse(mass):
    """As a row keeps it."""
    return (1.0 / mass).to(tl.float32)


@triton.jit
def jsd_row(
    x_row,
    y_row,
    V,
    sums,
    frame,
    apart,
    k,
    FRAME: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    APPROX: tl.constexpr,
):
    """A row's value; KL(p||m) and KL(q||m) in units of log 2; log(s / y), s, y and its shift."""
    mx, my, shift = frame
    s = sums[0]
    log_ratio = tl.log(s / sums[1])
    whole, in_part, in_mean = refitted_mix(sums, log_ratio * 0.0, -log_ratio, k)
    value = whole[2] / s
    of_p = -whole[3] / s
    of_q = (whole[2] + k.beta_rest * whole[3]) / s / k.mixed_beta
    y = sums[1]
    if doubtful(sums, whole, in_part + apart[0], in_mean + apart[1], k):
        y *= tl.exp(-shift.to(tl.float64))  # peaks of both rows have a mass of 1 again
        shift *= 0.0
        log_ratio = tl.log(s / y)
        even = inverse(s) / inverse(y)
        ROWS: tl.constexpr = LANES if LANES < LANES_OF_STEP else LANES_OF_STEP
        lanes = zeros(5, ROWS)
        SHORT: tl.constexpr = is_short(x_row, y_row)
        for start in range(0, V, ROWS * WIDTH):
            x, other, live = load_pair(x_row, y_row, start + tile_lanes(ROWS, WIDTH), V, True)
            ax, ay, d = framed(x, other, live, mx, my, shift, k, FRAME, INF_MASK, SHORT)
            u = d - log_ratio.to(tl.float32)
            lanes = added(lanes, mix_sums_again(ax, ay, u, even, tl.log2(even), k, APPROX))
        mass = total(lanes[0])
        value = total(lanes[2]) / mass
        of_p = -total(lanes[3]) / mass
        of_q = -total(lanes[4]) / total(lanes[1])
    return value * LN2, of_p, of_q, log_ratio, s, y, shift


@triton.jit
def renyi_log_weight(log_p, log_q, a):
    """The logs of p^a q^(1-a), within float32; the lowest where p is 0.

    By explicit fused steps: the largest one has the same bits in both sweeps.
    """
    log_w = tl.fma(a, log_p, (1 - a) * log_q)
    log_w = tl.where((log_p == -INF) | (log_w < -MOST), -MOST, log_w)
    return tl.where(log_w > MOST, MOST, log_w)


@triton.jit
def renyi_sums(
    x_row,
    y_row,
    V,
    frame,
    k,
    FRAME: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a row: M = sum p^a q^(1-a) - 1, its largest term's log, and all terms over that one."""
    mx, my, log_ratio, inv_s, inv_s_ref = frame
    m = tl.zeros([LANES], tl.float32)
    highest = tl.full([LANES], -MOST, tl.float32)
    above = tl.zeros([LANES], tl.float32)
    SHORT: tl.constexpr = is_short(x_row, y_row)
    c = 1 - k.beta
    log_inv_s = tl.log(inv_s)
    log_inv_s_ref = tl.log(inv_s_ref)
    for start in range(0, V, LANES * WIDTH):
        x, y, live = load_pair(x_row, y_row, start + tile_lanes(LANES, WIDTH), V, True)
        ax, ay, d = framed(x, y, live, mx, my, 0.0, k, FRAME, INF_MASK, SHORT)
        p = tl.exp2(ax) * inv_s
        q = tl.exp2(ay) * inv_s_ref
        u = d - log_ratio
        log_p = tl.fma(ax, LN2, log_inv_s)
        terms = renyi_log_weight(log_p, tl.fma(ay, LN2, log_inv_s_ref), k.beta)
        cu = c * u
        au = k.beta * u
        near_w = tl.abs(cu) <= SMALL_GAP
        # by p, which has more digits, or far above it by its logarithm; beyond e^80 rows are apart
        by_gap = cu >= -8
        w = tl.exp2(tl.where(by_gap, -cu, tl.minimum(terms, 80.0)) * LOG2E)
        w = tl.where(by_gap, p * w, w)
        # w = p^a q^(1-a): w - p and w - q by the series leave digits where a is near 1 or 0
        from_p = tl.where(near_w, p * (bregman(cu) - cu), w - p)
        by_p = from_p - c * (q - p)
        by_q = q * (bregman(-au) + au) - k.beta * (p - q)
        apart = tl.where(tl.abs(au) <= SMALL_GAP, by_q, by_p)
        close = p * (bregman(cu) - c * bregman(u))
        part = tl.where(near_w & (tl.abs(u) <= SMALL_GAP), close, apart)
        m += tl.sum(part, 1)
        top = tl.maximum(highest, tl.max(terms, 1))
        terms = tl.exp2((terms - tl.expand_dims(top, 1)) * LOG2E)
        above = above * tl.exp2((highest - top) * LOG2E) + tl.sum(terms, 1)
        highest = top
    top = tl.max(highest, 0)
    return total(m), top, total(above * tl.exp2((highest - top) * LOG2E))


@triton.jit
def renyi_finish(m, highest, above, a):
    """A row's value, and log(1 + M) in two parts: the rest, and the largest weight's log.

    Of rows that are close they are all of it, and 0.
    """
    rest = tl.log(above)
    log_all = highest + rest
    value = log_all / (a - 1)
    largest = highest.to(tl.float64)
    if tl.abs(log_all) <= 0.4:
        rest = log1p(m)
        value = rest / (a - 1)
        largest = rest * 0.0
    if tl.abs(highest) >= MOST:  # every weight is 0, or one is infinite
        value = tl.where(highest > 0, INF, -INF).to(tl.float64) / (a - 1)
        rest = rest * 0.0
        largest = tl.where(highest > 0, INF, -INF).to(tl.float64)
    nan = m * 0.0 + above * 0.0
    nan = tl.where(nan == nan, 0.0, nan)
    return value + nan, rest + nan, largest


@triton.jit
def renyi_slopes(ax, ay, p, q, u, row, a):
    """As KlFormula<kRenyi>::slope in csrc/math/kl_slope.h."""
    rest = row[5]
    largest = row[6]
    log_p = tl.fma(ax, LN2, tl.log(row[3]))
    log_q = tl.fma(ay, LN2, tl.log(row[7]))
    log_w = (renyi_log_weight(log_p, log_q, a) - largest) - rest
    by_u = (largest == 0) & (tl.abs(rest) <= 0.5)  # close rows: u has more digits than the logs
    from_p = tl.where(by_u, (1 - a) * u + rest, log_p - log_w)
    from_q = tl.where(by_u, rest - a * u, log_q - log_w)
    near_p = tl.abs(from_p) <= SMALL_GAP
    near_q = tl.abs(from_q) <= SMALL_GAP
    by_gap = tl.where(by_u, from_p, -MOST) >= -8
    w = tl.exp2(tl.where(by_gap, -from_p, log_w) * LOG2E)
    w = tl.where(by_gap, p * w, w)
    dy = tl.where(near_q, -q * (bregman(from_q) - from_q), q - w)
    w = tl.where(near_q, q - dy, w)
    dx = tl.where(near_p, p * (bregman(from_p) - from_p), w - p) * (a / (a - 1))
    return dx, dy


@triton.jit
def slopes(ax, ay, d, row, k, OP: tl.constexpr, APPROX: tl.constexpr):
    """D KL / d (tempered logits) of both models; the formulas of csrc/math/kl_slope.h."""
    p = tl.exp2(ax) * row[3]
    q = tl.exp2(ay) * row[7]
    log_ratio = row[4]
    gap = row[5]
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
        dx, dy = mix_slopes(ax, ay, u, row, k, APPROX)
    if OP == RENYI:
        dx, dy = renyi_slopes(ax, ay, p, q, u, row, k.beta)
    return dx, dy


@triton.jit
def forward_row(
    x_row,
    y_row,
    V,
    k,
    OP: tl.constexpr,
    FRAME: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    APPROX: tl.constexpr,
):
    """A row's value, and the numbers of csrc/math/kl.h, KlRow, that its gradient takes."""
    sums, frame, apart = sweep(x_row, y_row, V, k, OP, FRAME, INF_MASK, LANES, WIDTH, APPROX)
    mx, my, shift = frame
    s = sums[0]
    y = sums[1]
    ref_center = tl.full((), 0.0, tl.float64)
    if OP == POLICY_REF:
        value, gap, log_ratio = divergence(s, y, sums[2], sums[3], True)
    elif OP == REF_POLICY:
        value, gap, log_ratio = divergence(s, y, sums[2], sums[3], False)
    elif OP == JSD:
        value, gap, ref_center, log_ratio, s, y, shift = jsd_row(
            x_row, y_row, V, sums, frame, apart, k, FRAME, INF_MASK, LANES, WIDTH, APPROX
        )
        if (k.beta <= 0) | (k.beta >= 1):
            value = (s + y) * 0.0  # 0, or NaN for a NaN row
    else:
        log_ratio = log_ratio_of(s, y, sums[2])
        value = s
        gap = s
    inv_s = inverse(s)
    inv_s_ref = inverse(y)
    if OP == RENYI:
        frame = (mx, my, log_ratio.to(tl.float32), inv_s, inv_s_ref)
        m, highest, above = renyi_sums(x_row, y_row, V, frame, k, FRAME, INF_MASK, LANES, WIDTH)
        value, gap, ref_center = renyi_finish(m, highest, above, k.beta)
    value = tl.where(value < 0, 0.0, value)  # NaN passes through
    row = (
        mx,
        my,
        shift,
        inv_s,
        log_ratio.to(tl.float32),
        gap.to(tl.float32),
        ref_center.to(tl.float32),
        inv_s_ref,
    )
    return value.to(tl.float32), row


@triton.jit
def write_gradients(
    x_row,
    y_row,
    dx_row,
    dy_row,
    at,
    V,
    row,
    g,
    k,
    OP: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_Y: tl.constexpr,
    FRAME: tl.constexpr,
    INF_MASK: tl.constexpr,
    APPROX: tl.constexpr,
):
    """The gradients of g * value by raw logits, at the entries `at` of a row."""
    SHORT: tl.constexpr = is_short(x_row, y_row)
    x, y, live = load_pair(x_row, y_row, at, V, True)
    if FRAME == CAPPED:
        ax, ay, d, r, gap = framed_capped(x, y, row[0], row[1], row[2], k, False, True, APPROX)
    else:
        ax, ay, d = framed(x, y, live, row[0], row[1], row[2], k, FRAME, INF_MASK, SHORT)
    dx, dy = slopes(ax, ay, d, row, k, OP, APPROX)
    dx = dx * (g * k.row_slope)
    dy = dy * (g * k.ref_row_slope)
    if FRAME == CAPPED:
        dx = through_cap(r, dx)
        dy = through_cap(r + gap, dy)
    elif FRAME == GENERAL:
        if WANT_X:
            dx = tl.where(k.cap > 0, dx * bend(x, k.over_cap), dx)
        if WANT_Y:
            dy = tl.where(k.ref_cap > 0, dy * bend(y, k.ref_over_cap), dy)
    if WANT_X:
        tl.store(dx_row + at, dx.to(dx_row.dtype.element_ty), mask=live)
    if WANT_Y:
        tl.store(dy_row + at, dy.to(dy_row.dtype.element_ty), mask=live)


@triton.jit
def load_saved(saved):
    """A row's numbers, as `forward_row` gives them."""
    return (
        tl.load(saved),
        tl.load(saved + 1),
        tl.load(saved + 2),
        tl.load(saved + 3),
        tl.load(saved + 4),
        tl.load(saved + 5),
        tl.load(saved + 6),
        tl.load(saved + 7),
    )


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    value_ptr,
    saved_ptr,
    weight_ptr,
    dx_ptr,
    V,
    x_layout,
    y_layout,
    dx_layout,
    k,
    OP: tl.constexpr,
    FRAME: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    APPROX: tl.constexpr,
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
    BACK: tl.constexpr = GRADIENT_ENTRIES // WIDTH
    LANES_BACK: tl.constexpr = LANES if LANES < BACK else BACK
    tiles = tl.cdiv(V, LANES_BACK * WIDTH)
    if live_row:
        x_row = row_at(x_ptr, x_layout, n)
        y_row = row_at(y_ptr, y_layout, n)
        value, row = forward_row(x_row, y_row, V, k, OP, FRAME, INF_MASK, LANES, WIDTH, APPROX)
        tl.store(value_ptr + n, value)
        if GRADIENT:
            g = tl.load(weight_ptr + n)
            dx_row = row_at(dx_ptr, dx_layout, n)
            for back in range(0, tiles):
                at = (tiles - 1 - back) * (LANES_BACK * WIDTH) + tile_lanes(LANES_BACK, WIDTH)
                write_gradients(
                    x_row,
                    y_row,
                    dx_row,
                    dx_row,
                    at,
                    V,
                    row,
                    g,
                    k,
                    OP,
                    True,
                    False,
                    FRAME,
                    INF_MASK,
                    APPROX,
                )
        else:
            store(saved_ptr + n.to(tl.int64) * 8, 1, row, 8)
    else:
        tl.store(value_ptr + n, 0.0)
        if GRADIENT:
            dx_row = row_at(dx_ptr, dx_layout, n)
            for tile in range(0, tiles):
                zero(dx_row, tile * (LANES_BACK * WIDTH) + tile_lanes(LANES_BACK, WIDTH), V)
        else:
            tl.store(saved_ptr + n.to(tl.int64) * 8 + tl.arange(0, 8), tl.zeros([8], tl.float32))


@triton.jit
def gradient_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    saved_ptr,
    upstream_ptr,
    dx_ptr,
    dy_ptr,
    V,
    x_layout,
    y_layout,
    dx_layout,
    dy_layout,
    k,
    OP: tl.constexpr,
    FRAME: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Grid: (rows, tiles). dx may be the policy's logits themselves."""
    n = tl.program_id(0)
    at = tl.program_id(1) * (LANES * WIDTH) + tile_lanes(LANES, WIDTH)
    WANT_X: tl.constexpr = dx_ptr is not None
    WANT_Y: tl.constexpr = dy_ptr is not None
    x_row = row_at(x_ptr, x_layout, n)
    dx_row = x_row
    dy_row = x_row
    if WANT_X:
        dx_row = row_at(dx_ptr, dx_layout, n)
    if WANT_Y:
        dy_row = row_at(dy_ptr, dy_layout, n)
    live_row = True
    if mask_ptr is not None:
        live_row = tl.load(mask_ptr + n) != 0
    if live_row:
        g = tl.load(upstream_ptr + n)
        row = load_saved(saved_ptr + n.to(tl.int64) * 8)
        write_gradients(
            x_row,
            row_at(y_ptr, y_layout, n),
            dx_row,
            dy_row,
            at,
            V,
            row,
            g,
            k,
            OP,
            WANT_X,
            WANT_Y,
            FRAME,
            INF_MASK,
            APPROX,
        )
    else:
        if WANT_X:
            zero(dx_row, at, V)
        if WANT_Y:
            zero(dy_row, at, V)
