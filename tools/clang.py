"""The CPU library by clang: every instruction set, and tests of its kernels.

    python tools/clang.py tests/kl/test_kl.py

CXX if that is a clang, else PATH's clang++, else the clang in PyPI's ziglang; with ziglang all
sources are compiled for aarch64 and macOS too. A copy of the tracked files in build/clang has the
library, so that the one in use stays.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from native_build import FLAGS, TORCH_FLOOR, files
from torch.utils.cpp_extension import include_paths
from tree_copy import ROOT, copied

FOLDER = ROOT / "build/clang"
OTHERS = ("aarch64-linux-gnu", "aarch64-macos")
ZIG = [sys.executable, "-m", "ziglang", "c++"]


def say(text: str) -> None:
    print(f"[clang] {text}", flush=True)


def _lines(*command: str) -> list[str]:
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()


def zig() -> str:
    """A clang++ made of zig's, with the headers and the linker of g++.

    Torch's exceptions are libstdc++'s, which zig's own libc++ does not catch. Without a target zig
    compiles for this very CPU, and without an optimisation level that it knows, with UBSan.
    """
    lines = [line.strip() for line in _lines("g++", "-xc++", "-E", "-v", "-")]
    begin, end = (next(i for i, line in enumerate(lines) if w in line) for w in ("<...>", "End of"))
    # clang has intrinsics of its own
    headers = [path for path in lines[begin + 1 : end] if not re.search(r"/gcc/.*/include", path)]
    target = f"{platform.machine()}-linux-gnu.{platform.libc_ver()[1]}"
    command = [*ZIG, "-target", target, "-fno-sanitize=undefined"]
    command += ["-nostdinc++", "-nostdlibinc", *(f"-isystem{path}" for path in headers)]
    script = FOLDER / "build/bin/clang++"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        '#!/bin/sh\ncase " $* " in *" -shared "*) exec g++ "$@" ;; esac\n'
        f'exec {shlex.join(command)} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def compiler() -> str:
    for name in (os.environ.get("CXX", ""), "clang++"):
        if name and shutil.which(name) and "clang" in "\n".join(_lines(name, "--version")):
            return name
    if not find_spec("ziglang"):
        raise SystemExit("no clang: install clang++, or `pip install ziglang`")
    return zig()


def compiled_for(target: str, name: str) -> str:
    """What clang says of a source on a processor that is not this one."""
    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    command = [*ZIG, "-target", target, *FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"]
    command += [*(f"-isystem{path}" for path in includes), "-O0", "-c", name, "-o", os.devnull]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    return f"{target} {name}\n{done.stderr}" if done.returncode or done.stderr else ""


def compile_for_others() -> None:
    say(f"compiling for {' and '.join(OTHERS)}")
    jobs = [(target, name) for target in OTHERS for name in files("module.cpp", "cpu/*.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [report for report in pool.map(compiled_for, *zip(*jobs, strict=True)) if report]
    if found:
        raise SystemExit("\n".join(found))


def main() -> int:
    os.chdir(ROOT)
    copied(FOLDER)
    if find_spec("ziglang"):
        compile_for_others()
    name = compiler()
    say(f"building the CPU library by {name}: " + _lines(name, "--version")[0])
    environment = {**os.environ, "CC": name, "CXX": name, "FASTTAX_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--debug"]
    subprocess.run(command, cwd=FOLDER, env=environment, check=True)
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]]
    return subprocess.run(command, cwd=FOLDER, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
