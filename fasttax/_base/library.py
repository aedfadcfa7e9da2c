"""The `fasttax::` operator library: schemas, the backend behind each op, and why.

One kernel per (op, device). Every op has its PyTorch reference registered for all devices;
`fasttax._C` (C++) puts its kernels over it on the CPU, `fasttax._C_cuda` (CUDA C++) on GPUs, and
`fasttax.triton` on GPUs what CUDA C++ leaves open. FASTTAX_BACKEND forces another choice:

    auto (default)  native kernels where they are built, else Triton's on GPUs, the reference
                    elsewhere
    reference       the reference everywhere
    cpp             as auto, and an error at import where the C++ CPU library is not built
    cuda            as auto, and an error at import where the CUDA C++ library is not built
    triton          Triton's kernels on GPUs, CUDA C++ nowhere, and an error at import without
                    triton; with TRITON_INTERPRET=1 on the CPU too, in Triton's interpreter
                    (slow; for tests and debugging)
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttax import triton
from fasttax._base import unbuilt
from fasttax._base.modes import compiling

PACKAGE = Path(__file__).resolve().parents[1]
BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")

# deregisters when collected, so it lives as long as the process
lib = torch.library.Library("fasttax", "DEF")
OPS: list[str] = []
COMPOSED: dict[str, tuple[str, ...]] = {}  # op -> the ops that it calls beside GEMMs
problems: dict[str, str] = {}  # library -> why it is not loaded
on_triton: dict[tuple[str, str], str] = {}  # (op, dispatch key) that Triton serves -> why
# The device types on which the ops over logits take policy and reference in dtypes of their own:
# one float32, the other bfloat16 or float16. Elsewhere fasttax.kl gives them one dtype first.
own_dtypes: set[str] = set()
_OWN_DTYPES = {"CUDA C++": True, "Triton": triton.OWN_DTYPES, "C++": False, "reference": True}


def chosen_backend() -> str:
    """FASTTAX_BACKEND, or "auto".

    Raises:
        ImportError: it is none of BACKENDS.
    """
    choice = os.environ.get("FASTTAX_BACKEND", "auto").lower()
    if choice not in BACKENDS:
        raise ImportError(
            f"FASTTAX_BACKEND must be one of {', '.join(BACKENDS)}, got {choice!r}; set one or "
            "unset it"
        )
    return choice


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    calls: Sequence[str] = (),
) -> None:
    """Defines an op by schema, with its reference on every device and its shape function.

    `calls`: the ops between whose GEMMs it is made, if it is, and so needs no kernel of its own.

    `_reference_<op>` is the reference whatever is registered over it: a GPU's kernels hand float64
    to it.
    """
    name = schema.partition("(")[0]
    OPS.append(name)
    if calls:
        COMPOSED[name] = tuple(calls)
    lib.define("_reference_" + schema)
    lib.impl("_reference_" + name, reference, "CompositeExplicitAutograd")
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    lib.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fasttax::{name}", fake, lib=lib)
    if "!" in schema or "Tensor[]" in schema.partition("->")[0]:  # which torch can't loop over
        lib.impl(name, _refuse_vmap(name.strip("_")), "FuncTorchBatched")


def _refuse_vmap(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name}: torch.func.vmap: expected tensors outside of it, got one that it maps over; "
            "call the op in a loop over that dimension, or its twin in fasttax.reference, which is "
            "plain PyTorch"
        )

    return refuse


def second_derivative_message(forward: str, name: str) -> str:
    """What to say where the graph of `name`, the backward of `forward`, is used."""
    return (
        f"{forward}: second derivatives are not available (create_graph=True reached {name}); "
        "use fasttax.reference with autograd for them"
    )


def no_double_backward(name: str, forward: str) -> None:
    """Makes differentiating through a backward op an error.

    Torch would give None gradients and a warning.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message(forward, name))

    torch.library.register_autograd(f"fasttax::{name}", refuse, lib=lib)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient that was computed without a graph.

    Differentiating it further is an error, not a silent 0.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message(ctx.op, "its backward"))


def no_second_derivative(gradients: Sequence[Tensor | None], op: str) -> list[Tensor | None]:
    """Gradients made without a graph, under create_graph.

    Using what autograd would take for their graph is an error.
    """
    if not torch.is_grad_enabled() or compiling():
        return list(gradients)
    marker = torch.zeros((), requires_grad=True)
    return [None if d is None else _NoSecondDerivative.apply(d, marker, op) for d in gradients]


def _load(library: str) -> None:
    try:
        importlib.import_module(f"fasttax.{library}")
    except ModuleNotFoundError:
        problems[library] = "not built"
    except (ImportError, OSError) as error:
        problems[library] = f"does not load: {error}"


