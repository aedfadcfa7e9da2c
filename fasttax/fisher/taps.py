"""Taps: where the squared per-example gradients of a module's parameters are taken, inside one
ordinary backward pass.

A tap is an identity on a module's output whose backward sees D (the gradient at the output) beside
what the module saw in its forward, and hands both to the sums. The parameters themselves are frozen
meanwhile, so that autograd computes no weight gradient: the square takes its place. Inputs are kept
by save_for_backward, so activation checkpointing, reentrant or not, treats them as any saved
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fasttax.fisher import sharding
from fasttax.fisher.passes import WAY_OUT, Pass, in_backward
from fasttax.fisher.pieces import Rows


class Sink(Protocol):
    """The estimator's side of a tap."""

    current: Pass | None

    def take(self, current: Pass, name: str, piece: Rows) -> None: ...
    def take_gradients(
        self, current: Pass, tap: Any, call: tuple[Any, ...], several: bool
    ) -> None: ...


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, seed: Tensor, record: Callable[..., None], *saved: Tensor
    ) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(*saved)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            ctx.record(d, *saved)
        return d, None, None, *[None] * len(saved)


def _batched(y: Tensor, x: Tensor, current: Pass) -> tuple[Tensor, Tensor]:
    """What was computed once for the whole batch (position embeddings, of (1, T) or (T,)) as one
    copy for each example.
    """
    batch = 1 if current.only is not None else current.batch
    T = current.shape[1] if current.shape is not None else None
    if batch > 1 and y.dim() > 1 and y.shape[0] == 1:
        return y.expand(batch, *y.shape[1:]), x.expand(batch, *x.shape[1:])
    once = (
        x.dim() == 1 and y.dim() == 2 and T is not None and x.shape[0] == T != current.layout()[0]
    )
    return (y.expand(batch, *y.shape), x.expand(batch, *x.shape)) if once and batch > 1 else (y, x)


class Tap:
    """Base: a forward hook that puts the tap behind a module.

    `names` maps the module's own parameter names to the model's.
    """

    def __init__(self, sink: Sink, module: nn.Module, where: str, names: dict[str, str]) -> None:
        self.sink, self.module, self.where, self.names = sink, module, where, names
        self.parallel = False  # the module's input and output are split over ranks by features
        self.seed: Tensor | None = None

    def install(self) -> Any:
        # first of the module's hooks: what others make of its output is not its own
        return self.module.register_forward_hook(self._hook, with_kwargs=True, prepend=True)

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any
    ) -> Any:
        current = self.sink.current
        if current is None:
            return y  # a tap's own rerun of a module
        if in_backward():
            current.recomputed = True
        else:
            current.calls[self] += 1
        if not torch.is_grad_enabled():
            return y  # a reentrant checkpoint's first pass, or somebody's evaluation
        return self._tapped(current, args, kwargs, y)

    def _apply(self, y: Tensor, record: Callable[..., None], *saved: Tensor) -> Tensor:
        if (
            self.seed is None or self.seed.device != y.device
        ):  # makes the output require grad though every parameter is frozen
            self.seed = torch.zeros((), device=y.device, requires_grad=True)
        out: Tensor = _Tap.apply(y, self.seed, record, *saved)
        return out

    def _tapped(self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(y, Tensor) or not isinstance(x, Tensor):
            raise TypeError(
                f"DiagonalFisher: {self.where} ({type(self.module).__name__}): expected one tensor "
                f"in and one out; {WAY_OUT}"
            )
        y, x = _batched(y, x.detach(), current)
        only = current.only
        like = sharding.placements(y)

        def record(d: Tensor, x: Tensor) -> None:
            self.parallel = like is not None
            leading = x.shape[: self.leading(x)]
            self.record(
                current,
                sharding.local(d, self.where, like),
                sharding.local(x, self.where),
                current.segments(leading, self.where, only),
            )

        return self._apply(y, record, x)

    def leading(self, x: Tensor) -> int:
        return x.dim() - 1

    def _give(self, current: Pass, own: str, piece: Rows) -> None:
        piece.parallel = self.parallel
        self.sink.take(current, self.names[own], piece)

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        raise AssertionError(f"{type(self).__name__} must define record")

    def _bias(self, current: Pass, d: Tensor, bounds: Tensor) -> None:
        if "bias" in self.names:
            self._give(current, "bias", Rows("bias", bounds, d))


class LinearTap(Tap):
    """nn.Linear, weight (out, in), and transformers' Conv1D, weight (in, out)."""

    transposed = False

    def _tapped(self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        out = super()._tapped(current, args, kwargs, y)
        current.outputs[out.data_ptr() if not sharding.is_dtensor(out) else 0] = self
        return out

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        a, d = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])
        if d.dtype in (torch.bfloat16, torch.float16) and a.dtype == torch.float32:
            a = a.to(d.dtype)  # autocast: what the layer multiplied
        if current.score is not None and current.head is self:
            score = current.score.reshape(-1, current.score.shape[-1])
            if "bias" in self.names:
                self._give(current, "bias", Rows("head", bounds, d, None, score))
            if "weight" in self.names:
                self._give(current, "weight", Rows("head", bounds, d, a, score))
            return
        self._bias(current, d, bounds)
        if "weight" in self.names:
            self._give(
                current,
                "weight",
                Rows("linear", bounds, a, d) if self.transposed else Rows("linear", bounds, d, a),
            )


