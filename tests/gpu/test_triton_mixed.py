"""A half-width policy beside a float32 reference, and the reverse, in the Triton kernels: each row
read as it is, in Triton's interpreter and in machine code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fasttax

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
from fasttax.triton import kl, rows, stats
from tests.tools.triton_tools import check_in_the_interpreter, compiled

HALVES = (torch.bfloat16, torch.float16)
PAIRS = [pair for half in HALVES for pair in ((half, torch.float32), (torch.float32, half))]
V = 2064  # 16 divides it; more than a step of a small row


def check() -> None:
    """Values of widened rows, gradients in each row's dtype, and no widened copy for a kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    given: list[set[torch.dtype]] = []
    run = InterpretedFunction.run

    def seen(self: Any, x: Any, y: Any, *args: Any, **options: Any) -> Any:
        given.append({x.dtype, y.dtype})
        return run(self, x, y, *args, **options)

    for of_x, of_y in PAIRS:
        x, y = torch.randn(3, V).to(of_x), torch.randn(3, V).to(of_y)
        for kind in ("policy_ref", "ref_policy", "jsd"):
            results = []
            for a, b in ((x, y), (x.float(), y.float())):
                a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
                given.clear()
                with mock.patch.object(InterpretedFunction, "run", seen):
                    value = fasttax.token_kl(a, b, kind=kind)
                    gradients = torch.autograd.grad(value.sum(), (a, b))
                assert given == [{a.dtype, b.dtype}] * 2, given
                assert [d.dtype for d in gradients] == [a.dtype, b.dtype]
                results.append((value, *gradients))
            for mixed, wide in zip(*results, strict=True):
                torch.testing.assert_close(mixed, wide.to(mixed.dtype), rtol=8e-3, atol=1e-6)
            torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
        check_stats(x, y)


def check_stats(x: torch.Tensor, y: torch.Tensor) -> None:
    outputs = ("entropy", "kl_policy_ref", "kl_ref_policy")
    results = []
    for a, b in ((x, y), (x.float(), y.float())):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        of = fasttax.token_stats(a, b, outputs=outputs)
        total = sum(getattr(of, name).sum() for name in outputs)
        gradients = torch.autograd.grad(total, (a, b))
        assert [d.dtype for d in gradients] == [a.dtype, b.dtype]
        results.append((*(getattr(of, name) for name in outputs), *gradients))
    for i, (mixed, wide) in enumerate(zip(*results, strict=True)):
        rtol = 1e-6 if i < len(outputs) else 8e-3
        torch.testing.assert_close(mixed, wide.to(mixed.dtype), rtol=rtol, atol=1e-6)


def test_each_row_is_read_as_it_is() -> None:
    check_in_the_interpreter(__file__, "t.check()")


FORWARD = {"x_ptr", "y_ptr", "value_ptr", "saved_ptr"}
GRADIENT = {"x_ptr", "y_ptr", "saved_ptr", "upstream_ptr", "dx_ptr", "dy_ptr"}
KERNELS: dict[str, tuple[Any, set[str], int]] = {
    "forward": (kl.forward_kernel, FORWARD, rows.POLICY_REF.value),
    "gradients": (kl.gradient_kernel, GRADIENT, rows.POLICY_REF.value),
    "stats": (
        stats.forward_kernel,
        {"x_ptr", "y_ptr", "values_ptr", "saved_ptr"},
        rows.STATS.value,
    ),
    "stats gradients": (stats.gradient_kernel, GRADIENT, rows.STATS.value),
}


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, policy: str, tmp_path: Path) -> None:
    """No spills, and 16 bytes an access of either row, of which float32 has two for each."""
    kernel, pointers, op = KERNELS[name]
    ref = {"bf16": "fp32", "fp32": "bf16"}[policy]
    own = {"x_ptr": policy, "dx_ptr": policy, "y_ptr": ref, "dy_ptr": ref}
    types: dict[str, Any] = {name: "*" + own.get(name, "fp32") for name in pointers}
    layouts = (name for name in kernel.arg_names if name.endswith("_layout"))
    types |= {name: rows.Layout("i32", "i32", "i32") for name in layouts}
    types |= {"k": rows.Params(*["fp32"] * len(rows.Params._fields)), "V": "i32"}
    if "N" in kernel.arg_names:
        types["N"] = "i32"
    shape = rows.geometry(151936, torch.bfloat16, op, False)
    if "gradients" in name:
        shape = rows.gradient_geometry(shape)
    constants = {"OP": op, "GENERAL": False, "INF_MASK": False, "APPROX": True, **shape}
    options = rows.launch_options(op, False, hip=False)
    binary = compiled(kernel, "sm_90", types, constants, options, tmp_path)
    assert binary.spills == 0
    vectors = shape["LANES"] // rows.THREADS
    wide, narrow = (len(re.findall(rf"LDG\.E\.{bits}", binary.code)) for bits in ("128", "64"))
    assert wide >= 3 * vectors
    assert narrow == 0
