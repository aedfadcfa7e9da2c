"""The CUDA AdamW+EWC kernel without a GPU: its source on a SIMT machine, with faults that must be
caught, and its machine code.
"""

from __future__ import annotations

import re

import pytest

from tests.tools.cubins import cubin, registers
from tests.tools.cuda_tools import (
    ARCHS,
    TSAN,
    Fault,
    machine_code,
    simt_tests,
    steps,
)

ADAMW = "cuda/adamw.cuh"
FAULTS = {
    "no barrier": Fault(TSAN, ADAMW, "  __syncthreads();\n", "", "data race"),
    "second launch over the first": Fault((), ADAMW, "    args.parts += blocks;\n", "", "FAILED"),
    "large tables are not taken": Fault(
        (), ADAMW, "if (large && x.count > kAdamWTensors)", "if (false)", "18 launches"
    ),
    "steps counted before they are read": Fault(
        (), ADAMW, "adamw_value(tensor.step, tensor.step_double) + 1", "1", "FAILED"
    ),
}
# A step and its end, for small tables and for large ones (under TSan for small ones again): 2 + 1
# tables for each list of 72 mixes, of which there are 4, 1 + 1 for float64, 1 + 1 for the chunks
# but under TSan, 1 for 300 parameters; and the end alone twice for nothing.
simt_runs, test_kernel_on_the_simt_machine, test_the_simt_machine_catches = simt_tests(
    "adamw", FAULTS, lambda build: 2 * (2 + 1 + (16 if build == "thread" else 12 + 2)) + 2
)


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_wide_accesses(arch: str) -> None:
    used = registers(cubin("adamw", arch))
    assert max(used.values()) <= 80, used  # 3 blocks of 256 per SM
    code = next(
        body for name, body in machine_code(cubin("adamw", arch)).items() if "adamw_kernel" in name
    )
    assert not re.search(r"\b(LDL|STL|RED|ATOM)", code)
    opcodes = steps(code)
    # each mode's float32 operands
    assert sum(bool(re.match(r"LDG\.E.*\.128$", step)) for step in opcodes) >= 4 + 6 + 6
    assert sum(bool(re.match(r"STG\.E.*\.128$", step)) for step in opcodes) >= 3 * 3
