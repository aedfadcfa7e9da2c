"""What the Triton kernels over logits share: layouts, launch geometry, frames.

The formulas are those of csrc/math/kl.h.

A program owns a row. Tiles are (LANES, WIDTH), WIDTH being 16 bytes of entries, so that a tile's
loads are 128 bits wide and its sum along WIDTH stays within a thread; lanes are added up once a
row, in float64. LANES and WIDTH depend on the dtype and on V alone: what a row gives does not
depend on the batch around it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax import reference
from fasttax.reference.kl import RENYI as RENYI_KIND
from fasttax.triton.curves import TERMS, curves

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SMALL_GAP = tl.constexpr(0.25)  # |d| up to which the series is used, as in csrc/math/kl.h
TRUSTED = tl.constexpr(1e-2)  # csrc/math/kl_row.h
INF = tl.constexpr(float("inf"))
# The shift of rows whose peaks lie apart, whatever their frames are: each is centred first, for the
# difference of entries so far apart would be rounded once more.
APART = tl.constexpr(1e-30)

# what a forward gives: a kind of token_kl, which has its own number, or token_stats of both rows or
# of the policy's alone, which are numbered apart
POLICY_REF, REF_POLICY = tl.constexpr(reference.POLICY_REF), tl.constexpr(reference.REF_POLICY)
JSD, RENYI = tl.constexpr(reference.JSD), tl.constexpr(RENYI_KIND)
STATS, ALONE = tl.constexpr(-1), tl.constexpr(-2)

THREADS = 256
REGISTERS = 128  # a thread: two programs on an SM
GRADIENT_ENTRIES = tl.constexpr(16 * THREADS)  # the most in a gradient's tile


class Params(NamedTuple):
    """Numbers of a call, as csrc/math has them.

    `row_scale` from frame units to tempered logits, `row_slope` d tempered / d raw.
    """

    beta: float
    cap: float
    ref_cap: float
    over_cap: float  # what raw logits are multiplied by inside tanh; 0 without a softcap
    ref_over_cap: float
    row_scale: float
    ref_row_scale: float
    row_slope: float
    ref_row_slope: float
    # jsd's alone: a beta between 0 and 1, 1 - beta, and the polynomials of curves.py
    mixed_beta: float
    beta_rest: float
    mix_0: float
    mix_1: float
    mix_2: float
    mix_3: float
    mix_4: float
    part_0: float
    part_1: float
    part_2: float
    part_3: float
    part_4: float


class Layout(NamedTuple):
    """Where rows lie: that of n at (n // inner) * outer_stride + (n % inner) * stride."""

    inner: int
    outer_stride: int
    stride: int


def narrower(logits: Tensor, ref_logits: Tensor) -> torch.dtype:
    """The dtype whose vectors have more entries: a tile is both rows'."""
    return min(logits.dtype, ref_logits.dtype, key=lambda dtype: dtype.itemsize)


def geometry(V: int, dtype: torch.dtype, op: int, general: bool) -> dict[str, int]:
    """LANES and WIDTH.

    Of either row a thread starts four 16-byte loads before it needs the first (two for token_stats
    and the kinds of two sweeps, one in the general frame: what the registers of two programs on an
    SM allow), 64 KB an SM. Shorter rows, shorter tiles; a V that 16 does not divide loads entry by
    entry.
    """
    vectors = 2
    if general:
        vectors = 1
    elif op in (POLICY_REF.value, REF_POLICY.value):
        vectors = 4
    width = 16 // dtype.itemsize if V % 16 == 0 else 1
    most = THREADS * vectors * (1 if width > 1 else 2)
    return {
        "LANES": max(32, min(most, triton.next_power_of_2(triton.cdiv(V, width)))),
        "WIDTH": width,
    }


def gradient_geometry(shape: dict[str, Any]) -> dict[str, Any]:
    """That of a gradient's tiles, which hold two entries more for each that they load."""
    return {**shape, "LANES": min(shape["LANES"], GRADIENT_ENTRIES.value // shape["WIDTH"])}


def tiles(V: int, meta: dict[str, Any]) -> int:
    """Into how many a row falls."""
    return triton.cdiv(V, meta["LANES"] * meta["WIDTH"])


def registers(op: int, general: bool) -> int:
    """The most that a thread has: one program on an SM where two would spill."""
    return 168 if op == JSD.value and general else REGISTERS


def launch_options(
    op: int, general: bool, hip: bool = torch.version.hip is not None
) -> dict[str, Any]:
    """Of every kernel: a warp is 64 threads on AMD, where registers can't be bounded."""
    if hip:
        return {"num_warps": THREADS // 64, "enable_fp_fusion": True}
    return {
        "num_warps": THREADS // 32,
        "maxnreg": registers(op, general),
        "enable_fp_fusion": True,
    }


def approximate() -> bool:
    """Whether the kernels may use an instruction of NVIDIA's: not AMD's, nor the interpreter."""
    return torch.version.hip is None and not triton.knobs.runtime.interpret


def params(t: reference.Tempering) -> Params:
    """The numbers of a call in the kernels' terms."""
    row_scale, over_cap = _scales(t.policy)
    ref_row_scale, ref_over_cap = _scales(t.ref)
    return Params(
        beta=t.beta,
        cap=t.policy.softcap,
        ref_cap=t.ref.softcap,
        over_cap=over_cap,
        ref_over_cap=ref_over_cap,
        row_scale=row_scale,
        ref_row_scale=ref_row_scale,
        row_slope=t.policy.scale * t.policy.inv_temperature,
        ref_row_slope=t.ref.scale * t.ref.inv_temperature,
        **_mixture(t),
    )


def _mixture(t: reference.Tempering) -> dict[str, float]:
    """Of a beta of 0 or 1, where the value is 0, and of other kinds some numbers."""
    beta = t.beta if t.kind == JSD.value and 0 < t.beta < 1 else 0.5
    names = [f"{curve}_{i}" for curve in ("mix", "part") for i in range(TERMS)]
    return {
        "mixed_beta": beta,
        "beta_rest": 1 - beta,
        **dict(zip(names, curves(beta), strict=True)),
    }


def _scales(side: reference.Side) -> tuple[float, float]:
    """(row_scale, over_cap): the scale stands before a softcap, the temperature behind it."""
    if side.softcap > 0:
        return side.inv_temperature, side.scale / side.softcap
    return side.scale * side.inv_temperature, 0.0


def is_general(k: Params, inf_mask: bool) -> bool:
    """Whether the rows need more than one scale on both."""
    return inf_mask or k.cap > 0 or k.ref_cap > 0 or k.row_scale != k.ref_row_scale


def with_layout(t: Tensor) -> tuple[Tensor, Layout]:
    """`t` and where its rows lie.

    A contiguous copy of it, where its leading dimensions fold into more than two.
    """
    folded: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 2:
        return with_layout(t.contiguous())
    (_, outer), (inner, stride) = ([(1, 0)] * (2 - len(folded))) + folded
    return t, Layout(inner, outer, stride)


def with_layouts(*tensors: Tensor) -> tuple[list[Tensor], list[Layout]]:
    """`with_layout` of each."""
    found = [with_layout(t) for t in tensors]
    return [t for t, _ in found], [layout for _, layout in found]


def with_layout_if_wanted(t: Tensor, other: Layout) -> tuple[Tensor | None, Layout]:
    """`with_layout` of an output, which is empty where nobody wants it: None and any layout."""
    return with_layout(t) if t.numel() else (None, other)


# on the device


@triton.jit
def is_short(x, y):
    """Whether both rows are bfloat16, whose distance from a frame is exact."""
    return (x.dtype.element_ty == tl.bfloat16) & (y.dtype.element_ty == tl.bfloat16)


@triton.jit
def row_at(base, layout, n):
    """Address of row n."""
    n = n.to(tl.int64)
    return base + (n // layout.inner) * layout.outer_stride + (n % layout.inner) * layout.stride


@triton.jit
def store(first, step, numbers, COUNT: tl.constexpr):
    """Writes a tuple of COUNT numbers, `step` apart."""
    for i in tl.static_range(COUNT):
        tl.store(first + i * step, numbers[i])


@triton.jit
def zero(row, at, V):
    """Writes 0 at the entries `at` of a row."""
    tl.store(row + at, tl.zeros(at.shape, row.dtype.element_ty), mask=at < V)


@triton.jit
def log1p(t):
    """log(1 + t); libdevice's is not there in the interpreter."""
    one_more = 1.0 + t
    return tl.where(one_more == 1.0, t, tl.log(one_more) * (t / (one_more - 1.0)))


@triton.jit
def tanh(v):
    """Series where the exponential's form would cancel."""
    z = v * v
    series = v * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(v) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.25, series, tl.where(v < 0, -far, far))


@triton.jit
def bend(raw, over_cap):
    """The derivative of a softcap."""
    t = tanh(raw * over_cap)
    return 1.0 - t * t


@triton.jit
def cap_rows(x, y, live, k, GENERAL: tl.constexpr, INF_MASK: tl.constexpr):
    """Raw logits through their softcaps; filler stays -inf, where a softcap would make it -cap."""
    if GENERAL:
        gone = live == 0
        if INF_MASK:
            gone = gone | (x == -INF) | (y == -INF)
        x = tl.where(k.cap > 0, tanh(x * k.over_cap) * k.cap, x)
        y = tl.where(k.ref_cap > 0, tanh(y * k.ref_over_cap) * k.ref_cap, y)
        x = tl.where(gone, -INF, x)
        y = tl.where(gone, -INF, y)
    return x, y


@triton.jit
def capped_gap(raw_x, raw_y, x, y, k):
    """The difference of rows under one softcap, as csrc/math/kl_frame.h, KlFrame::cap."""
    delta = (raw_x - raw_y) * k.over_cap
    z = delta * delta
    series = (z * (2.0 / 15) - 1.0 / 3) * z * delta + delta
    near = series * (1.0 - (x / k.cap) * (y / k.cap)) * k.cap
    return tl.where(tl.abs(delta) <= 0.1, near, x - y)


@triton.jit
def framed(
    x, y, live, mx, my, shift, k, GENERAL: tl.constexpr, INF_MASK: tl.constexpr, SHORT: tl.constexpr
):
    """Both rows in their frames, ax and ay in units of log 2, and their gap d = ax - ay.

    SHORT: x - mx is exact but for entries 2^16 times smaller (bfloat16). Else, of rows alike in
    size x - y is the exact one; rows offset by hundreds are each centred first. Multiply-adds are
    spelled out, for the gradient's d has to be that of the sums to the bit.
    """
    raw_x, raw_y = x, y
    x, y = cap_rows(x, y, live, k, GENERAL, INF_MASK)
    if GENERAL:
        ax = (x - mx) * k.row_scale
        ay = tl.fma(y - my, k.ref_row_scale, shift)
        d = ax - ay
        joint = (k.cap > 0) & (k.cap == k.ref_cap) & (k.over_cap == k.ref_over_cap)
        if joint & (k.row_scale == k.ref_row_scale) & (tl.abs(mx - my) <= 4.0):
            # rounded at 30 each, two capped logits leave 1e-3 of a difference of 1e-3
            d = tl.fma(capped_gap(raw_x, raw_y, x, y, k) - (mx - my), k.row_scale, -shift)
        return ax * LOG2E, ay * LOG2E, d
    else:
        scale = k.row_scale * LOG2E
        ax = x - mx
        ay = y - my
        if SHORT:
            d = tl.fma(ax - ay, k.row_scale, -shift)
        else:
            alike = (tl.abs(mx - my) <= 4.0) & (shift != APART)
            ox = tl.where(alike, 0.0, mx)
            oy = tl.where(alike, 0.0, my)
            c = tl.where(alike, (mx - my) * k.row_scale, 0.0) + shift
            d = tl.fma((x - ox) - (y - oy), k.row_scale, -c)
        return ax * scale, tl.fma(ay, scale, shift * LOG2E), d


@triton.jit
def load_pair(x_row, y_row, at, V, PAIR: tl.constexpr):
    """Entries of both rows, or of one twice, and which of them are there."""
    live = at < V
    x = tl.load(x_row + at, mask=live, other=-INF).to(tl.float32)
    y = x
    if PAIR:
        y = tl.load(y_row + at, mask=live, other=-INF).to(tl.float32)
    return x, y, live


@triton.jit
def tile_lanes(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The entries of a row's first tile."""
    return tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def frame_of(top):
    """A row of -inf gets the frame 0: its sums are 0 then, and NaN if it has one."""
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def times(a, b, GUARDED: tl.constexpr):
    """The product, of which 0 * inf is 0 where that is asked for."""
    if GUARDED:
        return tl.where(a == 0, 0.0, a * b)
    else:
        return a * b


@triton.jit
def total(lanes):
    """The lanes' sum, in float64."""
    return tl.sum(lanes.to(tl.float64), 0)
