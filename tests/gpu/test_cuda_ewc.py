"""The CUDA EWC kernels without a GPU: their source on a SIMT machine, their machine code, the built
library.

tests/gpu/simt/simt.h runs csrc/cuda/ewc.cuh thread by thread (values, bounds, alignment, races),
and five faults injected into a copy of it show that each of these checks can fail. nvcc's code for
sm_80 to sm_120 shows what the GPU executes. test_cuda_ewc_gpu.py is the part that needs one.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import fasttax
from fasttax._base import library
from tests.gpu.ptx.cuda import OPS
from tests.tools.cubins import cubin, registers
from tests.tools.cuda_tools import (
    ARCHS,
    ASAN,
    TSAN,
    Fault,
    first,
    machine_code,
    run,
    simt_tests,
    steps,
)

MODES = 4
EWC = "cuda/ewc.cuh"
FAULTS = {
    "reads past the end": Fault(
        ASAN,
        EWC,
        "end - end % kEwcGroup : 0",
        "(end + kEwcGroup - 1) / kEwcGroup * kEwcGroup : 0",
        "heap-buffer-overflow",
        quick=False,
    ),
    "ignores alignment": Fault(
        ASAN, EWC, "tensor.aligned ?", "true ?", "misaligned address", quick=False
    ),
    "no barrier": Fault(TSAN, EWC, "  __syncthreads();\n", "", "data race"),
    "second launch over the first": Fault(
        (),
        "cuda/ewc_tables.cuh",
        "if (args.parts) args.parts += blocks;",
        "",
        "FAILED",
        quick=False,
    ),
    "large tables are not taken": Fault(
        (), "cuda/ewc_tables.cuh", "if (large && count > kEwcTensors)", "if (false)", "6 launches"
    ),
}


# Of 4 modes, with small tables and with large ones (under TSan with small ones again): 3 + 1 for
# the 144 mixes, 1 + 1 for the chunks but under TSan, 1 + 1 for float64; in 2 modes 1 more for each
# value, of nothing too; for 300 parameters, in large tables, 2 + 2 + 1 + 1, for tables that are
# full 1 + 1, and for a scale beyond floats 2 + 1 + 1.
simt_runs, test_kernels_on_the_simt_machine, test_the_simt_machine_catches = simt_tests(
    "ewc",
    FAULTS,
    lambda build: 12 + (4 * 8 + 2 * 6 if build == "thread" else 4 * 8 + 2 * 8),
)


# --- the machine code -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(arch: str) -> None:
    used = registers(cubin("ewc", arch))
    assert len(used) == 2 * MODES + 1  # for small and large tables, and the value
    assert max(used.values()) <= 64, used  # 4 blocks of 256 per SM


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_accesses(arch: str) -> None:
    kernels = machine_code(cubin("ewc", arch))
    for mode, loads in enumerate((3, 4, 3, 3)):  # value, add, write, prox
        # of small tables: the loops of large ones are the same
        code = next(body for name, body in kernels.items() if f"EwcModeE{mode}ELi62E" in name)
        # local or unnamed memory, or an order that the hardware chooses
        assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E|RED|ATOM)", code)
        opcodes = steps(code)
        wide = [i for i, step in enumerate(opcodes) if re.match(r"LDG\.E.*\.128$", step)]
        # the float32 loop: every operand's 16-byte load under way before the first arithmetic
        runs = [opcodes[wide[i] : wide[i + loads - 1]] for i in range(len(wide) - loads + 1)]
        assert any(
            len(between) < 24 and not any(re.match("F(ADD|MUL|FMA)", step) for step in between)
            for between in runs
        )
        assert mode == 0 or any(re.match(r"STG\.E.*\.128$", step) for step in opcodes)


# --- the library ----------------------------------------------------------------------------------


def test_library_needs_torchs_stable_abi_alone() -> None:
    library = first(sorted(Path(fasttax.__file__).parent.glob("_C_cuda*.so")))
    if library is None or not shutil.which("nm"):
        pytest.skip(
            "_C_cuda is not built here (nvcc and a CUDA torch build it), or binutils' nm is missing"
        )
    symbols = run("nm", "-D", "--undefined-only", "--demangle", library).stdout
    assert "torch_call_dispatcher" in symbols
    assert not re.search(r"\b(at|c10|torch)::", symbols)
    # the CUDA runtime is inside, and finds the driver when first used
    assert not re.search(r"\bcu(da)?[A-Z]", symbols)


def test_library_registers_without_a_gpu() -> None:
    if "_C_cuda" in library.problems:
        pytest.skip(f"_C_cuda is not loaded: {library.problems['_C_cuda']}")
    for op in OPS:
        assert library.active(op, "cuda") == ("CUDA C++", "built and registered")
