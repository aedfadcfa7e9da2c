"""The Triton kernels, for NVIDIA and AMD GPUs: no compiler needed at install.

Nothing here imports triton before the first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
from collections.abc import Callable
from typing import Any

MODULES = {  # op -> the module that has it, by the op's own name
    "linear_sqgrad_": "fisher_linear",
    "bias_sqgrad_": "fisher",
    "norm_sqgrad_": "fisher",
    "embedding_sqgrad_": "fisher",
    "label_variance_": "fisher",
    "accumulate_sqgrad_": "fisher",
    "token_kl": "kl_launch",
    "token_kl_grad": "kl_launch",
    "token_kl_backward": "kl_launch",
    "token_kl_backward_": "kl_launch",
    "token_weights": "weigh",
    "weigh_tokens": "weigh",
    "weigh_tokens_backward": "weigh",
    "scale_held_": "weigh",
    "token_stats": "stats",
    "token_stats_backward": "stats",
    "ewc_penalty": "ewc",
    "ewc_penalty_backward": "ewc",
    "ewc_add_grad_": "ewc",
    "ewc_prox_": "ewc",
    "ewc_adamw_": "ewc_adamw",
    "lora_ewc_penalty": "ewc_lora",
}

# What a driver says of a kernel that ran before, at whichever call comes next.
FAULTS = ("illegal memory access", "device-side assert", "misaligned address", "launch failure")

# Whether token_kl*, token_stats* and their gradients read float32 beside bfloat16 or float16 rows
# as they are (_base/library.py: own_dtypes).
OWN_DTYPES = True


def available() -> bool:
    """Whether triton is installed; it is imported on use."""
    return importlib.util.find_spec("triton") is not None


def implementation(op: str) -> Callable[..., Any]:
    """The op, which imports its module when it is first called.

    What Triton raises as it compiles or launches names the op and the way out.
    """

    def call(*args: Any) -> Any:
        launch = getattr(importlib.import_module(f"fasttax.triton.{MODULES[op]}"), op)
        try:
            return launch(*args)
        except Exception as error:
            way_out = _way_out(error)
            if not way_out:
                raise
            raise RuntimeError(
                f"fasttax::{op}: the Triton launch failed: {error}; {way_out}"
            ) from error

    return call


def _way_out(error: Exception) -> str:
    """Of an error of Triton's own; "" of any other."""
    words = str(error)
    if words.startswith("Triton Error ["):
        if "out of memory" in words:
            return "give memory back that torch keeps (torch.cuda.empty_cache()), or take less"
        if any(fault in words for fault in FAULTS):
            return "it may be an earlier kernel's fault: CUDA_LAUNCH_BLOCKING=1 shows whose it is"
    remedy = _remedy(error, words)
    return f"{remedy}, or set FASTTAX_BACKEND=reference" if remedy else ""


def _remedy(error: Exception, words: str) -> str:
    """Of an error that other kernels would not have.

    Beside kernels Triton compiles a launcher in C, by the compiler that it finds.
    """
    if isinstance(error, subprocess.CalledProcessError) or words.startswith("Failed to find C"):
        return "install a C compiler and Python's headers (python3-dev), or name one in CC"
    if words.startswith("libcuda.so cannot found"):
        return "have the driver's libcuda.so.1 found (ldconfig, or TRITON_LIBCUDA_PATH)"
    if words.startswith("Triton Error [") or type(error).__name__ == "OutOfResources":
        return "build the CUDA C++ kernels (FASTTAX_CUDA=1), install a driver that fits the GPU"
    if type(error).__module__.partition(".")[0] == "triton" or "active drivers" in words:
        return "install the triton that this torch asks for (`pip check`)"
    return ""


def on_device(t: Any) -> Any:
    """A launch goes to the current device; nothing for a CPU tensor (the interpreter's)."""
    from torch.cuda import device_of

    return device_of(t)