def prefer_huge_pages(t: Tensor) -> Tensor:
    """Advises the system to back a fresh CPU tensor with large pages.

    560 page faults for 100 MB where 4 KB ones take 24,600.
    """
    torch.ops.fasttax._prefer_huge_pages(t)
    return t


def _has_kernel(op: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttax::{op}", key))


def _register_triton(key: str, why: str) -> None:
    for name in triton.MODULES:
        if name in OPS and not _has_kernel(name, key):
            lib.impl(name, triton.implementation(name), key)
            on_triton[name, key] = why


def _define_helpers() -> None:
    """The ops that `_C` alone implements; their callers ask `problems` whether it is there."""
    # 0 portable, 1 AVX2, 2 AVX-512
    lib.define("_simd_level(int level) -> int")
    lib.define("_prefer_huge_pages(Tensor t) -> ()")
    lib.impl("_prefer_huge_pages", lambda t: None, "CompositeExplicitAutograd")
    # project() and gemm() in _base/gemm.py
    lib.define("_project_(Tensor(a!) out, Tensor hidden, Tensor weight) -> ()")
    lib.define("_gemm_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")
    lib.define("_bf16_gemm() -> bool")


def _left_out(choice: str, interpreted: bool) -> dict[str, str]:
    """The native libraries that are not to be loaded, and why."""
    if choice == "reference":
        return dict.fromkeys(("_C", "_C_cuda"), "FASTTAX_BACKEND=reference")
    why = {}
    if interpreted:
        why["_C"] = "FASTTAX_BACKEND=triton with TRITON_INTERPRET=1"
    if choice == "triton":
        why["_C_cuda"] = "FASTTAX_BACKEND=triton"
    elif not torch.version.cuda:
        why["_C_cuda"] = "this torch is built without CUDA"
    return why


def load_native() -> None:
    """Imports the native libraries, which register their kernels, and registers Triton's.

    Raises:
        ImportError: FASTTAX_BACKEND names a backend that is not there.
    """
    choice = chosen_backend()
    _define_helpers()
    if choice == "triton" and not triton.available():
        raise ImportError(
            "fasttax: FASTTAX_BACKEND=triton, but triton is not installed; `pip install triton` "
            "(torch for GPUs brings it on Linux)"
        )
    interpreted = choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    problems.update(_left_out(choice, interpreted))
    for library in ("_C", "_C_cuda"):
        if library not in problems:
            _load(library)
    if choice == "reference":
        return
    _register_kernels_of_triton(choice, interpreted)
    for device in ("cpu", "cuda"):
        if all(_OWN_DTYPES[active(op, device)[0]] for op in ("token_kl", "token_stats")):
            own_dtypes.add(device)
    if not interpreted:
        _tell_what_is_missing(choice)


def _register_kernels_of_triton(choice: str, interpreted: bool) -> None:
    if triton.available() and (choice == "triton" or torch.version.cuda or torch.version.hip):
        why = f"CUDA C++: {problems.get('_C_cuda', 'no kernel of its own for this op')}"
        _register_triton("CUDA", "FASTTAX_BACKEND=triton" if choice == "triton" else why)
    if interpreted:
        _register_triton("CPU", "TRITON_INTERPRET=1")


def _tell_what_is_missing(choice: str) -> None:
    if "_C" in problems:
        advice = unbuilt.advice(PACKAGE, problems["_C"])
        if choice == "cpp":
            raise ImportError(advice)
        warnings.warn(advice, RuntimeWarning, stacklevel=4)
    if choice == "cuda" and "_C_cuda" in problems:
        raise ImportError(
            "fasttax: FASTTAX_BACKEND=cuda, but the CUDA C++ kernels are not available "
            f"({problems['_C_cuda']}); install nvcc and a torch with CUDA, then "
            "`FASTTAX_CUDA=1 pip install --no-build-isolation .`"
        )


def active(name: str, device: str) -> tuple[str, str]:
    """(backend, reason) of op `name` on "cpu" or "cuda".

    The backend is "composed" of an op made of others, whose backends the reason says.
    """
    if name in COMPOSED:
        called = [f"{op} ({active(op, device)[0]})" for op in COMPOSED[name]]
        return "composed", f"calls {', '.join(called)} between GEMMs"
    key = device.upper()
    if (name, key) in on_triton:
        return "Triton", on_triton[name, key]
    library, language = {"CPU": ("_C", "C++"), "CUDA": ("_C_cuda", "CUDA C++")}[key]
    if _has_kernel(name, key):
        return language, "built and registered"
    return "reference", problems.get(
        library, f"no {language} kernel of its own: PyTorch's operations do it"
    )
