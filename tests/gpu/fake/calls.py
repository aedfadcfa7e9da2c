"""One call of each op that CUDA C++ or Triton serves, and what its reference makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.gpu.fake import control

N, V = 3, 2085  # two spans of a warp and a tail; rows that are not aligned
KL = (0, 0.5, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, False)  # of csrc/call/kl_call.h
JSD = (2, *KL[1:])
SIDES = (1.0, 1.0, 0.0, 0.0, 1.0, 1.0)


def _random(*sizes: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(sizes, generator=_generator)).to(dtype)


_generator = torch.Generator()


def _rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Policy in a wider matrix, reference folded otherwise: strides of three dimensions."""
    x = _random(N, 2, V + 3, scale=3.0, dtype=dtype)
    return x[..., :V], (x + _random(N, 2, V + 3, scale=0.3, dtype=dtype)).to(dtype)[..., :V]


class Saved(NamedTuple):
    """What `op` on the same device keeps for its backward: each backend's own."""

    op: str
    args: Sequence[Any]


def _reference(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.fasttax, f"_reference_{op}")


MASK = torch.tensor([[True, False], [True, True], [True, True]])


def _kl_backward(options: Sequence[Any]) -> list[Any]:
    x, y = _rows()
    saved = Saved("token_kl", [x, y, MASK, *options])
    return [_random(N, 2), x, y, MASK, saved, *options, True, True]


def _in_place() -> list[Any]:
    x, y = (t.contiguous() for t in _rows())
    saved = Saved("token_kl", [x, y, None, *KL])
    return [_random(N, 2), x, y, None, saved, *KL, True]


def _ids() -> Tensor:
    return torch.arange(2 * N).reshape(N, 2) * 317


def _stats_backward() -> list[Any]:
    x, y = _rows()
    saved = Saved("token_stats", [x, y, _ids(), None, *SIDES])
    return [_random(6, N, 2), x, y, _ids(), None, saved, *SIDES, True, True]


def _lists(dtype: torch.dtype, count: int, last: int = 65536 + 77) -> list[Tensor]:
    return [_random(*size, dtype=dtype) for size in ((5,), (33, 70), (last,))[:count]]


def _ewc(*more: Any) -> list[Any]:
    positive = [t.abs() for t in _lists(torch.float32, 3)]
    return [_lists(torch.bfloat16, 3), _lists(torch.bfloat16, 3), positive, [], *more]


def _ewc_grads(*more: Any) -> list[Any]:
    params, *rest = _ewc(*more)
    return [params, _lists(torch.bfloat16, 3), *rest]


def _adamw() -> list[Any]:
    first = [_lists(torch.float32, 3) for _ in range(3)]
    squares = [t.square() for t in _lists(torch.float32, 3)]
    steps = [torch.tensor(4.0) for _ in range(3)]
    held = [_lists(torch.float32, 3), [t.abs() for t in _lists(torch.float32, 3)]]
    lr = torch.tensor(1e-2)
    numbers = [False, 0.5, 0.0, lr, 0.9, 0.999, 1e-8, 0.01, False, None, None]
    return [*first, squares, [], steps, *held, [], *numbers]


def _weigh() -> list[Any]:
    return [[_random(6, N, 2), _random(2, N, 2)], [0, 6, -1], [3, 4, 5], MASK, None]


_OF_ALL = (2, 1.5, 5.0, False)  # mean, scale, clip, reverse

ARGUMENTS: dict[str, Callable[[], list[Any]]] = {
    "token_kl": lambda: [*_rows(), MASK, *KL],
    "token_kl of bfloat16": lambda: [*_rows(torch.bfloat16), None, *KL],
    "token_kl of bfloat16 and float32": lambda: [_rows(torch.bfloat16)[0], _rows()[1], None, *KL],
    "token_kl of jsd": lambda: [*_rows(), None, *JSD],
    "token_kl_grad": lambda: [_random(N, 2), *_rows(), MASK, *KL, True, False],
    "token_kl_backward": lambda: _kl_backward(KL),
    "token_kl_backward of jsd": lambda: _kl_backward(JSD),
    "token_kl_backward_": _in_place,
    "token_stats": lambda: [*_rows(), _ids(), MASK, *SIDES],
    "token_stats_backward": _stats_backward,
    "ewc_penalty": lambda: _ewc(0.5),
    "ewc_penalty_backward": lambda: [torch.tensor(2.0), *_ewc(0.5)],
    "ewc_add_grad_": lambda: _ewc_grads(0.5, 2.0, torch.tensor(3.0)),
    "ewc_prox_": lambda: _ewc(0.1, None),
    "ewc_adamw_": _adamw,
    "accumulate_sqgrad_": lambda: [
        [t.abs() for t in _lists(torch.float32, 3)],
        _lists(torch.bfloat16, 3),
        0.3,
    ],
    "token_weights": lambda: [_random(N, 2), MASK, _random(N, 2), 2, 0.7],
    "weigh_tokens": lambda: [*_weigh(), *_OF_ALL],
    "weigh_tokens_backward": lambda: [
        [torch.tensor(2.0), torch.tensor(3.0)],
        [0, 2],
        *_weigh(),
        *_OF_ALL,
    ],
    "scale_held_": lambda: [_random(6, 1000, dtype=torch.bfloat16), _random(6)],
}


