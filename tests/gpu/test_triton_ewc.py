"""The Triton kernels of EWC without a GPU: the ops against fasttax.reference in Triton's
interpreter, and that they compile for GPUs.

The interpreter checks results, not bounds, races or speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import reference
from fasttax._base.packed import SPLIT, encode, encode_anchor
from fasttax.triton import ewc, ewc_adamw, ewc_lora
from tests.tools.cuda_tools import ROOT, steps
from tests.tools.triton_tools import compiled

SIZES = (0, 1, 257, 2048 + 5)  # none, one, beyond a block of 256, beyond a program
MIXES = {  # theta, grad, anchor, Fisher
    "float32": (torch.float32, torch.float32, "fp32", "fp32"),
    "half": (torch.bfloat16, torch.bfloat16, "bf16", "bf16"),
    "packed": (torch.float32, torch.float16, SPLIT, "u8log"),
}
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def lists(mix: str) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    theta, grad, anchor, storage = MIXES[mix]
    stored = [encode(torch.randn(n).exp(), storage) for n in SIZES]
    out = {
        name: [torch.randn(n).to(d) for n in SIZES]
        for name, d in (("params", theta), ("grads", grad), ("m", theta))
    }
    out["v"] = [torch.rand(n).add(0.1).to(theta) for n in SIZES]
    out["anchors"] = [encode_anchor(torch.randn(n), NAMES.get(anchor, anchor)) for n in SIZES]
    out["fishers"] = [s.values for s in stored]
    out["scales"] = [s.scales for s in stored if s.scales is not None]
    return out


def close(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2 * torch.finfo(w.dtype).eps + 2e-5, atol=2e-5)


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def check_lists() -> None:
    """Penalty, backward, add_grad_ and prox_, also at strengths that float32 cannot hold."""
    op = torch.ops.fasttax
    for mix in MIXES:
        x = lists(mix)
        held = x["anchors"], x["fishers"], x["scales"]
        close(
            [op.ewc_penalty(x["params"], *held, 3.0)],
            [reference.ewc_penalty(x["params"], *held, 3.0)],
        )
        upstream = torch.tensor(0.7)
        close(
            op.ewc_penalty_backward(upstream, x["params"], *held, 3.0),
            reference.ewc_penalty_backward(upstream, x["params"], *held, 3.0),
        )
        grads = [clones(x["grads"]) for _ in range(2)]
        values = [
            f.ewc_add_grad_(x["params"], g, *held, 0.5, 0.3)
            for f, g in zip((op, reference), grads, strict=True)
        ]
        close([values[0], *grads[0]], [values[1], *grads[1]])
        for step in (0.3, 1e12, 1e45):
            params = [clones(x["params"]) for _ in range(2)]
            for f, p in zip((op, reference), params, strict=True):
                f.ewc_prox_(p, *held, step)
            close(*params)


def check_adamw() -> None:
    """Every mode, amsgrad, a GradScaler's tensors, the second moment, parameters not held."""
    empty = torch.empty(0)
    scale, fine, inf = torch.tensor(8.0), torch.tensor(0.0), torch.tensor([1.0])
    cases = (
        (False, 0.0, False, None, None),
        (True, 0.0, True, scale, fine),
        (False, 2.0, False, None, None),
        (True, 2.0, False, None, None),
        (True, 0.0, False, scale, inf),
    )
    for mix in MIXES:
        for prox, second, amsgrad, grad_scale, found_inf in cases:
            results = []
            for f in (torch.ops.fasttax, reference):
                x = lists(mix)
                anchors = [empty if i == 2 else a for i, a in enumerate(x["anchors"])]
                fishers = [empty] * len(SIZES) if second else x["fishers"]
                steps = [torch.tensor(float(i)) for i in range(len(SIZES))]
                most = clones(x["v"]) if amsgrad else []
                value = f.ewc_adamw_(
                    params=x["params"],
                    grads=x["grads"],
                    exp_avgs=x["m"],
                    exp_avg_sqs=x["v"],
                    max_exp_avg_sqs=most,
                    steps=steps,
                    anchors=anchors,
                    fishers=fishers,
                    scales=[] if second else x["scales"],
                    prox_mode=prox,
                    strength=0.4,
                    second_moment=second,
                    lr=torch.tensor(0.01, dtype=torch.float64),
                    beta1=0.9,
                    beta2=0.999,
                    eps=1e-8,
                    weight_decay=0.01,
                    maximize=True,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                )
                results.append([value, *x["params"], *x["m"], *x["v"], *most, *steps])
            close(*results)


