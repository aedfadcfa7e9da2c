"""The machine code of csrc/cuda: taken out of the library that was built of these very sources, or
compiled here, as setup.py does it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tests.gpu.ptx.library import kept
from tests.tools.cuda_tools import ROOT, nvcc, run, tool

LIBRARY = ROOT / "fasttax/_C_cuda.abi3.so"
KERNEL = {  # one that no other source has
    "kl": "kl_forward_kernel",
    "kl_gradient": "kl_gradient_kernel",
    "kl_both": "kl_two_sweeps_kernel",
    "ewc": "ewc_kernel",
    "adamw": "adamw_kernel",
    "weigh": "weigh_tokens_kernel",
    "fisher": "square_kernel",
}
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def headers() -> list[Path]:
    """What a source may include."""
    return [*ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/*/*.h")]


@cache
def built() -> dict[tuple[str, str], Path]:
    """(source, architecture) -> cubin, of the library; none of one that is older than a source."""
    if not LIBRARY.exists():
        return {}
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *headers()]
    if LIBRARY.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return {}

    def extract(folder: Path) -> None:
        done = run("env", "-C", folder, tool("cuobjdump"), "-xelf", "all", LIBRARY)
        assert done.returncode == 0, done.stdout + done.stderr

    found = {}
    for cubin in kept("cubins", [LIBRARY], extract).glob("*.cubin"):
        held = cubin.read_bytes()
        (source,) = [name for name, kernel in KERNEL.items() if f"{kernel}I".encode() in held]
        found[source, cubin.suffixes[-2].removeprefix(".sm_")] = cubin
    return found


def cubin(source: str, arch: str) -> Path:
    """Of csrc/cuda/SOURCE.cu for sm_ARCH; a compiled one is kept while sources are the same."""
    found = built().get((source, arch))
    if found is not None:
        return found
    of = ROOT / f"csrc/cuda/{source}.cu"

    def build(folder: Path) -> None:
        flags = ("-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin")
        done = run(nvcc(), *flags, of, "-o", folder / "cubin")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr, done.stdout + done.stderr

    return kept(f"cubin-{source}-{arch}", [of, *headers()], build) / "cubin"


def usage(cubin: Path) -> dict[str, tuple[int, ...]]:
    """kernel -> registers, and bytes of its stack, of shared and of local memory."""
    said = run(tool("cuobjdump"), "--dump-resource-usage", cubin).stdout
    return {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(said)}


def registers(cubin: Path) -> dict[str, int]:
    """kernel -> registers; asserts that it spills nothing and keeps nothing on a stack."""
    found = usage(cubin)
    assert found
    assert not [name for name, (_, stack, _, local) in found.items() if stack or local]
    return {name: count for name, (count, *_) in found.items()}
