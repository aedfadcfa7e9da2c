"""The model as the estimator sees it: what it takes, what it gives, and how it runs under taps."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.fisher import batches, sharding
from fasttax.fisher.passes import Pass, address
from fasttax.fisher.rules.routing import RoutingBlock
from fasttax.fisher.tap import Tap

OP = "DiagonalFisher.update"
_WAY_OUT = (
    "for a classifier pass labels of shape (B,); for anything else use observe() with your own loss"
)


def bare(model: nn.Module) -> nn.Module:
    """The module itself, of a DistributedDataParallel or a compiled one."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return dict(model.named_children()).get("_orig_mod", model)


@dataclass(frozen=True)
class View:
    """A model, its taps, and the options that say how it is read.

    Attributes:
        model: as `bare` gives it.
        given: as the user gave it.
        device: where batches go.
        taps: one behind each module that owns a parameter of the estimate.
        blocks: what runs example by example.
        unit: see DiagonalFisher; `labels` and `shift` too.
    """

    model: nn.Module
    given: nn.Module
    device: torch.device
    taps: Sequence[Tap]
    blocks: Sequence[RoutingBlock]
    unit: str
    labels: str
    shift: bool

    # --- what goes in and what comes out ----------------------------------------------------------

    def read(self, batch: Any) -> batches.Batch:
        """A batch as the model takes it, checked.

        Raises:
            ValueError, TypeError: the batch or the model's mode does not fit.
        """
        if isinstance(batch, Mapping):
            sharding.refuse_context_parallel(OP, self.unit, *batch.values())
        embedding = None
        if hasattr(self.model, "config"):
            embedding = _called(self.model, "get_input_embeddings")
        self.check_mode()
        return batches.read(
            OP,
            batch,
            self.device,
            getattr(embedding, "num_embeddings", None),
            positions=_takes(self.model, "position_ids"),
            shift=self.shift,
        )

    def check_mode(self) -> None:
        """Refuses batch norms that mix the examples; warns of dropout.

        Raises:
            ValueError: a batch norm is in train mode.
        """
        training = [(where, m) for where, m in self.model.named_modules() if m.training]
        for where, m in training:
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"DiagonalFisher: model: expected batch norms in eval mode, got {where} in "
                    "train mode, which mixes the examples; call model.eval()"
                )
        if any(_drops(m) for _, m in training):
            warnings.warn(
                "DiagonalFisher: the model is in train mode and has dropout; the estimate is of "
                "the dropped-out model (call model.eval())",
                stacklevel=4,
            )

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's logits: its output, or the output's `.logits`; None where it has neither."""
        arguments = dict(inputs)
        if hasattr(self.model, "config") and hasattr(self.model, "generate"):
            arguments.setdefault("use_cache", False)
        output = self.model(**arguments)
        return output if isinstance(output, Tensor) else getattr(output, "logits", None)

    def forward(self, batch: batches.Batch) -> Tensor:
        """The logits of a batch: (B, T, V), or a classifier's (B, V).

        Raises:
            ValueError, TypeError: they have another shape.
        """
        logits = self.run(batch.inputs)
        expected = f"an output with logits of shape {(*batch.targets.shape, 'V')}"
        if not isinstance(logits, Tensor):
            raise checks.fail(OP, "model", expected, type(logits).__name__, _WAY_OUT)
        classifies = logits.dim() == 2 and logits.shape[0] == batch.shape[0] and not batch.labelled
        if classifies and self.labels == "true":
            raise checks.fail(
                OP,
                "batch",
                "a key 'labels' of shape (B,) for a classifier with labels='true'",
                "none",
            )
        if not classifies and logits.shape[:-1] != batch.targets.shape:
            raise checks.fail(OP, "model", expected, logits, _WAY_OUT)
        return logits

    def head(self, current: Pass, logits: Tensor) -> Tap:
        """The tap of the head.

        The model's output embedding, or the linear layer whose output the logits are.

        Raises:
            ValueError: neither has a tap.
        """
        head = _called(self.model, "get_output_embeddings")
        for tap in self.taps:
            if tap.role == "head" and tap.module is head:
                return tap
        last: Tap | None = current.outputs.get(address(logits))
        if last is None or last.role != "head":
            raise checks.fail(
                OP,
                "labels",
                "a linear head among params whose output is the logits with 'exact_head'",
                "none found",
                "use labels='sample', or name the head in params=",
            )
        return last

    # --- how it runs ------------------------------------------------------------------------------

    @property
    def cuda_devices(self) -> list[int]:
        """Whose random state a run of the model moves."""
        return sorted({p.device.index for p in self.model.parameters() if p.is_cuda})

    @contextlib.contextmanager
    def tapped(self) -> Iterator[None]:
        """Taps in place and every parameter frozen, so that autograd computes no weight gradient.

        All undone at the end, the random state too.
        """
        handles: list[Any] = []
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            for p, _ in flags:
                p.requires_grad_(False)
            parts: list[Tap | RoutingBlock] = [*self.taps, *self.blocks]
            handles.extend(part.install() for part in parts)
            with self._differentiable(), _uncompiled(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for p, flag in flags:
                p.requires_grad_(flag)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """A DistributedDataParallel does not synchronise gradients, of which there are none."""
        if isinstance(self.given, nn.parallel.DistributedDataParallel):
            with self.given.no_sync():
                yield
        else:
            yield

    def gradients(
        self,
        params: Mapping[str, Tensor],
        batch: batches.Batch,
        score: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Autograd's gradients of `params` alone, of those that have one.

        By .backward(), since reentrant checkpointing refuses torch.autograd.grad. Flags, every
        p.grad and the random state are as before at the end.

        Args:
            params: name -> parameter of the model.
            batch: one example.
            score: the gradient at its logits, from the logits.
        """
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        wanted = {id(p) for p in params.values()}
        try:
            for p, _, _ in before:
                p.requires_grad_(id(p) in wanted)
                p.grad = None
            with self._differentiable():
                logits = self.forward(batch)
                logits.backward(score(logits).to(logits.dtype))
            return {n: p.grad for n, p in params.items() if p.grad is not None}
        finally:
            for p, flag, grad in before:
                p.requires_grad_(flag)
                p.grad = grad

    @contextlib.contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Autograd on, inside checkpoints of frozen embeddings too; random state put back."""
        handle = _require_input_grad(self.model)
        try:
            with (
                torch.random.fork_rng(devices=self.cuda_devices),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                yield
        finally:
            if handle is not None:
                handle.remove()


def _called(model: nn.Module, method: str) -> Any:
    """What a transformers method of the model gives; None where it has none."""
    ask: Any = getattr(model, method, None)
    return None if ask is None else ask()


def _takes(model: nn.Module, argument: str) -> bool:
    wrapped: Any = model
    while hasattr(wrapped, "get_base_model"):  # PEFT's forward takes anything
        wrapped = wrapped.get_base_model()
    return argument in inspect.signature(wrapped.forward).parameters


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return getattr(module, "attention_dropout", 0) not in (0, None)


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled parts run eagerly: hooks that came after compilation are not in compiled code."""
    for where, m in model.named_modules():
        if where.endswith("_orig_mod") or m._compiled_call_impl is not None:
            return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _require_input_grad(model: nn.Module) -> Any:
    """A hook that makes the embeddings' output require grad; None where nothing needs it.

    Reentrant checkpointing differentiates a block only where its input requires grad, and here
    embeddings may be frozen.
    """
    if not hasattr(model, "get_input_embeddings") or not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    ):
        return None

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_(True)

    return _called(model, "get_input_embeddings").register_forward_hook(hook)