def check_lora() -> None:
    for shape in ((1, 1, 1), (3, 33, 65), (17, 70, 130)):
        r, out, width = shape
        for dtype, storage in ((torch.float32, "fp32"), (torch.bfloat16, "u8log")):
            a, b, stored = (
                torch.randn(r, width).to(dtype),
                torch.randn(out, r).to(dtype),
                encode(torch.randn(out, width).exp(), storage),
            )
            scales = torch.empty(0) if stored.scales is None else stored.scales
            for gradient in (True, False):
                got, want = (
                    f.lora_ewc_penalty(a, b, stored.values, scales, 0.25, 3.0, gradient)
                    for f in (torch.ops.fasttax, reference)
                )
                for g, w in zip(got, want, strict=True):
                    torch.testing.assert_close(
                        g, w, rtol=3e-5, atol=1e-5 * float(w.abs().max()) if w.numel() else 0.0
                    )


def test_in_the_interpreter() -> None:
    """In one process of its own: Triton chooses the interpreter when it is imported."""
    code = (
        "import test_triton_ewc as t; from fasttax._base import library; "
        "assert library.active('ewc_adamw_', 'cpu')[0] == 'Triton'; "
        "t.check_lists(); t.check_adamw(); t.check_lora()"
    )
    environment = {
        **os.environ,
        "FASTTAX_BACKEND": "triton",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "packed": "*fp32"}
SCALARS = (
    "first",
    "second",
    "eps",
    "weight_decay",
    "strength_first",
    "strength_second",
    "second_moment",
    "sign",
    "factor",
)


def types_of(kernel: Any, mix: str, left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Of a kernel's arguments, the operands in a mix of dtypes."""
    types = {}
    for name in kernel.arg_names:
        if name in left_out or name.isupper():
            continue
        if name in SCALARS:
            types[name] = "fp32"
        elif name in ("n", "r", "out", "width"):
            types[name] = "i32"
        else:
            packed = (
                {"anchor_ptr": "*bf16", "lo_ptr": "*i8", "fisher_ptr": "*u8"}
                if mix == "packed"
                else {}
            )
            fixed = {
                "parts_ptr": "*fp64",
                "scales_ptr": "*fp32",
                "step_ptr": "*fp32",
                "lr_ptr": "*fp64",
                "beta1": "*fp64",
                "beta2": "*fp64",
                "scale_ptr": "*fp32",
                "inf_ptr": "*fp32",
                "upstream_ptr": "*fp32",
            }
            types[name] = packed.get(name) or fixed.get(name) or POINTERS[mix]
    return types


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_for_gpus_without_spills_and_with_wide_loads(target: str, tmp_path: Path) -> None:
    warps = {"num_warps": 4}
    for mix in POINTERS if target == "sm_90" else ("fp32",):
        kinds = {"SPLIT": mix == "packed", "U8": mix == "packed", "BLOCK": ewc.BLOCK}
        built = {
            "add": compiled(
                ewc.ewc_kernel,
                target,
                types_of(ewc.ewc_kernel, mix),
                {"MODE": ewc.ADD.value, **kinds},
                warps,
                tmp_path,
            )
        }
        constants = {"MODE": ewc.PROX.value, "AMSGRAD": False, "FROM_SECOND": False, **kinds}
        built["adamw"] = compiled(
            ewc_adamw.adamw_kernel,
            target,
            types_of(ewc_adamw.adamw_kernel, mix),
            constants,
            warps,
            tmp_path,
        )
        for name, binary in built.items():
            assert binary.spills == 0, (name, mix)
            if target.startswith("sm") and mix == "fp32":
                wide = sum(bool(re.match(r"LDG\.E.*\.128", step)) for step in steps(binary.code))
                assert wide >= {"add": 4, "adamw": 6}[name] * ewc.BLOCK // (128 * 4), (name, wide)
    meta = {"U8": False, "R": 16, "ROWS": 32, "COLS": 64}
    for kernel, extra in (
        (ewc_lora.lora_rows_kernel, {"GRADIENT": True}),
        (ewc_lora.lora_columns_kernel, {}),
    ):
        types = types_of(kernel, "fp32") | {name: "*fp32" for name in ("a_ptr", "b_ptr")}
        assert compiled(kernel, target, types, {**meta, **extra}, warps, tmp_path).spills == 0
