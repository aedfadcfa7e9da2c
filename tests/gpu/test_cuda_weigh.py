"""The CUDA kernels of the tokens' results and of held gradients without a GPU: their source on a
SIMT machine, with faults that must be caught, and their machine code.
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
    longest_run,
    machine_code,
    simt_tests,
    steps,
)

WEIGH = "cuda/weigh.cuh"
FAULTS = {
    "no barrier": Fault(TSAN, WEIGH, "= mine;\n  __syncthreads();\n", "= mine;\n", "data race"),
    "a mask read past its end": Fault(
        ASAN, WEIGH, "aligned ? a.n / 16 : 0", "aligned ? (a.n + 15) / 16 : 0", "heap-buffer-over"
    ),
    "a gradient read though the factor is 1": Fault(
        ASAN, WEIGH, "    if (by == 1) {", "    if (by == 2) {", "ERROR"
    ),
    "a ratio without its clip": Fault(
        (), "math/weigh.h", "x > clip ? top * (1 + (x - clip)) : std::exp(x)", "std::exp(x)", "FAIL"
    ),
}
simt_runs, test_kernels_on_the_simt_machine, test_the_simt_machine_catches = simt_tests(
    "weigh", FAULTS, lambda build: 94 if build == "thread" else 802
)


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch: str) -> None:
    used = registers(cubin("weigh", arch))
    assert max(used.values()) <= 64, used
    code = machine_code(cubin("weigh", arch))
    assert not any(re.search(r"\b(LDL|STL|RED|ATOM)", body) for body in code.values())
    scale = {name: steps(body) for name, body in code.items() if "scale_held_kernel" in name}
    assert len(scale) == 4
    for name, opcodes in scale.items():
        # 64 bytes a thread under way
        assert longest_run(opcodes, LOAD, f"{ARITHMETIC}|DMUL") >= 4, name
        assert any(re.match(STORE, step) for step in opcodes)
