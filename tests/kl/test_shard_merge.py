"""A KL from shards' sums: the whole row's value and gradients, by the whole row's standards."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasttax
from fasttax._base import library
from fasttax.kl.call import KINDS, Tempering, tempering
from fasttax.kl.shard_merge import VALUE, can_merge, merge
from fasttax.kl.vocab_parallel import combine_parts
from fasttax.reference.rows import STATS
from tests.tools.kl_cases import run_oracle
from tests.tools.processes import on_ranks
from tests.tools.utils import assert_within

pytestmark = pytest.mark.skipif(
    library.active("token_kl", "cpu")[0] == "reference",
    reason="the reference leaves no sums: its shards meet by the chain rule",
)
V = 96
# Triton's interpreter runs them one by one
TOKENS, MANY = (1024, 8192) if library.active("token_kl", "cpu")[0] == "C++" else (6, 24)
CUTS = (0, 40, 41, 96)  # one of a single entry
KLS = ("policy_ref", "ref_policy")
DTYPES = (torch.float32, torch.bfloat16)


def rows(case: str, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Logits and reference logits."""
    generator = torch.Generator().manual_seed(3)
    x, y = 3 * torch.randn(2, tokens, V, generator=generator)
    step = x / 3
    # the offsets leave a float32 lse two digits
    offset = {"offset": (1000, 1000), "offset down": (-1000, -1000), "apart in offset": (700, -300)}
    size = {"near": 1e-3, "equal": 0.0, "one shard": 0.3}.get(case, 0.1)
    up_x, up_y = offset.get(case, (0, 0))
    if case == "one shard":  # one of them has all that the models differ in
        up_x = up_y = 1000
        step[:, :50] = 0
    if case == "confident":
        y[:, 50] += 20
    if case != "far":
        x = y + size * step
    return x + up_x, y + up_y


CASES = (
    *("near", "equal", "moved", "offset", "offset down", "apart in offset"),
    *("one shard", "confident", "far"),
)


