"""Sums of squared per-example gradients, without a gradient per example in memory.

The diagonal Fisher's building blocks. An example n owns a run of tokens t; D = grad_outputs, A =
inputs. With `cu_seqlens` (N + 1 integers from 0 to R) the tokens are the R rows of flat inputs;
without, inputs are (N, T, ...) and every row of the batch is an example, or (N, ...) and every row
is an example of one token. `example_weight` (N) multiplies an example's square. `out` is
accumulated into and returned. Results are float32, float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fasttax._base import checks, waits
from fasttax._base.interrupts import surfaced
from fasttax._base.library import define
from fasttax.fisher import head
from fasttax.reference import fisher as reference
from fasttax.reference import wide


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What squares are summed in: float64 for float64, else float32."""
    return {torch.float64: torch.float64}.get(dtype, torch.float32)


@dataclass(frozen=True)
class Runs:
    """Boundaries that rise from 0, on the CPU, with a copy on each device that asked for one."""

    host: Tensor
    copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor:
        """The boundaries there; they cross once."""
        if device not in self.copies:
            self.copies[device] = waits.over(self.host, device)
        return self.copies[device]


_RUNS = WeakIdKeyDictionary()  # boundaries -> their Runs, while somebody has the boundaries


def runs(bounds: Tensor) -> Runs:
    """Boundaries of this package's own, int64 on the CPU, which nobody writes into."""
    if bounds not in _RUNS:
        _RUNS[bounds] = Runs(bounds.detach())
    found: Runs = _RUNS[bounds]
    return found


def _segments(
    op: str, name: str, x: Tensor, trailing: int, cu_seqlens: Tensor | Runs | None
) -> tuple[Tensor, Tensor]:
    """`x` as (R, ...) with `trailing` trailing dimensions, and the examples' boundaries.

    Boundaries are int64 and on x's device, as kernels take them.
    """
    leading = x.dim() - trailing
    if cu_seqlens is not None:
        if leading != 1:
            expected = f"flat rows (R, ...) of {1 + trailing} dimensions together with cu_seqlens"
            raise checks.fail(op, name, expected, x)
        return x, _boundaries(op, cu_seqlens, x)
    if leading not in (1, 2):
        expected = f"{1 + trailing} or {2 + trailing} dimensions, (N, ...) or (N, T, ...)"
        raise checks.fail(op, name, expected, x)
    bounds = torch.arange(x.shape[0] + 1, device=x.device)
    if leading == 1:
        return x, bounds
    return x.flatten(0, 1), bounds * x.shape[1]


