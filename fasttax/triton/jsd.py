"""Jensen-Shannon in one sweep: an entry's terms, how they move with a row's masses, its gradient.

With w = 1 - beta, an entry's masses P and Q in a frame, M = w P + beta Q and u = log(P / Q)
    L(u) = log(M / P)        P J(u) = -M L - beta Q u >= 0        s = beta Q / M
and JSD = sum P J / sum P where sum P = sum Q (csrc/math/kl_jsd.h). A frame's shift makes the masses
of what has been seen equal; the factor e^eps on Q that is left at the row's end changes
    L by l = log(1 + s (e^eps - 1))
    P J by (e^eps - 1) (P J + w P L) + w P [e^eps (eps - l) s / (1 - s) - l],
functions of s alone but for sums that are there. Over a row they are taken at two nodes of the
mass, mean and variance of s under P, which sum P s and sum P s^2 give. The third cumulant of s
enters at eps^3 in L and eps^4 in J. Where that could show, `doubtful`, the row is swept again in
the frame it has come to.

Sums, as sums.py holds them, in units of log 2 where there is a logarithm:
    P, Q, P J, P L, P s / beta, P s^2 / beta^2
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttax.triton.curves import REACH
from fasttax.triton.frames import fall
from fasttax.triton.rows import LN2, LOG2E, times

NEAR = tl.constexpr(REACH)
LEAST = tl.constexpr(1.1754943508222875e-38)  # a normal float32
# what the third cumulant may be thought to add: of a row's value, and of P L to its mass
DOUBT, DOUBT_MEAN = tl.constexpr(1e-5), tl.constexpr(1e-5)
HIDES = tl.constexpr(16.0)  # how many times its value a row's sum may be before it moves
LOPSIDED = tl.constexpr(8.0)
FARTHEST = tl.constexpr(60.0)  # the largest gap of the masses that a frame is moved by
NARROW = tl.constexpr(1.0)  # and up to which two nodes stand for all entries


@triton.jit
def log2(v, APPROX: tl.constexpr):
    """APPROX: by NVIDIA's own instruction, 2^-22 near 1 and of the result elsewhere."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(v)


@triton.jit
def log_mix_near(u, k):
    """L(u) of a small u, in units of log 2."""
    p = tl.fma(u, k.mix_4, k.mix_3)
    p = tl.fma(p, u, k.mix_2)
    p = tl.fma(p, u, k.mix_1)
    return tl.fma(p, u, k.mix_0) * u


@triton.jit
def part_near(u, k):
    """J(u) of a small u, in units of log 2."""
    p = tl.fma(u, k.part_4, k.part_3)
    p = tl.fma(p, u, k.part_2)
    p = tl.fma(p, u, k.part_1)
    return tl.fma(p, u, k.part_0) * (u * u)


@triton.jit
def mixture(ex, ey, to_p, k, APPROX: tl.constexpr):
    """M = to_p P + beta Q, never 0, and its logarithm, of base 2."""
    mix = tl.fma(ey, k.mixed_beta, tl.fma(ex, to_p, LEAST))
    return mix, log2(mix, APPROX)


@triton.jit
def mix_terms(ax, ay, u, k, GUARDED: tl.constexpr, APPROX: tl.constexpr):
    """A vector's sums."""
    ex = tl.exp2(ax)
    ey = tl.exp2(ay)
    mix, log_m = mixture(ex, ey, k.beta_rest, k, APPROX)
    share = tl.exp2(ay - log_m)
    far_l = log_m - ax
    if GUARDED:
        of_p = times(ex * k.beta_rest, far_l, True)
        far = -(of_p + times(ey * k.mixed_beta, log_m - ay, True))
    else:
        far = -tl.fma(mix, far_l, ey * (u * (k.mixed_beta * LOG2E)))
    near = tl.abs(u) <= NEAR
    part = tl.where(near, ex * part_near(u, k), far)
    log_mix = tl.where(near, log_mix_near(u, k), far_l)
    pull = ex * share
    return (
        tl.sum(ex, 1),
        tl.sum(ey, 1),
        tl.sum(part, 1),
        tl.sum(times(ex, log_mix, GUARDED), 1),
        tl.sum(pull, 1),
        tl.sum(pull * share, 1),
    )