def of_shards(
    x: Tensor, y: Tensor, t: Tempering, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients, by the ops and `merge` without processes."""
    ops, parts = torch.ops.fasttax, [slice(*cut) for cut in pairwise(CUTS)]
    sums = []
    for part in parts:
        kl, saved = ops.token_kl(x[:, part], y[:, part], None, *t.args())
        saved[..., VALUE] = kl
        sums.append(saved)
    shards, values, gradients = torch.stack(sums), [], []
    for rank, part in enumerate(parts):
        value, numbers = merge(shards, rank, t)
        values.append(value.to(shards.dtype))
        numbers = numbers.to(shards.dtype)
        both = ops.token_kl_backward(
            upstream, x[:, part], y[:, part], None, numbers, *t.args(), True, True
        )
        gradients.append(both)
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0.0, atol=0.0, equal_nan=True)
    d_x, d_y = (torch.cat(side, -1) for side in zip(*gradients, strict=True))
    return values[0], d_x, d_y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, kind: str, dtype: torch.dtype) -> None:
    x, y = (z.to(dtype) for z in rows(case))
    upstream = torch.linspace(0.5, 1.5, TOKENS)
    value, d_x, d_y = of_shards(x, y, tempering("test", kind=kind), upstream)
    truth = run_oracle(x, y, upstream, torch.float64, kind=kind)
    assert bool((value >= 0).all())
    if case == "equal":
        assert not any(z.any() for z in (value, d_x, d_y))
        return
    error = ((value - truth[0]) / truth[0].clamp_min(1e-30)).abs()
    assert float(error[truth[0] > 4e-7].max()) <= 1e-3
    large = error[truth[0] > 3e-3]
    assert large.numel() == 0 or float(large.max()) <= 1e-5
    own = run_oracle(x, y, upstream, torch.float32, kind=kind)
    for mine, eager, exact in zip((d_x, d_y), own[1:], truth[1:], strict=True):
        assert_within(mine, eager.to(dtype), exact, ulps=8)


@pytest.mark.parametrize("kind", KLS)
def test_as_exact_as_the_whole_row(kind: str) -> None:
    """By p50, p90, p99 and the most, of rows near each other and moved."""
    args = tempering("test", kind=kind)
    for case in ("near", "moved", "offset", "one shard", "confident"):
        x, y = rows(case, MANY)
        upstream = torch.ones(MANY)
        exact = run_oracle(x, y, upstream, torch.float64, kind=kind)[0]
        whole = torch.ops.fasttax.token_kl(x, y, None, *args.args())[0]
        shards = of_shards(x, y, args, upstream)[0]
        at = torch.tensor([0.5, 0.9, 0.99, 1.0])
        ours, theirs = (((z - exact) / exact).abs().float().quantile(at) for z in (shards, whole))
        assert bool((ours <= 2 * theirs + 2.4e-7).all()), (case, ours, theirs)


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("inf", ["propagate", "mask"])
def test_infinities_and_nan(kind: str, inf: str) -> None:
    """Shards without a mass of one model, or of both."""
    x, y = rows("moved", 6)
    assert can_merge(x)
    none = -torch.inf
    x[0, :40] = y[0, :40] = none  # a shard of neither
    x[1, :40] = none  # of one
    y[2, :40] = none
    x[3, 3], y[3, 70] = none, none
    x[4, 90] = torch.nan
    x[5], y[5] = none, none
    t = tempering("test", kind=kind, inf=inf)
    whole = torch.ops.fasttax.token_kl(x, y, None, *t.args())
    upstream = torch.ones(6, dtype=x.dtype)
    value, d_x, d_y = of_shards(x, y, t, upstream)
    torch.testing.assert_close(value, whole[0], rtol=1e-5, atol=1e-9, equal_nan=True)
    want = torch.ops.fasttax.token_kl_backward(
        upstream, x, y, None, whole[1], *t.args(), True, True
    )
    finite = value.isfinite()
    for mine, theirs in zip((d_x, d_y), want, strict=True):
        torch.testing.assert_close(mine[finite], theirs[finite], rtol=1e-5, atol=1e-7)


class Counted(TorchDispatchMode):
    """How often each of fasttax's ops and of the collectives runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("fasttax", "c10d"):
            self.ops[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def work(rank: int, folder: Path) -> None:
    group = dist.group.WORLD
    part = slice(*((0, 40), (40, V))[rank])
    found = {}
    for kind in KLS:
        x, y = (z[:, part].contiguous() for z in rows("one shard", 64))
        x.requires_grad_()
        with Counted() as counted:
            kl = fasttax.token_kl(x, y, kind=kind, tp_group=group, reduction="mean")
            kl.backward()
        found[kind] = (kl.detach(), x.grad, dict(counted.ops))
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes(tmp_path: Path) -> None:
    """One sweep each way, and beside the look at the ranks' token counts one collective."""
    on_ranks(work, tmp_path, 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, y = rows("one shard", 64)
    for kind in KLS:
        truth = run_oracle(x, y, torch.full((64,), 1 / 64), torch.float64, kind=kind)
        for result in ranks:
            value, _, ops = result[kind]
            torch.testing.assert_close(value.double(), truth[0].mean(), rtol=2e-6, atol=0.0)
            sweeps = {name: n for name, n in ops.items() if "::token" in name}
            assert sweeps == {"fasttax::token_kl": 1, "fasttax::token_kl_backward": 1}, ops
            assert sum(n for name, n in ops.items() if name.startswith("c10d")) == 2, ops
        gradient = torch.cat([result[kind][1] for result in ranks], -1)
        torch.testing.assert_close(gradient.double(), truth[1], rtol=1e-4, atol=1e-9)


def test_kinds_that_merge() -> None:
    assert {name for name, kind in KINDS.items() if kind.row} == set(KLS)


@pytest.mark.parametrize("kind", KLS)
def test_shares_beyond_float64(kind: str) -> None:
    """A shard that has e^-1000 of a model's mass has mass: no KL is infinite, none is left out."""
    x, y = torch.zeros(1, V), torch.linspace(0, -4, V)[None].clone()
    y[:, 40:] += 1000
    if kind == "ref_policy":
        x, y = y, x
    value, d_x, d_y = of_shards(x, y, tempering("test", kind=kind), torch.ones(1))
    truth = run_oracle(x, y, torch.ones(1), torch.float64, kind=kind)
    for mine, exact in zip((value, d_x, d_y), truth, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_chain_rule_where_the_reference_has_no_mass(dtype: torch.dtype) -> None:
    """KL(ref || policy) and its gradients, of a shard that the reference knows nothing of."""
    x, y = torch.randn(2, 3, 8).to(dtype)
    y[0, :4] = -torch.inf
    x, y = (z.requires_grad_() for z in (x, y))
    name, sides = "kl_ref_policy", tempering("test").sides()
    found: dict[str, list[Tensor]] = {"lse": [], "ref_lse": [], name: []}
    for at in (slice(4), slice(4, 8)):
        of_both = torch.ops.fasttax.token_stats(x[:, at], y[:, at], None, None, *sides)[0]
        of_ref = torch.ops.fasttax.token_stats(y[:, at], None, None, None, *sides)[0]
        found["lse"].append(of_both[STATS.index("lse")])
        found["ref_lse"].append(of_ref[STATS.index("lse")])
        found[name].append(of_both[STATS.index(name)])
    parts = {part: torch.stack(values) for part, values in found.items()}
    value = combine_parts(parts, {name}, None)[name]
    gradients = torch.autograd.grad(value.sum(), (x, y))
    truth = run_oracle(x, y, torch.ones(3), torch.float64, kind="ref_policy")
    for mine, exact in zip((value, *gradients), truth, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-4, atol=1e-6)


def test_the_chain_rule_beyond_float64() -> None:
    """As above, of what token_stats gives of shards."""
    x, y = torch.zeros(1, 4), torch.tensor([[0.0, -4.0, 1000.0, 1000.0]])
    outputs = ("lse", "kl_policy_ref")
    halves = [
        fasttax.token_stats(x[:, at], y[:, at], outputs=outputs) for at in (slice(2), slice(2, 4))
    ]
    parts = {
        "lse": torch.stack([stats.lse for stats in halves]),
        "ref_lse": torch.stack([y[:, :2].logsumexp(-1), y[:, 2:].logsumexp(-1)]),
        "kl_policy_ref": torch.stack([stats.kl_policy_ref for stats in halves]),
    }
    found = combine_parts(parts, {"kl_policy_ref"}, None)["kl_policy_ref"]
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)
