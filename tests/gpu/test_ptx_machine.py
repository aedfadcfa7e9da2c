"""The PTX machine itself: every fault that it must see, in a kernel of a few lines written for it,
and the same kernel without the fault, in which it must see nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.gpu.ptx.machine import Memory, Module, Report
from tests.gpu.ptx.text import PtxError

HEAD = """
.version 8.4
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 room[];
.visible .entry test(.param .u64 in, .param .u64 out, .param .u32 n)
{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<40>;
  .reg .f32 %f<20>;
  .reg .f64 %d<9>;
  .reg .b64 %a<20>;
  .shared .align 4 .b8 slots[256];
  ld.param.u64 %a0, [in];
  cvta.to.global.u64 %a0, %a0;
  ld.param.u64 %a1, [out];
  cvta.to.global.u64 %a1, %a1;
  ld.param.u32 %r0, [n];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mad.lo.s32 %r4, %r2, %r3, %r1;
  mul.wide.u32 %a2, %r4, 4;
  add.s64 %a3, %a0, %a2;
  add.s64 %a4, %a1, %a2;
  mul.wide.u32 %a5, %r1, 4;
  mov.u64 %a6, slots;
  add.s64 %a7, %a6, %a5;
"""


def run(
    body: str,
    *,
    blocks: int = 1,
    threads: int = 64,
    entries: int | None = None,
    given: int | None = None,
    cluster: int = 1,
    dynamic: int = 0,
    seed: int = 1,
    most_steps: int = 10**6,
) -> tuple[Report, Tensor, Memory]:
    """The report and the output of int32; `given`: entries of the input that are there."""
    count = blocks * threads if entries is None else entries
    source = torch.arange(count if given is None else given, dtype=torch.int32)
    out = torch.full((count,), -1, dtype=torch.int32)
    memory = Memory()
    memory.add(source, "the input", readonly=True)
    memory.add(out, "the output", written=False)
    arguments = struct.pack("<QQI", source.data_ptr(), out.data_ptr(), count)
    kernel = Module(HEAD + body + "\n  ret;\n}").kernel("test")
    report = kernel.run(
        memory,
        (blocks, 1, 1),
        (threads, 1, 1),
        arguments,
        cluster=cluster,
        dynamic=dynamic,
        seed=seed,
        most_steps=most_steps,
    )
    return report, out, memory


class Case(NamedTuple):
    right: str
    wrong: tuple[str, str]  # what is replaced by what
    says: str
    options: Mapping[str, int] = MappingProxyType({})


# the value of the thread on the other side of the block
EXCHANGE = """
  ld.global.u32 %r5, [%a3];
  st.shared.u32 [%a7], %r5;
  bar.sync 0;
  sub.s32 %r6, %r3, %r1;
  add.s32 %r6, %r6, -1;
  mul.wide.u32 %a8, %r6, 4;
  add.s64 %a9, %a6, %a8;
  ld.shared.u32 %r7, [%a9];
  st.global.u32 [%a4], %r7;
"""
# of the neighbour within a warp
NEIGHBOUR = EXCHANGE.replace("bar.sync 0", "bar.warp.sync -1").replace(
    "sub.s32 %r6, %r3, %r1;\n  add.s32 %r6, %r6, -1;", "xor.b32 %r6, %r1, 1;"
)
COPY = """
  ld.global.u32 %r5, [%a3];
  st.global.u32 [%a4], %r5;
"""
GUARDED = """
  setp.lt.u32 %p1, %r4, %r0;
  @!%p1 bra end;
  ld.global.u32 %r5, [%a3];
  st.global.u32 [%a4], %r5;
end:
"""
# each block leaves a number, and the one that comes last adds them up
TICKET = """
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra end;
  mul.wide.u32 %a8, %r2, 4;
  add.s64 %a9, %a1, %a8;
  add.s32 %r5, %r2, 5;
  st.global.u32 [%a9+8], %r5;
  setp.ne.u32 %p2, %r2, 0;
  membar.gl;
  atom.global.add.u32 %r6, [%a1], 1;
  mov.u32 %r7, %nctaid.x;
  add.s32 %r7, %r7, -1;
  setp.ne.u32 %p3, %r6, %r7;
  @%p3 bra end;
  membar.gl;
  ld.global.u32 %r8, [%a1+8];
  ld.global.u32 %r9, [%a1+12];
  add.s32 %r10, %r8, %r9;
  st.global.u32 [%a1+4], %r10;
end:
"""
ASYNC = """
  cvt.u32.u64 %r20, %a7;
  cp.async.ca.shared.global [%r20], [%a3], 4;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  xor.b32 %r6, %r1, 63;
  mul.wide.u32 %a8, %r6, 4;
  add.s64 %a9, %a6, %a8;
  ld.shared.u32 %r7, [%a9];
  st.global.u32 [%a4], %r7;
"""
# of the other block of a cluster
CLUSTER = """
  ld.global.u32 %r5, [%a3];
  st.shared.u32 [%a7], %r5;
  barrier.cluster.arrive;
  barrier.cluster.wait;
  cvta.shared.u64 %a8, %a7;
  mov.u32 %r6, %cluster_ctarank;
  xor.b32 %r6, %r6, 1;
  mapa.u64 %a9, %a8, %r6;
  ld.u32 %r7, [%a9];
  st.global.u32 [%a4], %r7;
  barrier.cluster.arrive;
  barrier.cluster.wait;
"""
SHUFFLE = """
  setp.lt.u32 %p1, %r1, 16;
  mov.u32 %r5, %r1;
  shfl.sync.bfly.b32 %r6, %r5, 16, 31, -1;
  st.global.u32 [%a4], %r6;
"""
VECTOR = """
  mul.wide.u32 %a8, %r1, 16;
  add.s64 %a9, %a0, %a8;
  ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%a9];
  add.s64 %a10, %a1, %a8;
  st.global.v4.u32 [%a10], {%r5, %r6, %r7, %r8};
