"""The fake CUDA (fake_cuda.h) as its cases ask it, in a process that has it preloaded."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any

ALL = 1 << 62  # blocks
INVALID_VALUE, OUT_OF_RESOURCES, NO_IMAGE, PTX_TOO_NEW = 1, 701, 209, 222

_library = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
_library.fake_cuda_log.restype = ctypes.c_char_p
_library.fake_cuda_blocks.restype = ctypes.c_int64

Call = dict[str, Any]


def reset() -> None:
    """An H100 that has been asked nothing, runs nothing and fails at nothing."""
    _library.fake_cuda_reset()


def clear() -> None:
    """Forgets what was asked."""
    _library.fake_cuda_clear()


def log() -> list[Call]:
    """What it was asked since the last `clear`, in order."""
    return [json.loads(line) for line in _library.fake_cuda_log().decode().splitlines()]


def launches() -> list[Call]:
    """Those of csrc/cuda's kernels."""
    return [
        call for call in log() if call["call"] == "launch" and "fasttax::" in call.get("kernel", "")
    ]


def limits(multiprocessors: int, major: int, block: int, sm: int, cluster: int) -> None:
    """The device's: bytes of shared memory a block and an SM, blocks of the largest cluster."""
    _library.fake_cuda_limits(multiprocessors, major, block, sm, cluster)


def fail(call: str, error: int, after: int = 0) -> None:
    """A call by this name, or with these words in its record, fails, after so many that do not."""
    _library.fake_cuda_fail(call.encode(), error, after)


def run(blocks: int) -> None:
    """The last so many blocks of each launch run on the SIMT machine."""
    _library.fake_cuda_run(ctypes.c_int64(blocks))


def runs() -> int:
    """How many do."""
    return int(_library.fake_cuda_blocks())


def last_error() -> int:
    """What cudaPeekAtLastError gives."""
    return int(_library.cudaPeekAtLastError())
