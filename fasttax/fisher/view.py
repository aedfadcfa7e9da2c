"""The model as the estimator sees it: what it takes, what it gives, and how it runs under taps."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax._base.interrupts import deferred
from fasttax._base.uncached import uncached
from fasttax.fisher import batches, sharding
from fasttax.fisher.passes import Pass, address
from fasttax.fisher.rules.module import drops
from fasttax.fisher.rules.routing import RoutingBlock
from fasttax.fisher.tap import Tap
from fasttax.fisher.task import Task, takes

Ran = TypeVar("Ran")

OP = "DiagonalFisher.update"
_TAPPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules under an estimator's taps
_WAY_OUT = (
    "for a classifier pass labels of shape (B,); for anything else use observe() with your own loss"
)


class NoClosedForm(ValueError):
    """The Fisher of a model's head cannot be taken over all labels at once."""


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
        unit: see DiagonalFisher; `labels` too.
        task: what the model says of its labels.
    """

    model: nn.Module
    given: nn.Module
    device: torch.device
    taps: Sequence[Tap]
    blocks: Sequence[RoutingBlock]
    unit: str
    labels: str
    task: Task

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
            self.task,
            getattr(embedding, "num_embeddings", None),
            positions=takes(self.model, "position_ids"),
        )

    def check_mode(self) -> None:
        """Refuses batch norms that mix the examples; warns of dropout.

        Raises:
            ValueError: a batch norm is in train mode, or has no running statistics.
        """
        for where, m in self.model.named_modules():
            if not isinstance(m, nn.modules.batchnorm._BatchNorm):
                continue
            if m.training:
                raise ValueError(
                    f"DiagonalFisher: model: expected batch norms in eval mode, got {where} "
                    f"({type(m).__name__}) in train mode, which mixes the examples; call "
                    "model.eval()"
                )
            if m.running_mean is None:
                raise ValueError(
                    "DiagonalFisher: model: expected batch norms with running statistics, got "
                    f"{where} ({type(m).__name__}) without, which mixes the examples in eval mode "
                    "too; build it with track_running_stats=True, or use a group norm"
                )
        if any(drops(m) for m in self.model.modules() if m.training):
            warnings.warn(
                "DiagonalFisher: the model is in train mode and has dropout; the estimate is of "
                "the dropped-out model (call model.eval())",
                stacklevel=4,
            )

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's logits: its output, or the output's `.logits`; None where it has neither."""
        with uncached(self.model):
            output = self.model(**inputs)
        return output if isinstance(output, Tensor) else getattr(output, "logits", None)

    def forward(self, batch: batches.Batch) -> Tensor:
        """The logits of a batch: (B, T, V), or a classifier's (B, V).

        Raises:
            ValueError, TypeError: they have another shape, or no gradient by any parameter.
        """
        logits = self.run(batch.inputs)
        expected = f"an output with logits of shape {(*batch.targets.shape, 'V')}"
        if not isinstance(logits, Tensor):
            raise checks.fail(OP, "model", expected, type(logits).__name__, _WAY_OUT)
        whole = logits.dim() == 2 and logits.shape[0] == batch.shape[0]
        outputs = batch.labelled and batch.targets.is_floating_point()
        classifies = whole and (not batch.labelled or outputs)
        if classifies and self.labels == "true" and not batch.labelled:
            raise checks.fail(
                OP,
                "batch",
                "a key 'labels' of shape (B,) for a classifier with labels='true'",
                "none",
            )
        if not classifies and logits.shape[:-1] != batch.targets.shape:
            raise checks.fail(OP, "model", expected, logits, _WAY_OUT)
        if torch.is_grad_enabled() and not logits.requires_grad:
            raise checks.fail(
                OP,
                "params",
                "parameters that the logits depend on through the modules that hold them",
                "none: others compute with them, as with LoRA's of one parameter "
                "(target_parameters)",
                "pass fallback='loop', unless the forward has no gradient at all (no_grad within "
                "it, activations that are quantised: quantise the weights alone)",
            )
        _refuse_odd(logits, batch.counted)
        return logits

    def head(self, current: Pass, logits: Tensor, batch: batches.Batch) -> Tap:
        """The tap of the head.

        The model's output embedding, or the linear layer whose output the logits are.

        Raises:
            NoClosedForm: neither has a tap, or the batch's labels are no softmax's.
        """
        if batch.likelihood != "softmax":
            expected = f"'sample' or 'true' with likelihood={batch.likelihood!r}"
            raise checks.fail(OP, "labels", expected, "'exact_head'", error=NoClosedForm)
        found = self.output_embedding()
        if found is not None:
            return found
        last: Tap | None = current.outputs.get(address(logits))
        if last is None or last.role != "head":
            raise checks.fail(
                OP,
                "labels",
                "a linear head among params whose output is the logits with 'exact_head'",
                "none found",
                "use labels='sample', or name the head in params=",
                NoClosedForm,
            )
        return last

    def output_embedding(self) -> Tap | None:
        """The tap of the head that the model itself names, if it is one."""
        head = _called(self.model, "get_output_embeddings")
        taps = (tap for tap in self.taps if tap.role == "head" and tap.module is head)
        return next(taps, None)

    # --- how it runs ------------------------------------------------------------------------------

    @property
    def cuda_devices(self) -> list[int]:
        """Whose random state a run of the model moves."""
        return sorted({p.device.index for p in self.model.parameters() if p.is_cuda})

    @contextlib.contextmanager
    def tapped(self, differentiated: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Taps in place and every parameter frozen, so that autograd computes no weight gradient.

        All undone at the end, every p.grad and the random state too.

        Args:
            differentiated: parameters that autograd is to give a .grad inside all the same.

        Raises:
            RuntimeError: the model is under another estimator's taps.
        """
        self._refuse_taps()
        parts: list[Tap | RoutingBlock] = [*self.taps, *self.blocks]
        handles: list[Any] = []

        def install() -> None:
            _TAPPED.update(tap.module for tap in self.taps)
            handles.extend(part.install() for part in parts)

        def remove() -> None:
            while handles:
                handles.pop().remove()
            _TAPPED.difference_update(tap.module for tap in self.taps)

        wanted = (differentiated or {}).values()
        with (
            self._requiring_grad(wanted),
            _whole(install, remove),
            self._differentiable(),
            _uncompiled(self.model),
            uncached(self.model),
        ):
            yield

    @contextlib.contextmanager
    def _requiring_grad(self, params: Iterable[Tensor]) -> Iterator[None]:
        """Inside, `params` alone require grad and have none; at the end all are as before."""
        wanted = {id(p) for p in params}
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]

        def change() -> None:
            for p, _, _ in before:
                p.requires_grad_(id(p) in wanted)
                if id(p) in wanted:
                    p.grad = None

        def restore() -> None:
            for p, flag, grad in before:
                p.requires_grad_(flag)
                if id(p) in wanted:
                    p.grad = grad

        with _whole(change, restore):
            yield

    def _refuse_taps(self) -> None:
        """Two estimators would both count what runs under the taps of one.

        Raises:
            RuntimeError: the model is under taps.
        """
        if any(tap in _TAPPED for tap in self.model.modules()):
            raise RuntimeError(
                "DiagonalFisher: the model is under the taps of an estimator's observe() block, "
                "which would count this batch too; call update() or observe() after that block"
            )

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

        Args:
            params: name -> parameter of the model.
            batch: one example.
            score: the gradient at its logits, from the logits.
        """

        def backward() -> None:
            logits = self.forward(batch)
            logits.backward(score(logits).to(logits.dtype))

        return self.gradients_of(params, backward)

    def gradients_of(
        self, params: Mapping[str, Tensor], backward: Callable[[], None]
    ) -> dict[str, Tensor]:
        """What backward() leaves in the .grad of `params`, of those that get one.

        By .backward(), since reentrant checkpointing refuses torch.autograd.grad. Flags, every
        p.grad and the random state are as before at the end.
        """
        self._refuse_taps()
        with self._requiring_grad(params.values()), self._differentiable():
            backward()
            return {n: p.grad for n, p in params.items() if p.grad is not None}

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


@contextlib.contextmanager
def _whole(change: Callable[[], None], restore: Callable[[], None]) -> Iterator[None]:
    """change() before and restore() after, each as a whole also under Ctrl-C."""
    try:
        with deferred():
            change()
        yield
    finally:
        try:
            with deferred():
                restore()
        except KeyboardInterrupt:
            restore()
            raise


def _refuse_odd(logits: Tensor, counted: Tensor) -> None:
    """An error of logits that would make every sum of squares NaN; on a GPU `Sums.over`'s.

    Padding may have any, and a vocabulary entries of -inf.
    """
    if not checks.has_values(logits) or counted.shape != logits.shape[:-1] or not logits.numel():
        return
    odd = ~logits.detach().amax(-1).isfinite() & counted
    if bool(odd.any()):
        rows = odd.reshape(odd.shape[0], -1).any(1).nonzero().flatten().tolist()
        raise checks.fail(
            OP,
            "batch",
            "examples whose logits are finite",
            f"NaN or inf in rows {', '.join(map(str, rows[:5]))}",
            "leave them out (nothing of the batch is counted), or look at the model's weights",
        )


def _called(model: nn.Module, method: str) -> Any:
    """What a transformers method of the model gives; None where it has none, or none for it."""
    ask: Any = getattr(model, method, None)
    if ask is None:
        return None
    with contextlib.suppress(NotImplementedError, AttributeError):
        return ask()
    return None


def without_gradients(run: Callable[[], Ran]) -> Ran:
    """What `run` gives without gradients, or with them where the model's forward needs them.

    As it does for retain_grad() and for hooks on its activations.
    """
    try:
        with torch.no_grad():
            return run()
    except RuntimeError:
        with torch.enable_grad():
            return run()


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