"""

SELECTED = """
  setp.lt.u32 %p1, %r1, 32;
  @%p1 ld.global.u32 %r5, [%a3];
  selp.b32 %r6, %r5, 7, %p1;
  st.global.u32 [%a4], %r6;
"""
FAULTS = {
    "no barrier": Case(EXCHANGE, ("  bar.sync 0;\n", ""), "race in shared memory"),
    "no warp barrier": Case(NEIGHBOUR, ("  bar.warp.sync -1;\n", ""), "race in shared memory"),
    "a warp's barrier for a block": Case(
        EXCHANGE, ("bar.sync 0", "bar.warp.sync -1"), "race in shared memory"
    ),
    "one entry too far": Case(COPY, ("[%a3]", "[%a3+4]"), "out of bounds"),
    "one entry before": Case(COPY, ("[%a4]", "[%a4+-4]"), "out of bounds"),
    "off by one": Case(
        GUARDED, ("setp.lt", "setp.le"), "out of bounds", {"entries": 100, "blocks": 2}
    ),
    "a shared variable's end": Case(EXCHANGE, ("[%a7]", "[%a7+4]"), "out of bounds"),
    "a shared entry that nobody wrote": Case(
        EXCHANGE, ("st.shared.u32 [%a7], %r5", "mov.u32 %r5, 0"), "uninitialised read"
    ),
    "an output that is read": Case(
        COPY, ("ld.global.u32 %r5, [%a3]", "ld.global.u32 %r5, [%a4]"), "uninitialised read"
    ),
    "a register that nobody set": Case(
        COPY, ("ld.global.u32 %r5, [%a3]", "add.s32 %r5, %r30, 1"), "uninitialised register"
    ),
    "an address of one": Case(COPY, ("[%a3]", "[%a19]"), "uninitialised register"),
    "a selection of one": Case(SELECTED, ("%r5, 7, %p1", "7, %r5, %p1"), "uninitialised register"),
    "two blocks write": Case(
        COPY, ("[%a4]", "[%a1]"), "race in global memory", {"blocks": 2, "threads": 1}
    ),
    "two threads write": Case(COPY, ("[%a4]", "[%a1]"), "race in global memory"),
    "a write to an input": Case(COPY, ("[%a4]", "[%a3+-4]"), "write to an input"),
    "no alignment": Case(VECTOR, ("[%a9]", "[%a9+4]"), "misaligned", {"entries": 256}),
    "half a warp at a barrier": Case(
        EXCHANGE,
        ("  bar.sync 0;", "  setp.lt.u32 %p1, %r1, 16;\n  @%p1 bar.sync 0;"),
        "divergent barrier",
    ),
    "half a warp in a shuffle": Case(SHUFFLE, ("  shfl", "  @%p1 shfl"), "lanes apart"),
    "a copy that is not waited for": Case(
        ASYNC, ("  cp.async.wait_group 0;\n", ""), "uninitialised read"
    ),
    "a copy without a barrier": Case(ASYNC, ("  bar.sync 0;\n", ""), "race in shared memory"),
    "another block's too early": Case(
        CLUSTER,
        ("  barrier.cluster.arrive;\n  barrier.cluster.wait;\n  cvta", "  bar.sync 0;\n  cvta"),
        "race in shared memory",
        {"blocks": 2, "cluster": 2},
    ),
    "no cluster": Case(
        CLUSTER,
        ("xor.b32 %r6, %r6, 1", "add.s32 %r6, %r6, 1"),
        "out of bounds",
        {"blocks": 2, "cluster": 2},
    ),
    "no end": Case(
        COPY, ("  st.global", "again:\n  bra again;\n  st.global"), "endless", {"most_steps": 1000}
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name: str) -> None:
    case = FAULTS[name]
    for seed in (0, 1, 2):  # whatever the order of the threads is
        report, _, _ = run(case.right, **{**case.options, "seed": seed})
        assert not report.faults, report
        assert case.right.count(case.wrong[0]) >= 1
        report, _, _ = run(case.right.replace(*case.wrong, 1), **{**case.options, "seed": seed})
        assert any(case.says in fault for fault in report.faults), (seed, str(report))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_ticket_hands_on_what_is_behind_its_fence(seed: int) -> None:
    def launched(body: str) -> tuple[Report, Tensor]:
        source, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        memory = Memory()
        memory.add(source, "the input", readonly=True)
        memory.add(out, "the output")
        arguments = struct.pack("<QQI", source.data_ptr(), out.data_ptr(), 0)
        kernel = Module(HEAD + body + "\n  ret;\n}").kernel("test")
        return kernel.run(memory, (2, 1, 1), (32, 1, 1), arguments, seed=seed), out

    report, out = launched(TICKET)
    assert not report.faults, report
    assert out.tolist() == [2, 11, 5, 6]
    report, _ = launched(TICKET.replace("  membar.gl;\n  atom", "  atom"))
    assert any("race in global memory" in fault for fault in report.faults), report


def test_lanes_meet_from_different_places() -> None:
    """As PTX has it from sm_70: a shuffle waits for all that its mask names, wherever they are."""
    report, out, _ = run(
        """
  and.b32 %r5, %r1, 1;
  setp.eq.u32 %p1, %r5, 0;
  @%p1 bra even;
  mul.lo.u32 %r6, %r1, 3;
  shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
  bra.uni end;
