"""Taps: where the squared per-example gradients of a module's parameters are taken, inside one ordinary backward pass.

A tap is an identity on a module's output whose backward sees D (the gradient at the output) beside what the module saw in its
forward, and adds the parameters' squares to the estimate. The parameters themselves are frozen meanwhile, so that autograd
computes no weight gradient: the square takes its place. Inputs are kept by save_for_backward, so activation checkpointing,
reentrant or not, treats them as any saved tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fasttax.functional import fisher as ops


class Sink(Protocol):
    """The estimator's side of a tap."""

    def segments(self, leading: torch.Size, where: str) -> Tensor: ...
    def add(self, name: str) -> Tensor: ...
    def weight(self, examples: int) -> Tensor | None: ...
    def batch_size(self) -> int | None: ...


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, seed: Tensor, record: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(*saved)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            ctx.record(d, *saved)
        return d, None, None, *[None] * len(saved)


class Tap:
    """Base: a forward hook that puts the tap behind a module. `names` maps the module's own parameter names to the model's."""

    def __init__(self, sink: Sink, module: nn.Module, where: str, names: dict[str, str]) -> None:
        self.sink, self.module, self.where, self.names = sink, module, where, names
        self.seed = torch.zeros((), requires_grad=True)  # makes the output require grad though every parameter is frozen

    def install(self) -> Any:
        return self.module.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        if not torch.is_grad_enabled():
            return y  # a reentrant checkpoint's first pass, or somebody's evaluation
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(y, Tensor) or not isinstance(x, Tensor):
            raise TypeError(f"DiagonalFisher: {self.where} ({type(module).__name__}): expected one tensor in and one out; "
                            "leave its parameters out with params=, or use fallback='loop'")  # fmt: skip
        batch = self.sink.batch_size()
        if batch is not None and batch > 1 and y.dim() > 1 and y.shape[0] == 1:
            # computed once for the whole batch (position embeddings): give every example its own copy to differentiate
            y, x = y.expand(batch, *y.shape[1:]), x.expand(batch, *x.shape[1:])
        seed = self.seed.to(y.device)
        return _Tap.apply(y, seed if seed.requires_grad else seed.requires_grad_(), self.record, *self.keep(x))

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.detach(),)

    def record(self, d: Tensor, *saved: Tensor) -> None:
        raise AssertionError(f"{type(self).__name__} must define record")

    def _bias(self, d: Tensor, bounds: Tensor) -> None:
        if "bias" in self.names:
            out = self.sink.add(self.names["bias"])
            ops.bias_sqgrad(d, cu_seqlens=bounds, example_weight=self.sink.weight(bounds.numel() - 1), out=out)


def _widen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """float64 on both sides where it is on either."""
    return (a.double(), b.double()) if torch.float64 in (a.dtype, b.dtype) else (a, b)


class LinearTap(Tap):
    """nn.Linear, weight (out, in), and transformers' Conv1D, weight (in, out)."""

    transposed = False

    def record(self, d: Tensor, *saved: Tensor) -> None:
        (x,) = saved
        bounds = self.sink.segments(x.shape[:-1], self.where)
        a, d = _widen(x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1]))
        self._bias(d, bounds)
        if "weight" in self.names:
            self._weight(a, d, bounds)

    def _weight(self, a: Tensor, d: Tensor, bounds: Tensor) -> None:
        out = self.sink.add(self.names["weight"])
        pair = (d, a) if self.transposed else (a, d)
        ops.linear_sqgrad(*pair, cu_seqlens=bounds, example_weight=self.sink.weight(bounds.numel() - 1), out=out)


class Conv1DTap(LinearTap):
    transposed = True


