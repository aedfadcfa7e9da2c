"""What the tests of Triton kernels without a GPU share: other tests run again in Triton's
interpreter, and machine code compiled with no driver.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.tools.cuda_tools import ROOT, first

triton = pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
QUICKENED = "from tests.tools.interpreter import quicken; quicken()"
BY_16 = [["tt.divisibility", 16]]


def run_in_the_interpreter(file: str, expression: str) -> int:
    """The tests of a file that match, without those of the reference, with Triton's interpreter
    behind the CPU's ops; how many passed, none having failed.
    """
    environment = {**os.environ, "FASTTAX_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:warnings",
        "-k",
        f"not reference and ({expression})",
        f"tests/{file}",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed, done.stdout[-2000:]
    return int(passed[1])


def check_in_the_interpreter(file: str, checks: str, prepare: str = QUICKENED) -> str:
    """Runs `checks` of a test file, `t`, with Triton's interpreter behind the CPU's ops; what they
    print. In a process of its own: Triton chooses the interpreter when it is imported.
    """
    place = Path(file)
    environment = {
        **os.environ,
        "FASTTAX_BACKEND": "triton",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{prepare}; import {place.stem} as t; {checks}"],
        cwd=place.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


class Binary(NamedTuple):
    registers: int
    spills: int  # bytes of stack
    shared: int
    code: str  # SASS or GCN


def compiled(
    kernel: Any,
    target: str,
    types: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    folder: Path,
) -> Binary:
    """`kernel` for a GPU that is not there. `types`: its arguments' Triton types, a NamedTuple of
    them for a tuple; those left out are None. Pointers and integers count as divisible by 16, as
    they are for aligned rows.
    """
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name not in types:
            signature[name], constexprs[i,] = "constexpr", constants.get(name)
            continue
        signature[name] = types[name]
        parts = enumerate(types[name]) if isinstance(types[name], tuple) else [(None, types[name])]
        attributes.update(
            {
                (i,) if j is None else (i, j): BY_16
                for j, of in parts
                if of.startswith("*") or of in ("i32", "i64")
            }
        )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    of = TARGETS[target]
    built = triton.compile(source, target=of, options=dict(options))
    if of.backend == "hip":
        code = built.asm["amdgcn"]

        def count(key: str) -> int:
            return max(int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", code))

        return Binary(
            count("vgpr_count"),
            count("vgpr_spill_count") + count("sgpr_spill_count"),
            built.metadata.shared,
            code,
        )
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    dump, disassemble = (first([binaries / name]) for name in ("cuobjdump", "nvdisasm"))
    assert dump, f"triton ships no cuobjdump in {binaries}"
    assert disassemble, f"triton ships no nvdisasm in {binaries}"
    usage = subprocess.run(
        [dump, "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert used, usage
    registers, stack, shared, local = map(int, used.groups())
    code = subprocess.run(
        [disassemble, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    return Binary(registers, stack + local, max(shared, built.metadata.shared), code)