even:
  mul.lo.u32 %r8, %r1, 5;
  shfl.sync.bfly.b32 %r7, %r8, 1, 31, -1;
end:
  st.global.u32 [%a4], %r7;
"""
    )
    assert not report.faults, report
    assert out.tolist() == [(t ^ 1) * (3 if t % 2 == 0 else 5) for t in range(64)]


def test_bytes() -> None:
    """What is read twice counts twice, but where it is near; entries apart count a sector each."""
    far = """
  ld.global.u32 %r5, [%a3];
  st.global.u32 [%a4], %r5;
"""
    twice = """
  mov.u32 %r10, 0;
again:
  shl.b32 %r11, %r1, 2;
  mov.u32 %r12, %r11;
row:
  cvt.u64.u32 %a8, %r12;
  add.s64 %a9, %a0, %a8;
  ld.global.u32 %r5, [%a9];
  add.s32 %r12, %r12, 256;
  shl.b32 %r13, %r0, 2;
  setp.lt.u32 %p1, %r12, %r13;
  @%p1 bra row;
  add.s32 %r10, %r10, 1;
  setp.lt.u32 %p2, %r10, 2;
  @%p2 bra again;
"""
    strided = far.replace("[%a3]", "[%a9]").replace(
        "\n  ld", "\n  mul.wide.u32 %a8, %r1, 32;\n  add.s64 %a9, %a0, %a8;\n  ld", 1
    )
    report, _, _ = run(far, blocks=4)
    assert (report.read, report.written, report.asked) == (1024, 1024, 1024)
    report, _, _ = run(far.replace("  st", "  ld.global.u32 %r6, [%a3];\n  st", 1), blocks=4)
    assert (report.read, report.asked) == (1024, 2048)
    report, _, _ = run(twice, entries=65536)
    assert report.read == 2 * 4 * 65536
    report, _, _ = run(strided, entries=512)
    assert report.read == 32 * 64


def test_what_is_left_out_is_seen() -> None:
    report, out, memory = run(GUARDED.replace("%r4, %r0", "%r4, 60"))
    assert not report.faults
    assert memory.unwritten(out) == 4 * 4


@pytest.mark.parametrize(
    "words", ["tex.1d.v4.f32.s32 {%f0, %f1, %f2, %f3}, [x, {%r1}];", "add.sat.s32 %r5, %r5, 1;"]
)
def test_what_is_not_known_is_refused(words: str) -> None:
    with pytest.raises(PtxError):
        run("  mov.u32 %r5, 0;\n  " + words)


def test_instructions_are_counted() -> None:
    report, _, _ = run(COPY, blocks=3)
    # 15 of the head, 2 of the body, ret: of 2 warps of each block
    assert report.instructions == 6 * (15 + 2 + 1)
    assert report.opcodes["ld.global.u32"] == 6


BITS: dict[
    str, Callable[[int], int]
] = {  # an instruction that makes %r5 of %r1, a thread's number, and what it must be
    "mul.hi.u32 %r5, %r20, -2;": lambda t: (t * 0x9E3779B1 % 2**32) * (2**32 - 2) >> 32,
    "bfe.u32 %r5, %r20, 3, 7;": lambda t: t * 0x9E3779B1 % 2**32 >> 3 & 127,
    "bfe.s32 %r5, %r20, 28, 8;": lambda t: sign(t * 0x9E3779B1 % 2**32 >> 28, 4),
    "prmt.b32 %r5, %r20, %r1, 21316;": lambda t: prmt(t * 0x9E3779B1 % 2**32, t, 21316),
    "shf.l.wrap.b32 %r5, %r20, %r1, 5;": lambda t: t << 5 | t * 0x9E3779B1 % 2**32 >> 27,
    "popc.b32 %r5, %r20;": lambda t: (t * 0x9E3779B1 % 2**32).bit_count(),
    "shr.s32 %r5, %r20, 40;": lambda t: -(t * 0x9E3779B1 % 2**32 >> 31),
    "div.s32 %r5, %r20, 7;": lambda t: int(sign(t * 0x9E3779B1 % 2**32, 32) / 7),
    "rem.s32 %r5, %r20, 7;": lambda t: int(math.fmod(sign(t * 0x9E3779B1 % 2**32, 32), 7)),
    "lop3.b32 %r5, %r20, %r1, 12, 0x96;": lambda t: t * 0x9E3779B1 % 2**32 ^ t ^ 12,
    "cvt.s8.s32 %r6, %r20; cvt.rn.f32.s16 %f1, %r6; cvt.rzi.s32.f32 %r5, %f1;": lambda t: sign(
        t * 0x9E3779B1 & 255, 8
    ),
    "cvt.s32.s8 %r5, %r20;": lambda t: sign(t * 0x9E3779B1 & 255, 8),
    "cvt.rn.f32.s32 %f1, %r20; cvt.rzi.s32.f32 %r5, %f1;": lambda t: int(
        torch.tensor(sign(t * 0x9E3779B1 % 2**32, 32), dtype=torch.int32).float().item()
    ),
    "bfi.b32 %r5, %r1, %r20, 8, 6;": lambda t: (t * 0x9E3779B1 % 2**32) & ~0x3F00 | t << 8,
    "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %r20; mov.b32 %r5, {hi, lo}; }": lambda t: (
        (t * 0x9E3779B1 % 2**32) >> 16 | (t * 0x9E3779B1 & 0xFFFF) << 16
    ),
}


def sign(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def prmt(a: int, b: int, how: int) -> int:
    both = b << 32 | a
    return sum((both >> 8 * (how >> 4 * k & 7) & 255) << 8 * k for k in range(4))


@pytest.mark.parametrize("words", BITS)
def test_integers(words: str) -> None:
    report, out, _ = run(
        f"  mul.lo.u32 %r20, %r1, 2654435761;\n  {words}\n  st.global.u32 [%a4], %r5;\n"
    )
    assert not report.faults, report
    assert [v % 2**32 for v in out.tolist()] == [BITS[words](t) % 2**32 for t in range(64)]


FLOATS: dict[
    str, Callable[[Tensor], Tensor]
] = {  # of x, a small number that differs from thread to thread, as float32's bits
    "fma.rn.f32 %f2, %f1, %f1, 0fBF800000;": lambda x: (x.double() * x.double() - 1).float(),
    "ex2.approx.ftz.f32 %f2, %f1;": lambda x: torch.exp2(x.double()).float(),
    "max.NaN.f32 %f2, %f1, 0f7FFFFFFF;": lambda x: x * math.nan,
    "max.f32 %f2, %f1, 0f7FFFFFFF;": lambda x: x,
    "add.rz.f32 %f2, %f1, 0f4B800001;": lambda x: toward_zero(x.double() + 16777218.0),
    "{ .reg .b16 h; cvt.rn.bf16.f32 h, %f1; cvt.f32.bf16 %f2, h; }": lambda x: x.bfloat16().float(),
    "{ .reg .b16 h; cvt.rn.f16.f32 h, %f1; cvt.f32.f16 %f2, h; }": lambda x: x.half().float(),
    "cvt.f64.f32 %d1, %f1; sqrt.rn.f64 %d2, %d1; cvt.rn.f32.f64 %f2, %d2;": lambda x: (
        x.double().sqrt().float()
    ),
}


def toward_zero(x: Tensor) -> Tensor:
    nearest = x.float()
    return torch.where(nearest.double() > x, torch.nextafter(nearest, nearest * 0), nearest)


@pytest.mark.parametrize("words", FLOATS)
def test_floats(words: str) -> None:
    body = "  cvt.rn.f32.u32 %f1, %r1;\n  mul.f32 %f1, %f1, 0f3DCCCCCD;\n"
    report, out, _ = run(f"{body}  {words}\n  mov.b32 %r5, %f2;\n  st.global.u32 [%a4], %r5;\n")
    assert not report.faults, report
    want = FLOATS[words](torch.arange(64).float() * 0.1)
    torch.testing.assert_close(out.view(torch.float32), want, rtol=0, atol=0, equal_nan=True)
