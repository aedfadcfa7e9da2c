"""The Triton kernels of token_kl and token_stats without a GPU: the tests of the ops in Triton's
interpreter, and their machine code.

The interpreter checks results, not bounds, races or speed: budgets on the code that the compiler
makes for GPUs are below.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttax.kl.call import KINDS, tempering
from fasttax.triton import implementation, kl, kl_launch, rows, stats
from tests.tools.cuda_tools import ARITHMETIC, LOAD, STORE, basic_blocks, longest_run, steps
from tests.tools.triton_tools import TARGETS, Binary, compiled, run_in_the_interpreter

from triton.runtime.errors import OutOfResources, PTXASError  # isort: skip

SIZES = "test_vocabularies and (1003 or -17-) and (float32 or bfloat16)"
INTERPRETED: dict[
    str, tuple[str, int, list[str]]
] = {  # what runs again in the interpreter: a file, at least so many of its cases, and which
    "values and gradients": (
        "kl/test_kl.py",
        25,
        [SIZES, "test_options and float32 and (policy_ref or all or beta_tiny)"],
    ),
    "hard rows": (
        "kl/test_kl.py",
        20,
        [
            "test_peaks and 60-3000-apart",
            "rises_far and jsd",
            "test_peaks and 39-9000-ref and renyi",
            "test_small_kl and 1003",
            "test_equal and float32-policy_ref",
            "ends",
        ],
    ),
    "rows": (
        "kl/test_kl_rows.py",
        37,
        [
            "more_than",
            "test_minus_infinity and 130",
            "suppressed",
            "test_what and float32",
            "uninitialised",
            "alone_is and policy_ref",
            "left_alone",
            "test_mixed_dtypes",
            "test_layouts and bfloat16 and (unaligned or transposed or every_other_entry)",
        ],
    ),
    "stats": (
        "kl/test_kl_stats_rows.py",
        20,
        [
            SIZES,
            "test_options and float32 and pair and (all or softcaps or temperatures)",
            "coefficient",
            "collapsed",
            "test_equal and float32",
            "ids_out",
        ],
    ),
    "stats of hard rows": (
        "kl/test_kl_stats_rows.py",
        8,
        [
            "test_peaks and 60-3000-apart",
            "test_small_kl",
            "test_minus_infinity",
            "test_what and float32",
        ],
    ),
    "reduced": (
        "kl/test_kl_reduced.py",
        9,
        [
            "test_the_same_bits and float32-ref_policy-plain",
            "test_the_same_bits and float32-policy_ref-inf",
            "test_the_same_bits and float32-jsd-softcap",
            "test_the_same_bits and float32-renyi-tempered",
            "upstream",
            "only_what",
        ],
    ),
    "shards": (
        "kl/test_shard_merge.py",
        6,
        [
            "test_values_and_gradients and (apart or confident) and bfloat16",
            "test_infinities and propagate",
        ],
    ),
    "autograd": (
        "kl/test_kl_autograd.py",
        10,
        ["test_inplace_backward", "opcheck and plain", "two_losses"],
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
V = 151936  # Qwen's
OPS = {
    **{name: kind.number for name, kind in KINDS.items()},
    "stats": rows.STATS.value,
    "alone": rows.ALONE.value,
}
PAIR = {"x_ptr", "y_ptr"}
FORWARD, GRADIENT = (
    PAIR | {"value_ptr", "saved_ptr", "mask_ptr"},
    PAIR | {"saved_ptr", "upstream_ptr", "dx_ptr"},
)
ROLES = {  # a kernel and the pointers that it is given
    "forward": (kl.forward_kernel, FORWARD),
    "both": (kl.forward_kernel, PAIR | {"value_ptr", "weight_ptr", "dx_ptr"}),
    "gradient": (kl.gradient_kernel, GRADIENT),
    "gradients": (kl.gradient_kernel, GRADIENT | {"dy_ptr"}),
    "stats": (stats.forward_kernel, PAIR | {"ids_ptr", "values_ptr", "saved_ptr"}),
    "stats gradient": (stats.gradient_kernel, GRADIENT | {"ids_ptr"}),
    "stats gradients": (stats.gradient_kernel, GRADIENT | {"ids_ptr", "dy_ptr"}),
}
PLAIN, CAPPED, GENERAL = (frame.value for frame in (rows.PLAIN, rows.CAPPED, rows.GENERAL))
KLS, STATS = tuple(KINDS), ("stats", "alone")
CASES = [
    (role, op)
    for role in ROLES
    for op in (STATS if "stats" in role else KLS)
    if (role, op) != ("stats gradients", "alone")
]
FEW = [
    ("forward", "policy_ref"),
    ("both", "ref_policy"),
    ("gradients", "jsd"),
    ("stats", "stats"),
    ("stats gradient", "stats"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def shape_of(
    role: str, op: str, dtype: str, frame: int = PLAIN, vocabulary: int = V
) -> dict[str, int]:
    shape = rows.geometry(vocabulary, DTYPES[dtype], OPS[op], frame)
    return rows.gradient_geometry(shape) if role.startswith("gradient") else shape


def build(
    role: str,
    op: str,
    dtype: str,
    target: str,
    folder: Path,
    frame: int = PLAIN,
    ones: Collection[str] = (),
    vocabulary: int = V,
) -> Binary:
    kernel, pointers = ROLES[role]
    data = {"x_ptr", "y_ptr", "dx_ptr", "dy_ptr"}
    types: dict[str, Any] = {
        name: f"*{dtype}"
        if name in data
        else {"mask_ptr": "*i1", "ids_ptr": "*i64"}.get(name, "*fp32")
        for name in pointers
    }
    types |= {
        name: rows.Layout("i32", "i32", "i32")
        for name in kernel.arg_names
        if name.endswith("_layout")
    }
    types |= {"k": rows.Params(*["fp32"] * len(rows.Params._fields)), "V": "i32"} | (
        {"N": "i32"} if "N" in kernel.arg_names else {}
    )
    types = {name: of for name, of in types.items() if name not in ones}
    constants = {
        **dict.fromkeys(ones, 1),
        "OP": OPS[op],
        "FRAME": frame,
        "INF_MASK": False,
        "APPROX": target != "gfx942",
        **shape_of(role, op, dtype, frame, vocabulary),
    }
    options = rows.launch_options(OPS[op], frame, hip=target == "gfx942")
    return compiled(kernel, target, types, constants, options, folder)


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_accesses(target: str, folder: Path) -> None:
    """In registers enough for two programs on an SM, 16 bytes an access, and under way before the
    first is used 32 KB an SM (half of that in gradients, which interleave loads and arithmetic, and
    of one row alone).
    """
    for role, op in CASES if target == "sm_90" else FEW:
        for dtype in ("bf16", "fp32") if (role, op) in FEW and target == "sm_90" else ("bf16",):
            case = (role, op, dtype)
            binary = build(*case, target, folder)
            sweeps = [
                block
                for block in basic_blocks(binary.code)
                if any(re.match("MUFU.EX2|LDG.*128", step) for step in block)
            ]
            assert not any(re.match("STL|LDL", step) for block in sweeps for step in block), case
            assert binary.spills == 0, case
            if target == "gfx942":
                assert len(re.findall(r"(?:global|buffer)_load_dwordx4", binary.code)) >= 2, case
                continue
            assert binary.registers <= rows.REGISTERS, case
            opcodes = steps(binary.code)
            at_once = longest_run(opcodes, LOAD, ARITHMETIC) * 16 * rows.THREADS * 2
            assert at_once >= (16 if op == "alone" or "gradient" in role else 32) << 10, (
                case,
                at_once,
            )
            if "gradient" in role or role == "both":
                assert any(re.match(STORE, step) for step in opcodes), case


def frames(op: str, dtype: str) -> tuple[int, ...]:
    """That rows of this dtype may be brought into."""
    capped = op in ("policy_ref", "ref_policy") and dtype != "fp32"
    return (PLAIN, CAPPED, GENERAL) if capped else (PLAIN, GENERAL)


# All that a call may ask for: what rows.geometry and the arguments that are there make of it. A
# vocabulary is a large one that 16 divides or not, or one of a single tile.
CONFIGURATIONS = [
    (*case, dtype, frame, vocabulary)
    for case in CASES
    for dtype in DTYPES
    for frame in frames(case[1], dtype)
    for vocabulary in (V, 50257, 512)
]
# bytes a thread of jsd's sums, in 20 of 36 cases: two programs on an SM leave it 128 registers
SPILLED = {"sm_100": 56, "sm_120": 48}
STRIDE = 109  # with that each target compiles another 4 of the 426; `make test-ptx` has all


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=pytest.mark.full)])
def test_configurations_compile(target: str, stride: int, folder: Path) -> None:
    first = list(TARGETS).index(target) * 13 if stride > 1 else 0
    for role, op, dtype, frame, vocabulary in CONFIGURATIONS[first::stride]:
        case = (role, op, dtype, frame, vocabulary)
        binary = build(role, op, dtype, target, folder, frame, vocabulary=vocabulary)
        known = SPILLED if (op, frame) == ("jsd", PLAIN) and role in ("forward", "both") else {}
        assert binary.spills <= known.get(target, 0), case
        assert target == "gfx942" or binary.registers <= rows.registers(OPS[op], frame), case


@pytest.mark.parametrize(
    ("role", "op"),
    [case for case in CASES if case[0] in ("forward", "gradients", "stats")],
    ids=str,
)
def test_the_general_frame_does_not_spill(role: str, op: str, folder: Path) -> None:
    assert build(role, op, "bf16", "sm_90", folder, GENERAL).spills == 0


# exponentials an entry, where they are not two; jsd's slow steps have a block of two
EXPS = {("gradient", "policy_ref"): 1, ("stats", "alone"): 1, ("forward", "jsd"): 3}


@pytest.mark.parametrize(
    ("role", "op", "dtype", "most"),
    [
        ("forward", "policy_ref", "fp32", 28),
        ("forward", "policy_ref", "bf16", 25),
        ("forward", "ref_policy", "bf16", 27),
        ("forward", "jsd", "bf16", 41),
        ("stats", "stats", "bf16", 34),
        ("stats", "alone", "bf16", 12),
        ("gradient", "policy_ref", "bf16", 26),
        ("gradient", "ref_policy", "bf16", 36),
        ("gradient", "jsd", "bf16", 43),
    ],
)
def test_instructions_an_entry(role: str, op: str, dtype: str, most: int, folder: Path) -> None:
    """An H100 issues 132 x 4 x 32 instructions a cycle at 1.755 GHz and moves 3.35 TB/s: what keeps
    up with memory is 70 a pair of entries in a float32 forward, 35 in bfloat16, 53 in a bfloat16
    gradient. A forward's step has another block of 3 an entry, which loads and widens.
    """
    shape = shape_of(role, op, dtype)
    entries = shape["LANES"] * shape["WIDTH"] // rows.THREADS  # of a thread and tile
    exps = entries * EXPS.get((role, op), 2)
    blocks = basic_blocks(build(role, op, dtype, "sm_90", folder).code)
    sweeps = [
        len(block) for block in blocks if sum(step.startswith("MUFU.EX2") for step in block) >= exps
    ]
    assert sweeps
    assert min(sweeps) / entries <= most


@pytest.mark.parametrize(("op", "near", "far"), [("policy_ref", 35, 43), ("ref_policy", 39, 45)])
def test_instructions_of_a_capped_entry(op: str, near: int, far: int, folder: Path) -> None:
    """Of a step whose entries are near each other, with one exponential and one division for both
    rows' tanh, and of any other, with two and a bound on each; an entry's widening is in them.
    """
    shape = shape_of("forward", op, "bf16", CAPPED)
    entries = shape["LANES"] * shape["WIDTH"] // rows.THREADS
    binary = build("forward", op, "bf16", "sm_90", folder, CAPPED)
    assert binary.spills == 0
    sweeps = sorted(
        len(block) / entries
        for block in basic_blocks(binary.code)
        if sum(step.startswith("MUFU.RCP") for step in block) >= entries
    )
    assert sweeps[0] <= near
    assert sweeps[1] <= far


@pytest.mark.parametrize(
    ("role", "op"), [("forward", "policy_ref"), ("forward", "ref_policy"), ("stats", "stats")]
)
def test_one_sweep(role: str, op: str, folder: Path) -> None:
    """A step's loads are there twice, for whole steps and for a row's last one: no entry is read by
    another loop.
    """
    shape = shape_of(role, op, "bf16")
    at_once = 2 * shape["LANES"] // rows.THREADS
    code = build(role, op, "bf16", "sm_90", folder).code
    assert len(re.findall(r"LDG\.E\.\S*128", code)) == 2 * at_once


# results, in the interpreter


@pytest.mark.parametrize("subject", INTERPRETED)
def test_in_the_interpreter(subject: str) -> None:
    file, least, expressions = INTERPRETED[subject]
    assert (
        run_in_the_interpreter(file, " or ".join(f"({expression})" for expression in expressions))
        >= least
    )


@pytest.mark.parametrize("role", ["forward", "gradient", "stats", "stats gradient"])
def test_sizes_of_one_compile(role: str, folder: Path) -> None:
    """Triton makes an integer argument of 1 a constant, which the interpreter does not; one told
    not to stays an argument.
    """
    kernel = ROLES[role][0]
    ones = {
        name
        for name in ("N", "V")
        if name in kernel.arg_names and name not in kernel.do_not_specialize
    }
    op = "stats" if "stats" in role else "policy_ref"
    assert build(role, op, "fp32", "sm_90", folder, ones=ones).spills == 0


class Recorder:
    """Stands for a kernel, and keeps the grid it is started with."""

    grid: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return lambda *args, **constants: None


def test_rows_lie_on_the_grid_axis_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """65535 blocks are the most on the others (Liger#1294)."""
    recorder = Recorder()
    for module in (kl_launch, stats):
        for name in ("forward_kernel", "gradient_kernel"):
            monkeypatch.setattr(module, name, recorder)
    x = torch.zeros(70_000, 16)
    t = tempering("test")
    _, saved = kl_launch.token_kl(x, x, None, *t.args())
    assert recorder.grid == (70_000,)
    kl_launch.token_kl_backward(torch.ones(70_000), x, x, None, saved, *t.args(), True, False)
    assert recorder.grid == (70_000, 1)
    _, saved = stats.token_stats(x, x, None, None, *t.sides())
    assert recorder.grid == (70_000,)
    stats.token_stats_backward(
        torch.ones(6, 70_000), x, x, None, None, saved, *t.sides(), True, True
    )
    assert recorder.grid == (70_000, 1)


class Torn(Recorder):
    """Stands for a kernel that Triton can't compile or launch."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (RuntimeError("Failed to find C compiler. Please"), "install a C compiler and Python's"),
        (subprocess.CalledProcessError(1, ["gcc"]), "install a C compiler and Python's headers"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "FASTTAX_CUDA=1"),
        (AssertionError("libcuda.so cannot found!\nPlease"), "TRITON_LIBCUDA_PATH"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "`pip check`"),
        (OutOfResources(300000, 232448, "shared memory"), "FASTTAX_CUDA=1"),
        (PTXASError("no"), "`pip check`"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "empty_cache"),
        (
            RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
            "CUDA_LAUNCH_BLOCKING=1",
        ),
    ],
    ids=lambda of: type(of).__name__,
)
def test_what_triton_raises_names_the_op_and_the_way_out(
    error: Exception, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl_launch, "forward_kernel", Torn(error))
    x = torch.zeros(3, 16)
    op, options = implementation("token_kl"), tempering("test").args()
    with pytest.raises(RuntimeError, match="fasttax::token_kl: the Triton launch failed") as caught:
        op(x, x, None, *options)
    assert str(error) in str(caught.value)
    assert way_out in str(caught.value)
    of_triton_alone = way_out not in ("empty_cache", "CUDA_LAUNCH_BLOCKING=1")
    assert str(caught.value).endswith("or set FASTTAX_BACKEND=reference") == of_triton_alone
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("x")])
def test_what_others_raise_is_theirs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_launch, "forward_kernel", Torn(error))
    x = torch.zeros(3, 16)
    with pytest.raises(type(error)) as caught:
        implementation("token_kl")(x, x, None, *tempering("test").args())
    assert caught.value is error