def _squares(lengths: Sequence[int], *widths: int) -> list[Any]:
    """Rows of the widths, in examples of the lengths, and the examples' weights."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    rows = [_random(int(ends[-1]), width, dtype=torch.bfloat16) for width in widths]
    return [*rows, ends, _random(len(lengths)).abs()]


def _lora() -> list[Any]:
    return [_random(4, 65), _random(33, 4), _random(33, 65).abs(), torch.empty(0), 0.5, 3.0, True]


OF_TRITON: dict[str, Callable[[], list[Any]]] = {
    **ARGUMENTS,
    "linear_sqgrad_": lambda: [_random(70, 37), *_squares((5, 0, 4), 37, 70)],
    "linear_sqgrad_ of single tokens": lambda: [_random(70, 37), *_squares((1,) * 9, 37, 70)],
    "bias_sqgrad_": lambda: [_random(70), *_squares((5, 4), 70)],
    "norm_sqgrad_": lambda: [_random(70), *_squares((5, 4), 70, 70)],
    "embedding_sqgrad_": lambda: [
        _random(11, 70),
        torch.arange(9) % 5,
        *_squares((5, 4), 70),
        -1,
    ],
    "label_variance_": lambda: [_random(N, V)],
    "lora_ewc_penalty": _lora,
}


def op_of(name: str) -> str:
    """The op that a name is a call to."""
    return name.partition(" ")[0]


def arguments(name: str) -> list[Any]:
    """The same ones on every call, on the CPU."""
    _generator.manual_seed(5)
    return OF_TRITON[name]()


def moved(args: list[Any], device: torch.device) -> list[Any]:
    """The tensors on `device`, with the strides that they have, and what backwards need."""

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        there = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
        for there_row, row in zip(_rows_of(there), _rows_of(t), strict=True):
            there_row.copy_(row)  # contiguous: a copy, and no kernel of torch's
        return there

    def forward(saved: Saved) -> Tensor:
        there = [one(arg) for arg in saved.args]
        blocks = control.runs()
        control.run(control.ALL)
        out: Tensor = getattr(torch.ops.fasttax, saved.op)(*there)[1]
        control.run(blocks)
        return out

    out = [forward(a) if isinstance(a, Saved) else tree_map(one, a) for a in args]
    control.clear()
    return out


def _rows_of(t: Tensor) -> list[Tensor]:
    if t.is_contiguous():
        return [t]
    return [row for part in t.unbind() for row in _rows_of(part)]


def call(name: str, args: list[Any]) -> list[Tensor]:
    """What the op gives, but for what is kept for backward, and what it may have written."""
    return _results(name, getattr(torch.ops.fasttax, op_of(name))(*args), args)


def truth(name: str) -> list[Tensor]:
    """What the reference gives for the same."""
    args = [_reference(a.op)(*a.args)[1] if isinstance(a, Saved) else a for a in arguments(name)]
    return _results(name, _reference(op_of(name))(*args), args)


def _results(name: str, out: Any, args: list[Any]) -> list[Tensor]:
    if op_of(name) in ("token_kl", "token_stats"):
        return [out[0]]
    written = args if op_of(name).endswith("_") else []
    if op_of(name) == "token_kl_backward_":
        written = [args[1]]
    return [t for t in tree_leaves([out, written]) if isinstance(t, Tensor) and t.numel()]


def home(t: Tensor) -> Tensor:
    """On the CPU, by copies alone."""
    if t.is_contiguous():
        return t.cpu()
    return torch.stack([home(part) for part in t.unbind()])
