"""The Triton kernels of EWC without a GPU: the ops against fasttax.reference in Triton's
interpreter, and that they compile for GPUs.

The interpreter checks results, not bounds, races or speed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fasttax import reference
from fasttax._base.packed import SPLIT, encode, encode_anchor
from fasttax.triton import ewc, ewc_adamw, ewc_lora, tables
from tests.tools.cuda_tools import steps
from tests.tools.triton_tools import TARGETS, check_in_the_interpreter, compiled

# none, one, beyond a block of 256, whole blocks of the loop, beyond a program
SIZES = (0, 1, 257, 4096, tables.CHUNK + 2048 + 5)
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


def check_groups() -> None:
    """Of several dtypes in one list each takes a launch, and leaves its own parts of the value."""
    both = [lists(mix) for mix in ("float32", "half")]
    params, grads, anchors, fishers, scales = (
        [t for x in both for t in x[name]]
        for name in ("params", "grads", "anchors", "fishers", "scales")
    )
    held = anchors, fishers, scales
    values = [f.ewc_penalty(params, *held, 3.0) for f in (torch.ops.fasttax, reference)]
    close(*([value] for value in values))
    added = []
    for f in (torch.ops.fasttax, reference):
        own = clones(grads)
        added.append([f.ewc_add_grad_(params, own, *held, 0.5, 0.3), *own])
    close(*added)


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
    check_in_the_interpreter(
        __file__,
        "from fasttax._base import library; "
        "assert library.active('ewc_adamw_', 'cpu')[0] == 'Triton'; "
        "t.check_lists(); t.check_groups(); t.check_adamw(); t.check_lora(); t.check_launches(); "
        "t.check_alignment()",
    )


# --- what one launch takes ------------------------------------------------------------------------


def check_launches() -> None:
    """A model's 300 parameters: one launch for each mix of dtypes and alignment, and one for the
    value, or for the value and the steps.
    """
    started: list[str] = []
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        started.append(self.fn.__name__)
        return run(self, *args, **options)

    sizes = [1 + i % 7 for i in range(300)]
    theta, grad, fisher = ([torch.rand(n) for n in sizes] for _ in range(3))
    m, v = ([torch.zeros(n) for n in sizes] for _ in range(2))
    steps = [torch.zeros(()) for _ in sizes]
    op: Any = torch.ops.fasttax
    held: tuple[Any, ...] = (theta, fisher, [])
    with mock.patch.object(InterpretedFunction, "run", counted):
        op.ewc_penalty(theta, *held, 1.0)
        assert started == ["ewc_kernel", "sum_kernel"], started
        op.ewc_add_grad_(theta, grad, *held, 1.0, 1.0, torch.tensor(2.0))
        assert started[2:] == ["ewc_kernel", "sum_kernel"], started
        op.ewc_prox_(theta, *held, 1.0)
        assert started[4:] == ["ewc_kernel"], started
        options = (False, 1.0, 0.0, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.0, False, None, None)
        op.ewc_adamw_(theta, grad, m, v, [], steps, *held, *options)
        assert started[5:] == ["adamw_kernel", "end_kernel"], started
        op.accumulate_sqgrad_(fisher, grad, 0.5)
        assert started[7:] == ["squares_kernel"], started
    assert all(float(step) == 1.0 for step in steps)


def check_alignment() -> None:
    """Tensors off the 16 bytes are another launch's, whose loads are narrow."""
    n = 4099
    groups = {}
    for shift in (0, 1):
        theta, grad, anchor, fisher = (torch.randn(n + shift)[shift:] for _ in range(4))
        fisher = fisher.abs()
        got, want = grad.clone(), grad.clone()
        if shift:
            got = torch.cat((grad[:1], grad))[1:]
        rest: tuple[Any, ...] = ([theta], [got], [anchor], [fisher], [], 0.5, 2.0)
        torch.ops.fasttax.ewc_add_grad_(*rest)
        reference.ewc_add_grad_([theta], [want], *rest[2:])
        close([got], [want])
        (group,) = tables.grouped(1, lambda i: 0, [(theta, grad, anchor, fisher)].__getitem__)
        groups[shift] = group.aligned
    assert groups == {0: True, 1: False}


def test_a_graphs_table_is_written_by_launches_that_carry_the_numbers() -> None:
    values = [0, 1, 2**62 + 3, -5, 4096]
    assert tables.written(values, torch.empty(0)).tolist() == values


# --- the machine code -----------------------------------------------------------------------------

