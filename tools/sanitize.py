"""The CPU library under ASan and UBSan, or TSan, and the tests that walk through its kernels.

    python tools/sanitize.py address tests/kl/test_kl.py
    python tools/sanitize.py thread tests/faults/test_processes.py -k eight

A copy of the tracked files in build/sanitize/KIND has the library, so that the one in use stays.
What the sanitizers see ends the run: they stop at the first error (address) or give the exit code
66 (thread).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tree_copy import ROOT, copied

FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python and torch leak by design, and load libraries that end in either order
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:verify_asan_link_order=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode=66:suppressions={ROOT / 'tools/tsan.txt'}",
}


MOST = 20_000  # characters that are shown of a process's reports


def say(text: str) -> None:
    print(f"[sanitize] {text}", flush=True)


def built(kind: str, folder: Path) -> None:
    """One instruction set, -O1 and with lines: a minute, and the kernels are the same source."""
    flags = f"{FLAGS[kind]} -fno-omit-frame-pointer"
    environment = {**os.environ, "CFLAGS": flags, "LDFLAGS": flags, "FASTTAX_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--debug"]
    subprocess.run([*command, "--isa", "native"], cwd=folder, env=environment, check=True)


def _found(library: str) -> str:
    command = ["g++", f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tried(kind: str, folder: Path, tests: list[str]) -> int:
    """Pytest's exit code, with the sanitizer's runtime before all other libraries."""
    # libstdc++ too: ASan looks for its exceptions when it begins, and Python is no C++
    libraries = [_found(RUNTIMES[kind]), _found("libstdc++.so")]
    reports = folder / "build/report"  # pytest keeps what is written to stderr
    for old in reports.parent.glob("report.*"):
        old.unlink()
    environment = {
        **os.environ,
        **{name: f"{options}:log_path={reports}" for name, options in OPTIONS.items()},
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(folder),
        "PYTHONMALLOC": "malloc",  # each object's memory has bounds
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", *tests]
    code = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    for report in sorted(reports.parent.glob("report.*")):
        print(report.read_text(errors="replace")[:MOST], flush=True)
        code = code or 66
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/sanitize.py", description=__doc__)
    parser.add_argument("kind", choices=[*FLAGS])
    parser.add_argument("--build-only", action="store_true", help="make the library, run no tests")
    kind, tests = parser.parse_known_args()
    folder = ROOT / "build/sanitize" / kind.kind
    copied(folder)
    say(f"building the CPU library with {FLAGS[kind.kind]} in {folder}")
    built(kind.kind, folder)
    if kind.build_only:
        return 0
    code = tried(kind.kind, folder, tests)
    say("nothing was found" if code == 0 else f"exit code {code}: see above")
    return code


if __name__ == "__main__":
    sys.exit(main())