@triton.jit
def mix_sums_again(ax, ay, u, even, log_even, k, APPROX: tl.constexpr):
    """A vector's P, Q, P J, P L and Q (L + u) by the steps of mix_slopes.

    Q / even has P's mass. Of a row that is one entry, at its frame, the mean L is that entry's to
    the bit, and its gradient 0.
    """
    over_p, over_q = log_ratios(ax, ay, u, k.beta_rest * even, log_even, k, APPROX)
    ex = tl.exp2(ax)
    ey = tl.exp2(ay)
    of_p = times(ex, over_p, True)
    of_q = times(ey, over_q, True)
    far = -(k.beta_rest * of_p + (k.mixed_beta / even) * of_q)
    part = tl.where(tl.abs(u) <= NEAR, ex * part_near(u, k), far)
    return tl.sum(ex, 1), tl.sum(ey, 1), tl.sum(part, 1), tl.sum(of_p, 1), tl.sum(of_q, 1)


@triton.jit
def log_ratios(ax, ay, u, to_p, log_even, k, APPROX: tl.constexpr):
    """L and L + u, in units of log 2, where M = to_p P + beta Q and to_p has 2^log_even in it.

    An entry beyond -200 has no mass, and -inf no finite logarithm.
    """
    _, log_m = mixture(tl.exp2(ax), tl.exp2(ay), to_p, k, APPROX)
    near = tl.abs(u) <= NEAR
    near_p = log_mix_near(u, k)
    far_p = (log_m - tl.maximum(ax, -200.0)) - log_even
    far_q = log_m - tl.maximum(ay, -200.0)
    return tl.where(near, near_p, far_p), tl.where(near, tl.fma(u, LOG2E, near_p), far_q)


@triton.jit
def expm1_wide(t):
    """e^t - 1 of a float64."""
    series = t * (
        1 + t * (0.5 + t * (1.0 / 6 + t * (1.0 / 24 + t * (1.0 / 120 + t * (1.0 / 720)))))
    )
    return tl.where(tl.abs(t) < 1e-2, series, tl.exp(t) - 1)


@triton.jit
def node(s, eps, rise):
    """At one s: how L and P J / (w P) change, and what s becomes."""
    s = tl.minimum(s, 1 - 1e-9)
    l = tl.log(1 + s * rise)
    return l, (s / (1 - s)) * (eps - l) * (1 + rise) - l, s * (1 + rise) / (1 + s * rise)