def _boundaries(op: str, cu_seqlens: Tensor | Runs, x: Tensor) -> Tensor:
    """The user's are looked at; on a GPU by the device itself, which stops at a wrong one."""
    expected = f"boundaries that rise from 0 to {x.shape[0]}, the number of rows"
    if isinstance(cu_seqlens, Runs):
        if int(cu_seqlens.host[-1]) != x.shape[0]:
            raise checks.fail(op, "cu_seqlens", expected, str(cu_seqlens.host[-8:].tolist()))
        return cu_seqlens.on(x.device)
    checks.tensor(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise checks.fail(op, "cu_seqlens", "a vector of N + 1 boundaries", cu_seqlens)
    bounds = cu_seqlens.to(torch.int64).contiguous()
    ends = (bounds[0] == 0) & (bounds[-1] == x.shape[0])
    right = ends & (bounds.diff() >= 0).all()
    if waits.waits(bounds):
        torch._assert_async(right, f"fasttax: {op}: cu_seqlens: expected {expected}")
        # where the device has no assertions, what is read lies inside all the same
        bounds = bounds.clamp(0, x.shape[0]).cummax(0).values
    elif not right:
        raise checks.fail(op, "cu_seqlens", expected, str(bounds[:8].tolist()))
    return waits.over(bounds, x.device)


def _weights(op: str, example_weight: Tensor | None, bounds: Tensor, like: Tensor) -> Tensor | None:
    """The examples' weights as kernels take them."""
    if example_weight is None:
        return None
    if not isinstance(example_weight, Tensor):
        raise checks.fail(op, "example_weight", "a torch.Tensor", example_weight, error=TypeError)
    checks.dense(op, "example_weight", example_weight)
    examples = bounds.numel() - 1
    if example_weight.shape != (examples,):
        expected = f"shape ({examples},), one value an example"
        raise checks.fail(op, "example_weight", expected, example_weight)
    return example_weight.to(device=like.device, dtype=like.dtype).contiguous()


def _result(op: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out`, checked, or zeros."""
    dtype = sum_dtype(like.dtype)
    if out is None:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    checks.tensor(op, "out", out, (dtype,))
    if out.shape != shape or not out.is_contiguous() or out.device != like.device:
        raise checks.fail(op, "out", f"a contiguous tensor of shape {shape} on {like.device}", out)
    return out


def _paired(op: str, inputs: Any, grad_outputs: Any, features: int) -> tuple[Tensor, Tensor]:
    """Detached, checked to have the same shape but for `features` trailing dimensions."""
    checks.tensor(op, "inputs", inputs)
    checks.tensor(op, "grad_outputs", grad_outputs)
    lead = max(1, inputs.dim() - features)
    if inputs.shape[:lead] != grad_outputs.shape[:lead] or inputs.dim() != grad_outputs.dim():
        expected = f"the leading shape {tuple(inputs.shape[:lead])} of inputs"
        raise checks.fail(op, "grad_outputs", expected, grad_outputs)
    checks.same_device(op, "grad_outputs", grad_outputs, "inputs", inputs)
    if (inputs.dtype == torch.float64) != (grad_outputs.dtype == torch.float64):
        expected = "float64 together with float64 inputs, and only then"
        raise checks.fail(op, "grad_outputs", expected, grad_outputs, error=TypeError)
    return inputs.detach(), grad_outputs.detach()


def _in_rows(x: Tensor) -> Tensor:
    """`x` with features that lie side by side, as kernels read them."""
    if x.numel() == 0:
        return x.new_empty(x.shape)  # which is contiguous to torch whatever its strides
    return x if x.stride(-1) == 1 else x.contiguous()


@surfaced
def linear_sqgrad(
    inputs: Tensor,
    grad_outputs: Tensor,
    *,
    cu_seqlens: Tensor | Runs | None = None,
    example_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """F[o, i] = sum_n w_n (sum_{t in n} D[t, o] A[t, i])^2 of a linear layer's weight.

    Exact per example. Costs one weight-gradient GEMM plus 2 N O I flops; no per-example gradient is
    stored.

    Args:
        inputs: A, (N, T, I), (N, I), or (R, I) with cu_seqlens; float32, bfloat16, float16 or
            float64.
        grad_outputs: D, the same leading shape, (..., O): gradients of the SUM of the tokens'
            losses.
        cu_seqlens: (N + 1,), boundaries of the examples over flat inputs.
        example_weight: w, (N,).
        out: (O, I), accumulated into; after an exception, Ctrl-C too, it has a part of the sum.

    Raises:
        ValueError, TypeError: a shape, dtype or boundary does not fit.

    Example:
        >>> inputs, grad_outputs = torch.ones(3, 5, 8), torch.ones(3, 5, 6)  # 3 examples
        >>> fasttax.functional.linear_sqgrad(inputs, grad_outputs).shape
        torch.Size([6, 8])
    """
    op = "linear_sqgrad"
    inputs, grad_outputs = _paired(op, inputs, grad_outputs, 1)
    a, bounds = _segments(op, "inputs", inputs, 1, cu_seqlens)
    d = grad_outputs.reshape(a.shape[0], grad_outputs.shape[-1])
    result = _result(op, out, (d.shape[1], a.shape[1]), a)
    weights = _weights(op, example_weight, bounds, result)
    torch.ops.fasttax.linear_sqgrad_(result, _in_rows(a), _in_rows(d), bounds, weights)
    return result


@surfaced
def bias_sqgrad(
    grad_outputs: Tensor,
    *,
    cu_seqlens: Tensor | Runs | None = None,
    example_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """F[o] = sum_n w_n (sum_{t in n} D[t, o])^2 of a bias.

    Args:
        grad_outputs: D, (N, T, O), (N, O), or (R, O) with cu_seqlens.
        cu_seqlens: (N + 1,), boundaries of the examples over flat grad_outputs.
        example_weight: w, (N,).
        out: (O,), accumulated into.

    Raises:
        ValueError, TypeError: a shape, dtype or boundary does not fit.

    Example:
        >>> grad_outputs = torch.ones(3, 5, 2)  # 3 examples of 5 tokens
        >>> fasttax.functional.bias_sqgrad(grad_outputs)
        tensor([75., 75.])
    """
    op = "bias_sqgrad"
    checks.tensor(op, "grad_outputs", grad_outputs)
    d, bounds = _segments(op, "grad_outputs", grad_outputs.detach(), 1, cu_seqlens)
    result = _result(op, out, (d.shape[1],), d)
    weights = _weights(op, example_weight, bounds, result)
    torch.ops.fasttax.bias_sqgrad_(result, _in_rows(d), bounds, weights)
    return result


@surfaced
def norm_sqgrad(
    inputs: Tensor,
    grad_outputs: Tensor,
    *,
    cu_seqlens: Tensor | Runs | None = None,
    example_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """F[i] = sum_n w_n (sum_{t in n} D[t, i] X[t, i])^2 of an elementwise weight.

    As in LayerNorm and RMSNorm.

    Args:
        inputs: X, the normalised activations that the weight multiplies; of grad_outputs' shape.
        grad_outputs: D, (N, T, I), (N, I), or (R, I) with cu_seqlens.
        cu_seqlens: (N + 1,), boundaries of the examples over flat inputs.
        example_weight: w, (N,).
        out: (I,), accumulated into.

    Raises:
        ValueError, TypeError: a shape, dtype or boundary does not fit.

    Example:
        >>> inputs, grad_outputs = torch.ones(3, 5, 2), torch.ones(3, 5, 2)
        >>> fasttax.functional.norm_sqgrad(inputs, grad_outputs)
        tensor([75., 75.])
    """
    op = "norm_sqgrad"
    inputs, grad_outputs = _paired(op, inputs, grad_outputs, 0)
    x, bounds = _segments(op, "inputs", inputs, 1, cu_seqlens)
    d = grad_outputs.reshape(x.shape)
    if x.dtype != d.dtype:
        x, d = x.float(), d.float()
    result = _result(op, out, (d.shape[1],), d)
    weights = _weights(op, example_weight, bounds, result)
    torch.ops.fasttax.norm_sqgrad_(result, _in_rows(x), _in_rows(d), bounds, weights)
    return result


@surfaced
def embedding_sqgrad(
    ids: Tensor,
    grad_outputs: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    cu_seqlens: Tensor | Runs | None = None,
    example_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """F[v, h] = sum_n w_n (sum_{t in n: ids[t] = v} D[t, h])^2.

    Tokens repeated inside an example are summed, then squared. Memory is O(tokens * H): rows are
    gathered by (example, id), never one table per example.

    Args:
        ids: int64 or int32, (N, T), (N,), or (R,) with cu_seqlens, in [0, num_embeddings).
        grad_outputs: D, ids' shape + (H,).
        num_embeddings: V.
        padding_idx: a row that takes no gradient, as in torch.nn.Embedding.
        cu_seqlens: (N + 1,), boundaries of the examples over flat ids.
        example_weight: w, (N,).
        out: (V, H), accumulated into.

    Raises:
        IndexError: an id is outside.
        ValueError, TypeError: a shape, dtype or boundary does not fit.

    Example:
        >>> ids = torch.tensor([[0, 2, 2]])  # one example; its two tokens of one id add up first
        >>> fasttax.functional.embedding_sqgrad(ids, torch.ones(1, 3, 1), 3).flatten()
        tensor([1., 0., 4.])
    """
    op = "embedding_sqgrad"
    checks.tensor(op, "ids", ids, (torch.int64, torch.int32))
    checks.tensor(op, "grad_outputs", grad_outputs)
    if grad_outputs.dim() < 1 or grad_outputs.shape[:-1] != ids.shape:
        raise checks.fail(op, "grad_outputs", f"shape {tuple(ids.shape)} + (H,)", grad_outputs)
    V, H = int(num_embeddings), grad_outputs.shape[-1]
    flat, bounds = _segments(op, "ids", ids, 0, cu_seqlens)
    result = _result(op, out, (V, H), grad_outputs)
    flat = _ids_in_range(op, flat, V)
    weights = _weights(op, example_weight, bounds, result)
    skip = -1
    if padding_idx is not None:
        if not -V <= padding_idx < V:
            raise checks.fail(op, "padding_idx", f"an id in [-{V}, {V}), or None", padding_idx)
        skip = padding_idx % V
    d = _in_rows(grad_outputs.detach().reshape(-1, H))
    torch.ops.fasttax.embedding_sqgrad_(result, flat.long().contiguous(), d, bounds, weights, skip)
    return result


def embedding_rows(
    op: str, flat_ids: Tensor, d: Tensor, bounds: Tensor, num_embeddings: int
) -> tuple[Tensor, Tensor]:
    """The rows of every example's embedding gradient that its tokens touch.

    Keys (2, U) of (example, id), rows (U, H).
    """
    flat_ids = _ids_in_range(op, flat_ids, num_embeddings)
    return reference.embedding_rows(flat_ids.long(), wide(d), bounds, num_embeddings, -1)


def _ids_in_range(op: str, ids: Tensor, count: int) -> Tensor:
    """The ids; on a GPU the device itself stops at one outside, as torch's embedding does."""
    expected = f"values in [0, {count})"
    if waits.waits(ids):
        inside = ((ids >= 0) & (ids < count)).all()
        torch._assert_async(inside, f"fasttax: {op}: ids: expected {expected}")
        return ids.clamp(0, count - 1)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= count):
        got = f"{int(ids.min())} to {int(ids.max())}"
        raise checks.fail(op, "ids", expected, got, error=IndexError)
    return ids


@surfaced
def lm_head_fisher(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_chunk: int = 256,
    out: Tensor | None = None,
) -> Tensor:
    """The head's exact Fisher over every label of the vocabulary, tokens summed.

    F = (p (1 - p))^T (A * A), p = softmax(A W^T + b). There is no label sampling and so no sampling
    error. Logits exist for `token_chunk` tokens at a time.

    Args:
        hidden: A, (..., H).
        weight: W, (V, H).
        bias: b, (V,).
        mask: (...), tokens that count: bool, or 0 and 1 (or packed documents' numbers).
        token_chunk: tokens at a time.
        out: (V, H), accumulated into.

    Returns:
        (V, H), summed over the counted tokens.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on a CPU, a mask with labels'
            -100 or fractions.

    Example:
        >>> fisher = fasttax.functional.lm_head_fisher(hidden, head.weight, mask=mask)
        >>> fisher.shape == head.weight.shape
        True
    """
    op = "lm_head_fisher"
    checks.tensor(op, "hidden", hidden)
    checks.tensor(op, "weight", weight)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise checks.fail(op, "weight", f"shape (V, {hidden.shape[-1]})", weight)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise checks.fail(op, "bias", f"shape ({weight.shape[0]},)", bias)
        checks.tensor(op, "bias", bias)
        _dtype_of_hidden(op, "bias", bias, hidden)
        bias = bias.detach()
    _dtype_of_hidden(op, "weight", weight, hidden)
    token_chunk = checks.count(op, "token_chunk", token_chunk)
    a = hidden.detach().reshape(-1, hidden.shape[-1])
    if mask is not None:
        counted = checks.token_mask(op, mask, hidden.shape[:-1], hidden.device, "").reshape(-1)
        # a row of zeros adds nothing; to leave it out, somebody must count the others
        a = a.masked_fill(~counted[:, None], 0.0) if waits.waits(a) else a[counted]
    result = _result(op, out, tuple(weight.shape), a)
    torch.ops.fasttax.lm_head_fisher_(result, a, weight.detach(), bias, token_chunk)
    return result


def _dtype_of_hidden(op: str, name: str, value: Tensor, hidden: Tensor) -> None:
    if value.dtype != hidden.dtype:
        expected = f"dtype {hidden.dtype} as hidden"
        way_out = f"convert it with {name}.to(hidden.dtype)"
        raise checks.fail(op, name, expected, value, way_out, TypeError)


def accumulate_sqgrad_(
    sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0
) -> None:
    """`sums` += weight * grads^2 in place, for a model's whole list of gradients in one call.

    The Fisher's sum where an example's gradient is at hand. Three passes: read sum and gradient,
    write the sum.

    Args:
        sums: contiguous, float32, or float64 where the gradient is; none in another's memory.
        grads: one for each sum, of its shape; float32, bfloat16, float16 or float64, in any mix.
        weight: finite.

    Raises:
        ValueError, TypeError: a list, shape, dtype or device does not fit.

    Example:
        >>> sums = [torch.zeros(2)]
        >>> for gradient in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])):  # one an example
        ...     fasttax.functional.accumulate_sqgrad_(sums, [gradient])
        >>> sums
        [tensor([10.,  4.])]
    """
    op = "accumulate_sqgrad_"
    checks.lists(op, "sum", sums=sums, grads=grads)
    weight = checks.number(op, "weight", weight)
    for i, (total, grad) in enumerate(zip(sums, grads, strict=True)):
        of_sum, of_grad = f"sums[{i}]", f"grads[{i}]"
        checks.tensor(op, of_grad, grad)
        checks.tensor(op, of_sum, total, (sum_dtype(grad.dtype),))
        if grad.shape != total.shape:
            raise checks.fail(op, of_grad, f"shape {tuple(total.shape)} as {of_sum}", grad)
        checks.same_device(op, of_grad, grad, of_sum, total)
        checks.same_device(op, of_sum, total, "sums[0]", sums[0])
        if not total.is_contiguous():
            expected = "a contiguous tensor, since it is written in place"
            raise checks.fail(op, of_sum, expected, f"strides {total.stride()}")
    checks.distinct_memory(op, "sums", sums)
    flat = [g.detach().contiguous() for g in grads]
    torch.ops.fasttax.accumulate_sqgrad_(list(sums), flat, weight)


# --- the ops --------------------------------------------------------------------------------------

define(
    "linear_sqgrad_(Tensor(a!) out, Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, Tensor? "
    "example_weight) -> ()",
    reference.linear_sqgrad_,
    lambda out, inputs, grad_outputs, cu_seqlens, example_weight: None,
)
define(
    "bias_sqgrad_(Tensor(a!) out, Tensor grad_outputs, Tensor cu_seqlens, Tensor? example_weight) "
    "-> ()",
    reference.bias_sqgrad_,
    lambda out, grad_outputs, cu_seqlens, example_weight: None,
)
define(
    "norm_sqgrad_(Tensor(a!) out, Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, Tensor? "
    "example_weight) -> ()",
    reference.norm_sqgrad_,
    lambda out, inputs, grad_outputs, cu_seqlens, example_weight: None,
)
define(
    "embedding_sqgrad_(Tensor(a!) out, Tensor ids, Tensor grad_outputs, Tensor cu_seqlens, Tensor? "
    "example_weight, int skip) -> ()",
    reference.embedding_sqgrad_,
    lambda out, ids, grad_outputs, cu_seqlens, example_weight, skip: None,
)
define(
    "accumulate_sqgrad_(Tensor(a!)[] sums, Tensor[] grads, float weight) -> ()",
    reference.accumulate_sqgrad_,
    lambda sums, grads, weight: None,
)
define("label_variance_(Tensor(a!) logits) -> ()", reference.label_variance_, lambda logits: None)
define(
    "lm_head_fisher_(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias, int token_chunk) "
    "-> ()",
    head.lm_head_fisher_,
    lambda out, hidden, weight, bias, token_chunk: None,
    ("label_variance_",),
)
