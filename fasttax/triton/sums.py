"""One sweep over a row pair: the sums of csrc/math/kl_row.h, whatever the logits.

A program holds a step of entries in registers, and sums it in the frame of the row so far. Where an
entry stands far above that, the frame becomes the step's own maxima, the sums so far move there in
closed form (`moved`), and the step is summed again, from registers. So is one with a NaN, then with
0 * inf = 0, the row's first, and a last one that is not whole. No entry is read from memory twice,
and there is no loop but that over the row.

Every lane's terms are accurate by themselves: f(d) by a polynomial for |d| <= 3/4, where beyond the
terms of (e^ay - e^ax) + e^ax d cancel to a sixth at most.

A lane's sums travel as one tuple, in the order
    of a KL:           s, y, and b, a of policy_ref or c, back of ref_policy
    of both rows:      s, y, b, a, c, back, moment
    of the policy's:   s, moment
    of jsd:            those of jsd.py
    before renyi's second sweep: s, y, g
and `moment` in units of log 2. G is b - a, and back - c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttax.triton.frames import fall, moved, offset, raised, rises
from fasttax.triton.jsd import FARTHEST, mix_terms, refitted_mix
from fasttax.triton.rows import (
    ALONE,
    INF,
    JSD,
    POLICY_REF,
    REF_POLICY,
    STATS,
    cap_rows,
    frame_of,
    framed,
    is_short,
    tile_lanes,
    times,
    total,
)
from fasttax.triton.series import NEAR_GAP, UNIT_GAP, bregman_slope, bregman_slope_unit

# The threads of a program, each of which has a lane of every vector of a step.
LANES_OF_STEP = tl.constexpr(256)
# A lane's sum of a step beyond which one of its entries may stand so far above the frame that this
# is moved (frames.RAISED), and what makes that of frames.RAISED_OTHER.
CROWDED = tl.constexpr(64.0)
OTHER = tl.constexpr(2.0**-102)


@triton.jit
def widened(x):
    """In float32. Of bfloat16 by its bits: two instructions for two entries, not four."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_step(row, start, V, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """A step's vectors of a row, -inf where there is no entry."""
    ROWS: tl.constexpr = LANES if LANES < LANES_OF_STEP else LANES_OF_STEP
    vectors = ()
    for j in tl.static_range(LANES // ROWS):
        at = start + j * ROWS * WIDTH + tile_lanes(ROWS, WIDTH)
        if WHOLE:
            vector = tl.load(row + at)
        else:
            vector = tl.load(row + at, mask=at < V, other=-INF)
        vectors = vectors + (widened(vector),)
    return vectors


@triton.jit
def added(sums, more):
    """Two tuples, number by number."""
    both = ()
    for i in tl.static_range(len(sums)):
        both = both + (sums[i] + more[i],)
    return both


@triton.jit
def entries(xs, ys, j: tl.constexpr, start, V):
    """Vector j of a step, and which of its entries are there."""
    ROWS: tl.constexpr = xs[j].shape[0]
    WIDTH: tl.constexpr = xs[j].shape[1]
    live = start + j * ROWS * WIDTH + tile_lanes(ROWS, WIDTH) < V
    return xs[j], ys[j], live


@triton.jit
def vector_sums(ax, ay, d, k, OP: tl.constexpr, GUARDED: tl.constexpr, APPROX: tl.constexpr):
    """Of one vector."""
    if OP == JSD:
        return mix_terms(ax, ay, d, k, GUARDED, APPROX)
    else:
        return plain_terms(ax, ay, d, OP, GUARDED)


@triton.jit
def plain_terms(ax, ay, d, OP: tl.constexpr, GUARDED: tl.constexpr):
    """A vector's sums of every kind but jsd."""
    ex = tl.exp2(ax)
    s = tl.sum(ex, 1)
    if OP == ALONE:
        return s, tl.sum(ex * (tl.maximum(ax, -200.0) if GUARDED else ax), 1)
    else:
        ey = tl.exp2(ay)
        y = tl.sum(ey, 1)
        change = ey - ex
        if OP == STATS:  # whose both KLs have no register left for the shorter series' constants
            near = tl.abs(d) <= UNIT_GAP
            p = bregman_slope_unit(d)
        else:
            near = tl.abs(d) <= NEAR_GAP
            p = bregman_slope(d)
        if OP == REF_POLICY:
            # f(-d) e^-d = d^2 - f(d) (1 + d)
            pull = times(ey, d, GUARDED)
            c = tl.where(near, ex * (d * d) * (tl.fma(p, d, p) - 1), change + pull)
            return s, y, -tl.sum(c, 1), -tl.sum(pull, 1)
        else:
            square = ex * (d * d)
            if (OP != POLICY_REF) & (OP != STATS):
                return s, y, tl.sum(tl.where(near, tl.fma(square, p, -ex * d), change), 1)
            else:
                pull = times(ex, d, GUARDED)
                b = tl.sum(tl.where(near, square * p, change + pull), 1)
                a = tl.sum(pull, 1)
                if OP == POLICY_REF:
                    return s, y, b, a
                else:
                    pull = times(ey, d, GUARDED)
                    c = tl.where(near, square * (tl.fma(p, d, p) - 1), change + pull)
                    moment = tl.sum(ex * (tl.maximum(ax, -200.0) if GUARDED else ax), 1)
                    return s, y, b, a, -tl.sum(c, 1), -tl.sum(pull, 1), moment


@triton.jit
def with_peaks(sums, ax):
    """A vector's sums with e^ax of the entries at the frame itself counted apart: as last."""
    at_top = ax == 0
    beside = tl.sum(tl.where(at_top, 0.0, tl.exp2(ax)), 1)
    return with_first(sums, beside) + (tl.sum(at_top.to(tl.float32), 1),)


@triton.jit
def step_sums(
    xs,
    ys,
    start,
    V,
    frame,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    SHORT: tl.constexpr,
    GUARDED: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Of a step, in `frame`."""
    mx, my, shift = frame
    sums = ()
    for j in tl.static_range(len(xs)):
        x, y = xs[j], ys[j]
        live = True
        if GUARDED:
            x, y, live = entries(xs, ys, j, start, V)
        ax, ay, d = framed(
            x, y, live, frame_of(mx), frame_of(my), shift, k, GENERAL, INF_MASK, SHORT
        )
        more = vector_sums(ax, ay, d, k, OP, GUARDED, APPROX)
        if GUARDED and ((OP == STATS) or (OP == ALONE)):
            more = with_peaks(more, ax)
        if j == 0:
            sums = more
        else:
            sums = added(sums, more)
    return sums


@triton.jit
def step_maxima(xs, ys, start, V, k, GENERAL: tl.constexpr, INF_MASK: tl.constexpr):
    """Of both rows, -inf where there is nothing. NaN is passed over: it reaches the sums by exp."""
    top_x = -INF
    top_y = -INF
    for j in tl.static_range(len(xs)):
        x, y, live = entries(xs, ys, j, start, V)
        x, y = cap_rows(x, y, live, k, GENERAL, INF_MASK)
        top_x = tl.maximum(top_x, tl.max(x, 1))
        top_y = tl.maximum(top_y, tl.max(y, 1))
    return tl.max(top_x, 0), tl.max(top_y, 0)


@triton.jit
def zero_sums(OP: tl.constexpr, ROWS: tl.constexpr):
    """Sums of nothing."""
    COUNT: tl.constexpr = (
        2
        if OP == ALONE
        else 7
        if OP == STATS
        else 6
        if OP == JSD
        else 4
        if (OP == POLICY_REF) or (OP == REF_POLICY)
        else 3
    )
    return zeros(COUNT, ROWS)


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Of as many numbers a lane."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([ROWS], tl.float32),)
    return sums


@triton.jit
def crowd(part, OP: tl.constexpr):
    """The largest sum of a lane, of the other row's on its scale; infinite where there is a NaN."""
    most = part[0]
    check = part[1]
    if OP != ALONE:
        check = part[2]
        if OP == POLICY_REF:
            most = tl.maximum(part[0], part[1] * OTHER)
        elif OP == REF_POLICY:
            most = tl.maximum(part[0] * OTHER, part[1])
        else:
            most = tl.maximum(part[0], part[1])
        if OP == STATS:
            check += part[4]
    return tl.max(tl.where(check == check, most, INF), 0)


@triton.jit
def slow_step(
    xs,
    ys,
    start,
    V,
    sums,
    apart,
    frame,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    SHORT: tl.constexpr,
    APPROX: tl.constexpr,
):
    """A step in a frame that fits it, and the row so far there: part, sums, apart, frame."""
    ENTROPY: tl.constexpr = (OP == STATS) or (OP == ALONE)
    top_x, top_y = step_maxima(xs, ys, start, V, k, GENERAL, INF_MASK)
    to = raised(frame, top_x, top_y, k, OP)
    anew_x = to[0] != frame[0]
    anew = anew_x | (to[1] != frame[1])
    if OP == JSD:
        if anew:
            to = balanced(xs, ys, start, V, sums, frame, to, k, GENERAL, INF_MASK, SHORT)
    if anew & (start > 0):
        sums, apart = refitted(sums, apart, frame, to, k, OP)
    frame = to
    part = step_sums(xs, ys, start, V, frame, k, OP, GENERAL, INF_MASK, SHORT, True, APPROX)
    whole = part
    if ENTROPY:
        peaks, part = last_apart(part)
        whole = with_first(part, part[0] + peaks)
        if anew_x:
            apart = (apart[0] + tl.sum(peaks, 0), apart[1])
        else:
            part = whole
    if (OP == STATS) or (OP == POLICY_REF) or (OP == REF_POLICY):
        gap = 0.0
        if anew:
            gap = offset(whole, OP)
        if gap != 0:
            to = (frame[0], frame[1], frame[2] + gap)
            sums, apart = refitted(added(sums, part), apart, frame, to, k, OP)
            part = zero_sums(OP, part[0].shape[0])
            frame = to
    return part, sums, apart, frame


@triton.jit
def balanced(
    xs,
    ys,
    start,
    V,
    sums,
    frame,
    to,
    k,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    SHORT: tl.constexpr,
):
    """The frame `to` shifted so that both rows' masses up to the end of a step are alike."""
    up_x, up_y = rises(frame, to, k)
    mass = of_lanes(sums[0]) * fall(up_x)
    other = of_lanes(sums[1]) * fall(up_y)
    mx, my, shift = to
    for j in tl.static_range(len(xs)):
        x, y, live = entries(xs, ys, j, start, V)
        ax, ay, _ = framed(
            x, y, live, frame_of(mx), frame_of(my), shift, k, GENERAL, INF_MASK, SHORT
        )
        mass += of_lanes(tl.sum(tl.exp2(ax), 1))
        other += of_lanes(tl.sum(tl.exp2(ay), 1))
    gap = tl.log(mass / other).to(tl.float32)
    return mx, my, tl.where(tl.abs(gap) <= FARTHEST, shift + gap, shift)


@triton.jit
def refitted(sums, apart, frame, to, k, OP: tl.constexpr):
    """A row's sums moved into another frame: the lanes' and those apart."""
    so_far = with_lanes(apart, sums, OP)
    if OP == JSD:
        up_x, up_y = rises(frame, to, k)
        so_far, in_part, in_mean = refitted_mix(so_far, up_x, up_y, k)
        # of either mass, whichever has grown in the other's terms
        scale = tl.maximum(fall(up_x), fall(up_y))
        apart = (scale * apart[0] + in_part, scale * apart[1] + in_mean)
    else:
        so_far = moved(so_far, frame, to, k, OP)
    sums = spread(so_far, sums[0].shape[0])
    if (OP == STATS) or (OP == ALONE):
        apart = (so_far[0], so_far[len(so_far) - 1])
        sums = with_ends(sums, sums[0] * 0.0)
    return sums, apart


@triton.jit
def sweep(
    x_row,
    y_row,
    V,
    k,
    OP: tl.constexpr,
    GENERAL: tl.constexpr,
    INF_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    APPROX: tl.constexpr,
):
    """A row pair's sums, in float64, their frame: mx, my, shift; and, of jsd, what is in doubt."""
    PAIR: tl.constexpr = OP != ALONE
    SHORT: tl.constexpr = is_short(x_row, y_row)
    ROWS: tl.constexpr = LANES if LANES < LANES_OF_STEP else LANES_OF_STEP
    sums = zero_sums(OP, ROWS)
    nothing = tl.full((), 0.0, tl.float64)
    apart = (nothing, nothing)  # mass and moment that lanes would round; of jsd what is in doubt
    nowhere = tl.full((), -INF, tl.float32)
    frame = (nowhere, nowhere, tl.full((), 0.0, tl.float32))
    for start in range(0, V, LANES * WIDTH):
        whole = start + LANES * WIDTH <= V
        if whole:
            xs = load_step(x_row, start, V, True, LANES, WIDTH)
            ys = load_step(y_row, start, V, True, LANES, WIDTH) if PAIR else xs
        else:
            xs = load_step(x_row, start, V, False, LANES, WIDTH)
            ys = load_step(y_row, start, V, False, LANES, WIDTH) if PAIR else xs
        part = zero_sums(OP, ROWS)
        most = tl.full((), INF, tl.float32)
        if whole & (INF_MASK == 0) & (frame[0] != -INF) & (frame[1] != -INF):
            part = step_sums(
                xs, ys, start, V, frame, k, OP, GENERAL, INF_MASK, SHORT, False, APPROX
            )
            most = crowd(part, OP)
        if (most <= CROWDED) == 0:
            part, sums, apart, frame = slow_step(
                xs, ys, start, V, sums, apart, frame, k, OP, GENERAL, INF_MASK, SHORT, APPROX
            )
        sums = added(sums, part)
    frame = (frame_of(frame[0]), frame_of(frame[1]), frame[2])
    return with_lanes(apart, sums, OP), frame, apart


@triton.jit
def spread(sums, ROWS: tl.constexpr):
    """A row's sums, as those of lanes that are all alike."""
    lanes = ()
    for i in tl.static_range(len(sums)):
        lanes = lanes + (tl.zeros([ROWS], tl.float32) + (sums[i] / ROWS).to(tl.float32),)
    return lanes


@triton.jit
def with_lanes(apart, lanes, OP: tl.constexpr):
    """A row's sums, in float64, out of its lanes' and the mass and moment beside them."""
    sums = ()
    for i in tl.static_range(len(lanes)):
        of_all = of_lanes(lanes[i])
        if (OP == STATS) or (OP == ALONE):
            if i == 0:
                of_all += apart[0]
            if i == len(lanes) - 1:
                of_all += apart[1]
        sums = sums + (of_all,)
    return sums


@triton.jit
def of_lanes(lanes):
    """Their sum: 32 of them in float32, as the lanes' own sums are, and all in float64."""
    groups: tl.constexpr = lanes.shape[0] // 32
    return total(tl.sum(tl.reshape(lanes, [groups, 32]), 1))


@triton.jit
def with_ends(numbers, end):
    """A tuple with another first and last number."""
    out = (end,)
    for i in tl.static_range(1, len(numbers) - 1):
        out = out + (numbers[i],)
    return out + (end,)


@triton.jit
def last_apart(numbers):
    """The last number of a tuple, and the others."""
    others = ()
    for i in tl.static_range(len(numbers) - 1):
        others = others + (numbers[i],)
    return numbers[len(numbers) - 1], others


@triton.jit
def with_first(numbers, first):
    """A tuple with another first number."""
    out = (first,)
    for i in tl.static_range(1, len(numbers)):
        out = out + (numbers[i],)
    return out