MIX = {  # theta, anchor, Fisher, gradient and moments
    "fp32": (tl.float32, tl.float32, tl.float32, tl.float32),
    "bf16": (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
    "packed": (tl.float32, tl.uint8, tl.uint8, tl.float32),
}
TYPES = {
    "table_ptr": "*i64",
    "parts_ptr": "*fp64",
    "times_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "inf_ptr": "*fp32",
    "out_ptr": "*fp32",
    "rows": "i32",
    "count": "i32",
    **dict.fromkeys(("lr", "beta1", "beta2"), ("fp32", "fp32")),
    **dict.fromkeys(("first", "second", "strength_first", "strength_second"), "fp32"),
    **dict.fromkeys(("eps", "weight_decay", "second_moment", "sign"), "fp32"),
}


def types_of(kernel: Any) -> dict[str, Any]:
    """Of the arguments that are no constants; a learning rate from the host."""
    return {name: TYPES[name] for name in kernel.arg_names if name in TYPES}


def wide_accesses(code: str, step: str) -> int:
    return sum(bool(re.match(step + r"\.E.*\.128", word)) for word in steps(code))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_gpus_without_spills_and_with_wide_loads(target: str, tmp_path: Path) -> None:
    """The addresses and the sizes lie in memory: nothing tells the compiler what divides them but
    the kernels themselves.
    """
    warps = {"num_warps": 4}
    rounds = tables.BLOCK // (128 * 4)
    for mix in MIX if target == "sm_90" else ("fp32",):
        theta, anchor, fisher, grad = MIX[mix]
        held = {"THETA": theta, "ANCHOR": anchor, "FISHER": fisher, "ALIGNED": True}
        add = {**held, "MODE": ewc.ADD.value, "OUT": grad, "BLOCK": tables.BLOCK}
        step = {
            **held,
            **dict.fromkeys(("GRADS", "FIRST", "SECOND"), grad),
            "STEPS": tl.float32,
            "MODE": ewc.PROX.value,
            "AMSGRAD": False,
            "FROM_SECOND": False,
            "BLOCK": tables.BLOCK,
        }
        built = {}
        for name, kernel, constants in (
            ("add", ewc.ewc_kernel, add),
            ("adamw", ewc_adamw.adamw_kernel, step),
        ):
            binary = compiled(kernel, target, types_of(kernel), constants, warps, tmp_path)
            assert binary.spills == 0, (name, mix)
            built[name] = binary
        if target.startswith("sm"):
            wide = {
                name: (wide_accesses(b.code, "LDG"), wide_accesses(b.code, "STG"))
                for name, b in built.items()
            }
            # theta, anchor, Fisher, gradient; and both moments
            read = {"fp32": (4, 6), "bf16": (2, 3), "packed": (2, 4)}[mix]
            written = {"fp32": (1, 3), "bf16": (0.5, 1.5), "packed": (1, 3)}[mix]
            for k, name in enumerate(built):
                loads, stores = wide[name]
                assert loads >= read[k] * rounds, (mix, wide)
                assert stores >= written[k] * rounds, (mix, wide)
                assert built[name].registers <= 128, (name, built[name].registers)  # 16 warps
        misaligned = compiled(
            ewc.ewc_kernel,
            target,
            types_of(ewc.ewc_kernel),
            {**add, "ALIGNED": False},
            warps,
            tmp_path,
        )
        assert misaligned.spills == 0
    ends = {"STEPS": tl.float32, "ROWS": ewc_adamw.ROWS, "PARTS": tables.PARTS}
    for kernel, constants in (
        (tables.sum_kernel, {"PARTS": tables.PARTS}),
        (ewc_adamw.end_kernel, ends),
    ):
        assert compiled(kernel, target, types_of(kernel), constants, warps, tmp_path).spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_lora_compiles_without_spills(target: str, tmp_path: Path) -> None:
    meta = {"U8": False, "R": 16, "ROWS": 32, "COLS": 64}
    types = {
        **dict.fromkeys(("a_ptr", "b_ptr", "fisher_ptr", "scales_ptr", "d_a_ptr"), "*fp32"),
        **dict.fromkeys(("d_b_ptr",), "*fp32"),
        "parts_ptr": "*fp64",
        "factor": "fp32",
        **dict.fromkeys(("r", "out", "width"), "i32"),
    }
    for kernel, extra in (
        (ewc_lora.lora_rows_kernel, {"GRADIENT": True}),
        (ewc_lora.lora_columns_kernel, {}),
    ):
        own = {name: types[name] for name in kernel.arg_names if name in types}
        built = compiled(kernel, target, own, {**meta, **extra}, {"num_warps": 4}, tmp_path)
        assert built.spills == 0
