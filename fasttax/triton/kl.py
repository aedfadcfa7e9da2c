"""token_kl in Triton: one program a row forward, one a row and tile backward.

Both at once where the tokens' weights are known. The launches are in kl_launch.py.

A row's numbers travel as one tuple: mx, my, shift, inv_s, log_ratio, gap, ref_center, inv_s_ref.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttax import reference
from fasttax.reference.kl import RENYI as RENYI_KIND
from fasttax.triton.rows import (
    INF,
    LN2,
    LOG2E,
    POLICY_REF,
    REF_POLICY,
    SMALL_GAP,
    TOO_HIGH,
    TRUSTED,
    bend,
    bregman,
    divergence,
    first_frame,
    framed,
    jensen_gap,
    load_pair,
    log1p,
    row_at,
    row_sums,
    store,
    tile_lanes,
    total,
    true_frame,
    zero,
)

JSD, RENYI = tl.constexpr(reference.JSD), tl.constexpr(RENYI_KIND)


@triton.jit
def log_mix(u, beta):
    """log(m/p) of m = (1 - beta) p + beta q, without overflow on either side."""
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
def renyi_terms(ax, u, log_inv_s, beta):
    """The logs of p^a q^(1-a) at a tile's entries; -inf where p is 0."""
    return tl.where(ax == -INF, -INF, ax * LN2 + log_inv_s + (beta - 1) * u)


@triton.jit
def renyi_pass(
    x_row,
    y_row,
    V,
    frame,
    top,
    k,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a row: M = sum p^a q^(1-a) - 1, its largest term's log, and sum e^(log - top)."""
    mx, my, log_ratio, inv_s, inv_s_ref = frame
    m = tl.zeros([LANES], tl.float32)
    highest = tl.full([LANES], -INF, tl.float32)
    above = tl.zeros([LANES], tl.float32)
    SHORT: tl.constexpr = x_row.dtype.element_ty == tl.bfloat16
    c = 1 - k.beta
    log_inv_s = tl.log(inv_s)
    for start in range(0, V, LANES * WIDTH):
        x, y, live = load_pair(x_row, y_row, start + tile_lanes(LANES, WIDTH), V, True)
        ax, ay, d = framed(x, y, live, mx, my, 0.0, k, GENERAL, INF_MASK, SHORT)
        p = tl.exp2(ax) * inv_s
        q = tl.exp2(ay) * inv_s_ref
        u = d - log_ratio
        terms = renyi_terms(ax, u, log_inv_s, k.beta)
        cu = c * u
        near_q = tl.abs(u) <= SMALL_GAP
        near_w = tl.abs(cu) <= SMALL_GAP
        # q - p and p^a q^(1-a) - p, without their rounding errors where those are close to p
        to_q = tl.where(near_q, p * (bregman(u) - u), q - p)
        to_w = tl.where(near_w, p * (bregman(cu) - cu), tl.exp2(terms * LOG2E) - p)
        close = p * (bregman(cu) - c * bregman(u))
        m += tl.sum(tl.where(near_q & near_w, close, to_w - c * to_q), 1)
        highest = tl.maximum(highest, tl.max(terms, 1))
        above += tl.sum(tl.exp2((terms - top) * LOG2E), 1)
    return total(m), tl.max(highest, 0), total(above)


@triton.jit
def renyi_log_sum(
    x_row,
    y_row,
    V,
    frame,
    k,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The log of sum p^a q^(1-a) of a row whose sums are known, NaN for a NaN row."""
    m, highest, above = renyi_pass(x_row, y_row, V, frame, 0.0, k, GENERAL, INF_MASK, LANES, WIDTH)
    log_sum = log1p(m)
    if (m > 1e30) | (m < -0.9):
        # too large for float32, or a rest of 1 that has lost its digits: from the largest term
        log_sum = highest.to(tl.float64)
        if tl.abs(highest) < INF:
            m, highest, above = renyi_pass(
                x_row, y_row, V, frame, highest, k, GENERAL, INF_MASK, LANES, WIDTH
            )
            log_sum += tl.log(above)
    return log_sum


@triton.jit
def slopes(ax, ay, d, row, k, OP: tl.constexpr):
    """D KL / d (tempered logits) of both models; the formulas of csrc/math/kl_slope.h."""
    p = tl.exp2(ax) * row[3]
    q = tl.exp2(ay) * row[7]
    log_ratio = row[4]
    gap = row[5]
    ref_center = row[6]
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
    if OP == RENYI:  # gap: log sum p^a q^(1-a)
        w = tl.exp2((renyi_terms(ax, u, tl.log(row[3]), k.beta) - gap) * LOG2E)
        from_p = (k.beta - 1) * u - gap
        from_q = k.beta * u - gap
        near_p = tl.abs(from_p) <= SMALL_GAP
        near_q = tl.abs(from_q) <= SMALL_GAP
        dx = tl.where(near_p, p * (bregman(-from_p) + from_p), w - p) * (k.beta / (k.beta - 1))
        dy = tl.where(near_q, -q * (bregman(-from_q) + from_q), q - w)
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
    """A row's value, and the numbers of csrc/math/kl.h, KlRow, that its gradient takes."""
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
        elif ((OP == POLICY_REF) | (OP == REF_POLICY)) & recentre & (shift == 0):
            # frames that do not fit: moved onto the mean gap, the value keeps its digits
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
    if OP == RENYI:
        frame = (mx, my, log_ratio.to(tl.float32), inv_s, inv_s_ref)
        gap = renyi_log_sum(x_row, y_row, V, frame, k, GENERAL, INF_MASK, LANES, WIDTH)
        value = gap / (k.beta - 1)
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
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
):
    """The gradients of g * value by raw logits, at the entries `at` of a row."""
    SHORT: tl.constexpr = x_row.dtype.element_ty == tl.bfloat16
    x, y, live = load_pair(x_row, y_row, at, V, True)
    ax, ay, d = framed(x, y, live, row[0], row[1], row[2], k, GENERAL, INF_MASK, SHORT)
    dx, dy = slopes(ax, ay, d, row, k, OP)
    dx = dx * (g * k.row_slope)
    dy = dy * (g * k.ref_row_slope)
    if GENERAL:
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
        x_row = row_at(x_ptr, x_layout, n)
        y_row = row_at(y_ptr, y_layout, n)
        value, row = forward_row(x_row, y_row, V, k, OP, GENERAL, INF_MASK, LANES, WIDTH)
        tl.store(value_ptr + n, value)
        if GRADIENT:
            g = tl.load(weight_ptr + n)
            dx_row = row_at(dx_ptr, dx_layout, n)
            for back in range(0, tiles):
                at = (tiles - 1 - back) * (LANES * WIDTH) + tile_lanes(LANES, WIDTH)
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
                    GENERAL,
                    INF_MASK,
                )
        else:
            store(saved_ptr + n.to(tl.int64) * 8, 1, row, 8)
    else:
        tl.store(value_ptr + n, 0.0)
        if GRADIENT:
            dx_row = row_at(dx_ptr, dx_layout, n)
            for tile in range(0, tiles):
                zero(dx_row, tile * (LANES * WIDTH) + tile_lanes(LANES, WIDTH), V)
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
            GENERAL,
            INF_MASK,
        )
    else:
        if WANT_X:
            zero(dx_row, at, V)
        if WANT_Y:
            zero(dy_row, at, V)
