"""The CUDA kernel of accumulate_sqgrad_ without a GPU: its source on a SIMT machine, with faults
that must be caught, and its machine code.
"""

from __future__ import annotations

import re

import pytest

from tests.tools.cubins import cubin, registers
from tests.tools.cuda_tools import (
    ARCHS,
    ASAN,
    Fault,
    machine_code,
    simt_tests,
    steps,
)

FISHER = "cuda/fisher.cuh"
FAULTS = {
    "reads past the end": Fault(
        ASAN,
        FISHER,
        "end - end % kEwcGroup : 0",
        "(end + kEwcGroup - 1) / kEwcGroup * kEwcGroup : 0",
        "heap-buffer-overflow",
    ),
    "ignores alignment": Fault(ASAN, FISHER, "tensor.aligned ?", "true ?", "misaligned address"),
    "loses a group": Fault((), FISHER, "if (k == 0 || two)", "if (k == 0)", "FAILED"),
}
# 72 of the 84 mixes are not empty: two small tables and then a large one; one of the chunks, but
# under TSan
simt_runs, test_kernel_on_the_simt_machine, test_the_simt_machine_catches = simt_tests(
    "fisher", FAULTS, lambda build: 3 if build == "thread" else 4
)


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_wide_accesses(arch: str) -> None:
    used = registers(cubin("fisher", arch))
    assert max(used.values()) <= 64, used  # 4 blocks of 256 per SM
    small, large = machine_code(cubin("fisher", arch)).values()
    assert steps(small).count("LDG.E.EF.128") == steps(large).count("LDG.E.EF.128")
    code = small
    # local or unnamed memory, or an order that the hardware chooses
    assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E|RED|ATOM)", code)
    opcodes = steps(code)
    wide = [i for i, step in enumerate(opcodes) if re.match(r"LDG\.E.*\.128$", step)]
    # the float32 loop: two sums and two gradients, all four loads under way before the first
    # arithmetic
    assert any(
        not any(re.match("F(ADD|MUL|FMA)", step) for step in opcodes[wide[i] : wide[i + 3]])
        for i in range(len(wide) - 3)
    )
    assert any(re.match(r"STG\.E.*\.128$", step) for step in opcodes)