class Conv1DTap(LinearTap):
    transposed = True


class ConvTap(Tap):
    """nn.Conv1d and nn.Conv2d of one group.

    a linear layer over the patches, every position of the output a token.
    """

    def leading(self, x: Tensor) -> int:
        module = self.module
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        if x.dim() != len(module.kernel_size) + 2:
            raise ValueError(
                f"DiagonalFisher: {self.where}: expected a batch of {len(module.kernel_size) + 2} "
                f"dimensions, got {tuple(x.shape)}; {WAY_OUT}"
            )
        return 1

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        positions = d[0, 0].numel()
        rows = d.shape[0] * positions
        bounds = torch.arange(rows + 1) if current.unit == "token" else bounds * positions
        d = d.flatten(2).transpose(1, 2).reshape(rows, -1)
        self._bias(current, d, bounds)
        if "weight" in self.names:
            self._give(current, "weight", Rows("linear", bounds, d, self.patches(x)))

    def patches(self, x: Tensor) -> Tensor:
        module: Any = self.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        sizes: list[tuple[int, ...]] = [module.kernel_size, module.dilation, module.stride]
        if x.dim() == 3:
            x, sizes = x[:, :, None], [(1, *size) for size in sizes]
        kernel, dilation, stride = sizes
        # (B, C * kernel, positions)
        unfolded = nn.functional.unfold(x, kernel, dilation=dilation, stride=stride)
        return unfolded.transpose(1, 2).flatten(0, 1)


