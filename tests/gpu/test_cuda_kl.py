"""The CUDA kernels of token_kl and token_stats without a GPU: their source on a SIMT machine, their
machine code.

tests/gpu/simt/kl_main.cpp holds every kernel, dtype and op against a float64 textbook and the same
bits from one block a row, several, and clusters, and counts what is read and summed; nine faults
injected into copies show that each of these checks can fail.
"""

from __future__ import annotations

import re

import pytest

from tests.tools.cubins import cubin, registers
from tests.tools.cuda_tools import (
    ARCHS,
    ARITHMETIC,
    ASAN,
    LOAD,
    STORE,
    TSAN,
    Fault,
    basic_blocks,
    longest_run,
    machine_code,
    simt_tests,
    steps,
)

SUMS, ROW, ENTRIES = "cuda/kl_sums.cuh", "cuda/kl_row.cuh", "cuda/kl_entries.cuh"
TEAM, TOTAL = "  kl_team_sync<kCluster>();\n", "  if (warp == 0) kl_join_spans"
FAULTS = {
    "reads past the end": Fault(
        ASAN,
        "cuda/kl_span.cuh",
        "    if (count == kSpan) {",
        "    if (true) {",
        "heap-buffer-overflow",
    ),
    "ignores alignment": Fault(
        ASAN,
        ENTRIES,
        "aligned(kl_aligned(base)) {}",
        "aligned(true) {}",
        "misaligned address",
    ),
    "one type for both rows": Fault(
        (), ENTRIES, "has_ref ? a.y_type : a.x_type", "a.x_type", "own types, op 0"
    ),
    "neighbours of another round": Fault(
        (), ENTRIES, "next = to[j + 1 < n ? j + 1 : j];", "next = to[j];", "FAILED", quick=False
    ),
    "no barrier": Fault(TSAN, ROW, TEAM + TOTAL, TOTAL, "data race"),
    "no cluster barrier": Fault(
        (),
        ROW,
        TEAM + TOTAL,
        "  __syncthreads();\n" + TOTAL,
        "other bits from a cluster",
    ),
    "spans in frames of their own": Fault((), ROW, "    span.move_to(k, frame);\n", "", "FAILED"),
    "frames apart from the mean gap": Fault(
        (), SUMS, "kHidden = 15.0f / 16", "kHidden = 1e9f", "FAILED", quick=False
    ),
    "series beyond its range": Fault(
        (), "math/kl.h", "kSmallGap = 0.25f", "kSmallGap = 4.0f", "FAILED"
    ),
}
SOURCES = ("kl", "kl_gradient", "kl_both")
OPS = {"policy_ref": 0, "ref_policy": 1, "jsd": 2, "renyi": 3, "stats": 64, "alone": 65}
KINDS, TWO_SWEEPS = 4, 2


simt_runs, test_kernels_on_the_simt_machine, test_the_simt_machine_catches = simt_tests(
    "kl", FAULTS, lambda build: 240 if build == "thread" else 3006
)


# --- the machine code -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(arch: str) -> None:
    forward, gradient, both = (registers(cubin(source, arch)) for source in SOURCES)
    assert (len(forward), len(gradient), len(both)) == (
        3 * len(OPS) + 3 * TWO_SWEEPS,
        3 * (2 * len(OPS) - 1),
        2 * 2 * KINDS,
    )
    assert max(forward.values()) <= 128
    assert max(both.values()) <= 128
    two_blocks = re.compile(r"kl_gradient_kernelIfL.*Lb1E")  # float32, of both rows
    assert max(count for name, count in gradient.items() if not two_blocks.search(name)) <= 80
    assert max(gradient.values()) <= 128


def kernel(code: dict[str, str], stem: str, dtype: str, op: str, rest: str = "") -> str:
    wanted = f"{stem}I{dtype}LNS_4KlOpE{OPS[op]}E{rest}"
    (found,) = [body for name, body in code.items() if wanted in name]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_accesses(arch: str) -> None:
    forward, gradient, both = (machine_code(cubin(source, arch)) for source in SOURCES)
    for dtype in ("f", "13__nv_bfloat16"):
        for op in OPS:
            body = kernel(forward, "kl_forward_kernel", dtype, op)
            assert not re.search(r"\b(LDL|STL)", body)
            # 80 bytes a lane under way before the first is used: 40 KB per SM
            assert longest_run(steps(body), LOAD, ARITHMETIC) >= (4 if op == "alone" else 5)
            assert any(
                re.match(STORE, step)
                for step in steps(kernel(gradient, "kl_gradient_kernel", dtype, op, "Lb0E"))
            )
        for stem in ("kl_two_sweeps_kernel", "kl_resident_kernel"):
            opcodes = steps(kernel(both, stem, dtype, "policy_ref"))
            # ptxas has its own mind of one kernel on sm_100, where clusters hold rows of up to
            # 400,000 bfloat16 entries: two sweeps are for longer ones
            unused = (stem, dtype, arch) == ("kl_two_sweeps_kernel", "13__nv_bfloat16", "100")
            assert longest_run(opcodes, LOAD, ARITHMETIC) >= (3 if unused else 5)
            assert any(re.match(STORE, step) for step in opcodes)
            clusters = any(re.match(r"UCGABAR_ARV", step) for step in opcodes)
            assert clusters == (stem == "kl_resident_kernel" and arch != "80")


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_an_entry(arch: str) -> None:
    """What an H100 (132 SMs, 128 lanes, 1.75 GHz) can issue must be 1.5 times what it can load
    (3.35 TB/s): in bf16 at most 23 an entry, of entries that are alike. Of others, whose terms are
    accurate by themselves so that no row is read again, 25 up to a gap of 2 and 31 beyond.
    """
    blocks = basic_blocks(
        kernel(
            machine_code(cubin("kl", arch)), "kl_forward_kernel", "13__nv_bfloat16", "policy_ref"
        )
    )

    def lengths(exps: int) -> list[int]:
        """Of the blocks that sum a vector of 8 entries."""
        return sorted(
            len(block)
            for block in blocks
            if sum(step.startswith("MUFU.EX2") for step in block) in (exps - 1, exps)
            and not any(step.startswith(("LDG", "LD.", "MUFU.RCP")) for step in block)
        )

    frame = min(
        len(block)
        for block in blocks
        if sum(step.startswith("FMNMX") for step in block) in (4, 7, 8)
        and sum(step.startswith("FFMA") for step in block) >= 8
        and not any(re.match("LDG|SHFL|MUFU", s) for s in block)
    )
    # of four vectors each, and of two under a softcap
    near, middle = lengths(8)[0], lengths(8)[6]
    far = lengths(16)[0]
    assert (frame + near) / 8 <= 23, (frame, near)
    assert (frame + middle) / 8 <= 25, (frame, middle)
    assert (frame + far) / 8 <= 31, (frame, far)
