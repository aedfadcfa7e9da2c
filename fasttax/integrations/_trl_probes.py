"""A few tokens through TRL's own op and through its replacement: the same numbers, or no patch.

Each probe calls an op that has arguments of such names as TRL does, and returns values and
gradients, in float32. The
cases are those in which two versions of an op could differ: temperature, scale, softcap, bias,
masks, every divergence, every divisor.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

N, H, V = 5, 8, 13
TOLERANCE = 1e-4  # of the largest entry: roundings of float32, none of a formula
Op = Callable[..., Any]
Probe = Callable[[Op, Collection[str], str], list[Tensor]]


def disagreement(probe: Probe, names: Collection[str], own: Op, other: Op) -> str:
    """What tells two ops apart, "" where they give the same numbers.

    Both run on the CPU. A kernel of TRL's (1.15) that can't is run on the accelerator, or where
    there is none by Triton's interpreter.

    Args:
        probe: calls an op.
        names: the arguments that TRL's op has.
        own: TRL's op.
        other: fasttax's.
    """
    device = "cpu"
    with torch.enable_grad():
        try:
            theirs = _run(probe, names, own, device)
        except RuntimeError:  # Triton's, of a tensor that is on no GPU
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if accelerator is None else accelerator.type
            with contextlib.nullcontext() if accelerator is not None else _interpreted():
                theirs = _run(probe, names, own, device)
        ours = _run(probe, names, other, device)
    if len(theirs) != len(ours):
        return f"gives {len(theirs)} results where fasttax's op gives {len(ours)}"
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {a.dtype} {tuple(a.shape)}, fasttax's {b.dtype} {tuple(b.shape)}"
        size, off = (float(x.double().abs().max()) for x in (a, a.double() - b.double()))
        if not off <= TOLERANCE * max(size, 1e-3):
            return f"gives other numbers: result {i} differs by {off:.1e} of {size:.1e}"
    return ""


def _run(probe: Probe, names: Collection[str], op: Op, device: str) -> list[Tensor]:
    with torch.autocast(device, enabled=False), torch.device(device):
        return probe(op, names, device)


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """TRL's kernels, and the functions of Triton's language, run by Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # which the interpreter imports, and which takes the language's functions as they are
    importlib.import_module("triton.experimental.gluon")
    wanted = ("trl.kernels", "triton.language")
    before = [
        (vars(m), dict(vars(m))) for name, m in sys.modules.items() if name.startswith(wanted)
    ]
    for namespace, names in before:
        for name, value in names.items():
            if isinstance(value, JITFunction):
                namespace[name] = InterpretedFunction(value.fn)
    try:
        yield
    finally:
        InterpretedFunction.rewritten_fn.clear()
        for namespace, names in before:  # the interpreter leaves names of its own behind
            for name in set(namespace) - set(names):
                del namespace[name]
            namespace.update(names)


class _Numbers:
    """The same tensors every time, and none of the process's own random numbers."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []

    def normal(self, *shape: int, leaf: bool = True) -> Tensor:
        """Standard normal; a leaf's gradient is compared."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        x = x.to(self.device)
        if leaf:
            self.leaves.append(x.requires_grad_())
        return x

    def ids(self, *shape: int) -> Tensor:
        """Of a vocabulary of V."""
        return torch.randint(V, shape, generator=self.generator, device="cpu").to(self.device)

    def compared(self, results: Any) -> list[Tensor]:
        """The results and the gradients of a sum of those that have one, weighed unevenly."""
        tensors = [x for x in _flat(results) if isinstance(x, Tensor)]
        trained = [x for x in tensors if x.is_floating_point() and x.requires_grad]
        weights = [self.normal(*x.shape, leaf=False) for x in trained]
        grads = torch.autograd.grad(trained, self.leaves, weights, allow_unused=True)
        return [x.detach() for x in tensors] + [g for g in grads if g is not None]