class EmbeddingTap(Tap):
    def record(self, d: Tensor, *saved: Tensor) -> None:
        (ids,) = saved
        bounds = self.sink.segments(ids.shape, self.where)
        keys, rows = self.rows(ids, d, bounds)
        self._add(keys, rows * rows, bounds)

    def rows(self, ids: Tensor, d: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        assert isinstance(module, nn.Embedding)
        return ops.embedding_rows("DiagonalFisher", ids.flatten(), d.reshape(-1, d.shape[-1]), bounds, module.num_embeddings, module.padding_idx)

    def _add(self, keys: Tensor, square: Tensor, bounds: Tensor) -> None:
        weight = self.sink.weight(bounds.numel() - 1)
        out = self.sink.add(self.names["weight"])
        square = square if weight is None else square * weight[keys[0]][:, None]
        out.index_add_(0, keys[1], square.to(out.dtype))


class ElementwiseTap(Tap):
    """y = xhat(x) * weight + bias elementwise, whatever xhat and the weight's offset are: LayerNorm, any RMSNorm, Gemma's (1 + w).

    xhat is the module's own output at weight 1 less that at weight 0, so nothing is divided by a weight and no eps is guessed.
    """

    def record(self, d: Tensor, *saved: Tensor) -> None:
        (x,) = saved
        bounds = self.sink.segments(x.shape[:-1], self.where)
        width = d.shape[-1]
        flat = d.reshape(-1, width)
        self._bias(flat, bounds)
        if "weight" in self.names:
            xhat = (self._at(x, 1.0) - self._at(x, 0.0)).reshape(-1, width)
            weight = self.sink.weight(bounds.numel() - 1)
            ops.norm_sqgrad(*_widen(xhat, flat), cu_seqlens=bounds, example_weight=weight, out=self.sink.add(self.names["weight"]))

    def _at(self, x: Tensor, value: float) -> Tensor:
        kept = self.module._parameters["weight"]
        assert kept is not None
        self.module._parameters["weight"] = torch.full_like(kept, value)  # type: ignore[assignment]
        try:
            out: Tensor = self.module.forward(x)
        finally:
            self.module._parameters["weight"] = kept
        return out


class TiedEmbeddingTap(EmbeddingTap):
    """The embedding's side of a weight that a head shares: G = G_e + G_h squared exactly, with the cross terms.

    F = sum_n G_h^2 (the head's own tap) + sum over the example's tokens' rows of (G_e^2 + 2 G_e G_h): G_h is needed only in the
    rows that the example's tokens touch, U x H numbers an example.
    """

    def __init__(self, sink: Sink, module: nn.Module, where: str, names: dict[str, str]) -> None:
        super().__init__(sink, module, where, names)
        self.seen: list[tuple[Tensor, Tensor]] = []  # (ids, head rows) of this backward
        self.ids: Tensor | None = None

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        self.ids = x.detach()
        return super().keep(x)

    def record(self, d: Tensor, *saved: Tensor) -> None:
        (ids,) = saved
        bounds = self.sink.segments(ids.shape, self.where)
        keys, rows = self.rows(ids, d, bounds)
        square = rows * rows
        for seen_keys, head_rows in self.seen:
            if not torch.equal(seen_keys, keys):
                raise RuntimeError(f"DiagonalFisher: {self.where}: the tied head and the embedding saw different tokens; pass tied='sum_of_squares'")
            square += 2 * rows * head_rows
        self.seen.clear()
        self._add(keys, square, bounds)


class TiedHeadTap(LinearTap):
    def __init__(self, sink: Sink, module: nn.Module, where: str, names: dict[str, str], embedding: TiedEmbeddingTap) -> None:
        super().__init__(sink, module, where, names)
        self.embedding = embedding

    def _weight(self, a: Tensor, d: Tensor, bounds: Tensor) -> None:
        super()._weight(a, d, bounds)
        ids = self.embedding.ids
        if ids is None:
            return  # inputs_embeds: the embedding took no part
        id_bounds = self.sink.segments(ids.shape, self.embedding.where)
        keys, _ = ops.embedding_rows("DiagonalFisher", ids.flatten(), torch.zeros(ids.numel(), 1, device=ids.device), id_bounds, d.shape[-1], None)
        head_rows = torch.empty(keys.shape[1], a.shape[-1], dtype=torch.float64 if a.dtype == torch.float64 else torch.float32, device=a.device)
        starts = bounds.tolist()
        for n, (begin, end) in enumerate(pairwise(starts)):
            mine = keys[0] == n
            head_rows[mine] = (d[begin:end][:, keys[1][mine]].T.to(head_rows.dtype)) @ a[begin:end].to(head_rows.dtype)
        self.embedding.seen.append((keys, head_rows))


def require_input_grads(model: nn.Module) -> list[Any]:
    """Reentrant checkpointing differentiates a block only where its input requires grad, and here embeddings may be frozen."""
    if not hasattr(model, "get_input_embeddings") or not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return []

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_(True)

    embeddings: Any = model.get_input_embeddings
    return [embeddings().register_forward_hook(hook)]