class EmbeddingTap(Tap):
    """nn.Embedding and its subclasses, whatever they do to the ids and whatever number they
    multiply a row by.
    """

    def _tapped(self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        module: Any = self.module
        like, plain = sharding.placements(y), type(module).forward is nn.Embedding.forward
        if like is not None and not plain:
            raise TypeError(
                f"DiagonalFisher: {self.where} ({type(module).__name__}): a subclass of "
                f"nn.Embedding split over ranks has no rule; {WAY_OUT}"
            )
        ids, factor = (
            (args[0] if args else kwargs["input"], None) if plain else self._lookup(args, kwargs)
        )
        if not isinstance(y, Tensor) or y.shape[:-1] != ids.shape:
            raise TypeError(
                f"DiagonalFisher: {self.where} ({type(module).__name__}): expected a tensor of ids "
                f"in and one row each out; {WAY_OUT}"
            )
        y, ids = _batched(y, sharding.whole_ids(ids, self.where).detach(), current)
        only = current.only
        counted = (
            None
            if module.padding_idx is None
            else ids != module.padding_idx % module.num_embeddings
        )
        if like is not None:
            ids, here = sharding.own_rows(ids, module.weight)
            counted = here if counted is None or here is None else counted & here
        if not in_backward() and only is None:
            current.ids[self.names["weight"]] = ids
        saved = [
            t
            for t in (counted, None if factor is None else factor.expand(ids.shape))
            if t is not None
        ]

        def record(
            d: Tensor, ids: Tensor, *factors: Tensor
        ) -> None:  # 0 for a row that does not count
            self.parallel = like is not None
            d = sharding.local(d, self.where, like)
            for f in factors:
                d = (
                    d.masked_fill(~f[..., None], 0.0)
                    if f.dtype == torch.bool
                    else d * f[..., None].to(d.dtype)
                )
            self.record(current, d, ids, current.segments(ids.shape, self.where, only))

        return self._apply(y, record, ids, *saved)

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        rows, ids = d.reshape(-1, d.shape[-1]), x.flatten()
        self._give(current, "weight", Rows("embedding", bounds, rows, ids))

    @torch.no_grad()
    def _lookup(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(ids, factor) of a subclass's forward, read off its own output with two tables in place
        of the weight: (1, row) and 1.
        """
        module: Any = self.module
        rows = torch.arange(module.num_embeddings, dtype=torch.float64, device=module.weight.device)
        out = self._with_table(torch.stack((torch.ones_like(rows), rows), -1), args, kwargs)
        factor = self._with_table(
            torch.ones(len(rows), 1, dtype=module.weight.dtype, device=rows.device), args, kwargs
        )
        if out.shape[-1:] != (2,) or factor.shape != (*out.shape[:-1], 1):
            raise TypeError(
                f"DiagonalFisher: {self.where} ({type(module).__name__}): what it makes of its "
                f"table is no row times a number; {WAY_OUT}"
            )
        ids = torch.where(out[..., 0] != 0, out[..., 1] / out[..., 0], 0.0).round().long()
        return ids, factor[..., 0]

    def _with_table(self, table: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kept = self.module._parameters["weight"]
        self.module._parameters["weight"] = table  # type: ignore[assignment]
        try:
            out: Tensor = self.module.forward(*args, **kwargs)
        finally:
            self.module._parameters["weight"] = kept
        return out


class ElementwiseTap(Tap):
    """y = xhat(x) * weight + bias elementwise, whatever xhat and the weight's offset are.

    LayerNorm, any RMSNorm, Gemma's (1 + w).

    xhat is the module's own output at weight 1 less that at weight 0, so nothing is divided by a
    weight and no eps is guessed.
    """

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        flat = d.reshape(-1, d.shape[-1])
        self._bias(current, flat, bounds)
        if "weight" in self.names:
            xhat = (self._at(x, 1.0) - self._at(x, 0.0)).reshape(flat.shape)
            self._give(current, "weight", Rows("scale", bounds, flat, xhat))

    def _at(self, x: Tensor, value: float) -> Tensor:
        kept = self.module._parameters["weight"]
        assert kept is not None
        plain = torch.full(kept.shape, value, dtype=kept.dtype, device=x.device)
        self.module._parameters["weight"] = plain  # type: ignore[assignment]
        bias = self.module._parameters.get("bias")
        if bias is not None:
            self.module._parameters["bias"] = torch.zeros(
                bias.shape, dtype=bias.dtype, device=x.device
            )  # type: ignore[assignment]
        try:
            out: Tensor = self.module.forward(x)
        finally:
            self.module._parameters["weight"] = kept
            if bias is not None:
                self.module._parameters["bias"] = bias
        return out


def require_input_grads(model: nn.Module) -> list[Any]:
    """Reentrant checkpointing differentiates a block only where its input requires grad, and here
    embeddings may be frozen.
    """
    if not hasattr(model, "get_input_embeddings") or not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    ):
        return []

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_(True)

    embeddings: Any = model.get_input_embeddings
    return [embeddings().register_forward_hook(hook)]