def _flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def logprob(op: Op, names: Collection[str], device: str) -> list[Tensor]:
    """Every output; with and without bias, temperature, softcap and scale."""
    found = []
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for bias, temperature, softcap, scale in ((False, 1.0, None, 1.0), (True, 1.3, 4.0, 0.5)):
        n = _Numbers(device)
        hidden, weight = n.normal(N, H), n.normal(V, H)
        head_bias = n.normal(V) if bias else None
        results = op(hidden, weight, head_bias, n.ids(N), temperature, 2, softcap, scale, outputs)
        found += n.compared(results)
    return found


def divergence(op: Op, names: Collection[str], device: str) -> list[Tensor]:
    """Each divergence, and different constants on the two sides."""
    found = []
    for beta, constants in ((0.0, ()), (0.3, (1.3, 0.5, 4.0, 2.0, None)), (1.0, ())):
        n = _Numbers(device)
        student = n.normal(N, H), n.normal(V, H), n.normal(V)
        teacher = n.normal(N, H, leaf=False), n.normal(V, H, leaf=False), n.normal(V, leaf=False)
        value, entropy = op(*student, *teacher, beta, *constants)
        # TRL's entropy may have a graph that nobody differentiates
        found += [*n.compared(value), entropy.detach()]
    return found


def whole_divergence(op: Op, names: Collection[str], device: str) -> list[Tensor]:
    """With a divisor given and without."""
    found = []
    for beta, items in ((0.0, None), (0.3, 7), (1.0, None)):
        n = _Numbers(device)
        student, teacher = n.normal(1, N, H), n.normal(1, N, H, leaf=False)
        weight, teacher_weight = n.normal(V, H), n.normal(V, H, leaf=False)
        loss, entropy, count = op(
            student,
            teacher,
            weight,
            teacher_weight,
            torch.arange(N, device=device)[None] != 1,
            beta,
            num_items_in_batch=items,
            student_lm_head_bias=n.normal(V),
            student_logit_scale=0.5,
            teacher_final_logit_softcapping=4.0,
            temperature=1.3,
        )
        found += [*n.compared(loss), entropy.detach(), torch.as_tensor(count)]
    return found


def jsd(op: Op, names: Collection[str], device: str) -> list[Tensor]:
    """Each divergence and reduction, with labels and without."""
    found = []
    options: list[dict[str, Any]] = [
        {"beta": 0.0},
        {"beta": 0.3, "temperature": 1.3, "reduction": "sum"},
        {"beta": 1.0, "reduction": "mean"},
    ]
    if "num_items_in_batch" in names:
        options.append({"beta": 0.5, "num_items_in_batch": torch.tensor(7, device=device)})
    for option in options:
        for labelled in (True, False):
            n = _Numbers(device)
            student, teacher = n.normal(2, N, V), n.normal(2, N, V, leaf=False)
            labels = n.ids(2, N).masked_fill(torch.arange(N, device=device) == 1, -100)
            found += n.compared(op(student, teacher, labels if labelled else None, **option))
    return found


def selective(op: Op, names: Collection[str], device: str) -> list[Tensor]:
    """At one index a token, with a temperature where there is one."""
    options: list[dict[str, float]] = [{}]
    if "temperature" in names:
        options.append({"temperature": 1.3})
    found = []
    for option in options:
        n = _Numbers(device)
        found += n.compared(op(n.normal(2, N, V), n.ids(2, N), **option))
    return found


def online(op: Op, names: Collection[str], device: str) -> list[Tensor]:
    """On a model that is a table of logits, and on one whose prompt is cut."""
    found = []
    for longest in (100, 6):
        n = _Numbers(device)
        table = n.normal(V, V)

        def model(ids: Tensor, table: Tensor = table, **others: Any) -> Any:
            return SimpleNamespace(logits=table[ids])

        prompt, completion = n.ids(2, 4), n.ids(2, 3)
        trainer = SimpleNamespace(max_length=longest)
        masks = torch.ones_like(prompt), torch.ones_like(completion)
        found += n.compared(op(trainer, model, prompt, masks[0], completion, masks[1], None))
    return found