@triton.jit
def within(v, low, high):
    """The number between two; NaN passes through."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def refitted_mix(sums, up_x, up_y, k):
    """Sums in a frame that has risen so far for P and for Q; what is in doubt of P J and of P L.

    Beyond an e^eps of e those may be anything that the masses allow: what float32 rounded off P L,
    or a share of 0 that is none, would grow by it.
    """
    s, y, part, log_mix, pull, square = sums
    eps = up_x - up_y
    scale = fall(up_x)
    far = tl.abs(eps) > FARTHEST
    eps = within(eps, -FARTHEST, FARTHEST)
    rise = expm1_wide(eps)
    beta = k.mixed_beta
    mean = pull / s * beta
    variance = tl.maximum(square / s * beta * beta - mean * mean, 0.0)
    root = tl.sqrt(variance)
    inside = (root < mean) & (root + mean < 1)
    # else one node at 0, where nothing changes
    weight = tl.where(inside, 0.5, mean * mean / (variance + mean * mean))
    high = tl.where(inside, mean + root, square / pull * beta)
    low = tl.where(inside, mean - root, 0.0)
    high_l, high_j, high_s = node(high, eps, rise)
    low_l, low_j, low_s = node(low, eps, rise)
    by_l = weight * high_l + (1 - weight) * low_l
    by_j = weight * high_j + (1 - weight) * low_j
    over = k.beta_rest * (s * LOG2E)
    to_pull = s / beta
    to_square = to_pull / beta
    still = (eps == 0) | (pull == 0)
    mass = scale * s
    other = tl.where(far, y * fall(up_y), scale * (y * (1 + rise)))
    # -log w of P and -log beta of Q are the most; and log M / P <= beta (Q / P - 1)
    none = tl.full((), 0.0, tl.float64)
    most_p = -(mass * tl.log(none + k.beta_rest) * LOG2E)
    most_part = k.beta_rest * most_p - beta * other * (tl.log(none + beta) * LOG2E)
    most_mean = beta * other * LOG2E
    part += rise * (part + k.beta_rest * log_mix) + tl.where(still, 0.0, over * by_j)
    log_mix = tl.where(still, log_mix, log_mix + (s * LOG2E) * by_l)
    by_square = weight * high_s * high_s + (1 - weight) * low_s * low_s
    moved = (
        mass,
        other,
        within(scale * part, 0.0, most_part),
        within(scale * log_mix, -most_p, most_mean),
        scale * tl.where(still, pull, to_pull * (weight * high_s + (1 - weight) * low_s)),
        scale * tl.where(still, square, to_square * by_square),
    )
    wide = tl.abs(eps) > NARROW
    cube = tl.where(still, 0.0, tl.abs(eps * eps * eps) * (variance * mass))
    in_part = tl.where(wide, most_part, cube * (tl.abs(eps) * root))
    return moved, in_part, tl.where(wide, most_p + most_mean, cube)


@triton.jit
def doubtful(before, sums, in_part, in_mean, k):
    """Whether a row is to be swept again, of its sums before they moved at last and after.

    So is one of whose two rows either is nearly one entry that the other has not: there a gradient
    is what the mean of L leaves of L.
    """
    s, y, part, log_mix, pull, square = sums
    lost = before[2] > tl.maximum(part, 0.0) * HIDES
    lost = lost | (in_part > part * (DOUBT * LN2)) | (in_mean > s * DOUBT_MEAN)
    beta = k.mixed_beta
    of_p = pull / s * beta  # the means of s under P, of 1 - s under Q
    of_q = pull / y * k.beta_rest
    spread_p = tl.maximum(square / s * beta * beta - of_p * of_p, 0.0)
    spread_q = tl.maximum((pull - square * beta) / y * k.beta_rest - of_q * of_q, 0.0)
    mean_p = -log_mix / s
    mean_q = (part + k.beta_rest * log_mix) / y / beta
    return lost | lopsided(mean_p, spread_p) | lopsided(mean_q, spread_q)


@triton.jit
def lopsided(mean, spread):
    """Whether a mean logarithm is far more than what its share of the mixture varies by."""
    return mean > tl.sqrt(spread) * LOPSIDED + 1e-3


@triton.jit
def mix_slopes(ax, ay, u, row, k, APPROX: tl.constexpr):
    """D JSD / d (tempered logits) of both models, of the row's numbers as kl.py has them.

    x: w p (-L - KL(p||m))        y: beta q (-L - u - KL(q||m))
    """
    live = tl.where((k.beta > 0) & (k.beta < 1), -LN2, 0.0)
    to_x = live * k.beta_rest * row[3]
    to_y = live * k.beta * row[7]
    # Q times s / y has the mass of P: its inverse goes to P
    even = row[3] / row[7]
    over_p, over_q = log_ratios(ax, ay, u, k.beta_rest * even, tl.log2(even), k, APPROX)
    return tl.exp2(ax) * to_x * (over_p + row[5]), tl.exp2(ay) * to_y * (over_q + row[6])
