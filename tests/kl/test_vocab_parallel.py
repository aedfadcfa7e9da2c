"""The vocabulary over 2 and 4 gloo processes: the single process's values and gradients, from a few
floats a token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fasttax
from tests.tools.kl_cases import run_oracle
from tests.tools.processes import on_ranks
from tests.tools.utils import named

INF, NAN = math.inf, math.nan
NAMES = ("logp", "ref_logp", "entropy", "lse", "kl_policy_ref", "kl_ref_policy", "k3")
# uneven shards: of a single entry; of none, and one that "suppressed" empties of all mass
CUTS = {2: (0, 36, 37), 4: (0, 5, 5, 23, 37)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {
        "temperature": 0.7,
        "ref_temperature": 1.2,
        "softcap": 9.0,
        "ref_softcap": 8.0,
        "logit_scale": 1.5,
    },
}
KLS = [
    {"kind": kind, "inf": inf}
    for kind in ("policy_ref", "ref_policy", "jsd")
    for inf in ("propagate", "mask")
] + [
    {"kind": "jsd", "beta": 0.1},
    {"kind": "jsd", "beta": 1.0},
]


def rows(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logits, ref_logits, ids, mask) of six tokens."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 6, 37, generator=generator, dtype=torch.float64)
    ids, mask = torch.tensor([0, 4, 5, 22, 23, 36]), None
    if case == "near":
        x = y + 1e-3 * x
    if case == "offset":
        x = y + 0.1 * x + 1000
    if case == "equal":
        x = y.clone()
    if case == "float32":
        x, y = x.float(), y.float()
    if case == "suppressed":  # whole shards of -inf, the same entries in both models
        x[:, 5:23] = y[:, 5:23] = -INF
        ids = torch.tensor([0, 4, 25, 30, 23, 36])
    if case == "gaps":  # entries that only one of the models has
        x[:, 3], y[:, 30] = -INF, -INF
    if case == "masked":
        mask = torch.tensor([True, False, True, True, False, True])
        x[1], y[4], ids[1] = NAN, INF, -100
    return x, y, ids, mask


CASES = ("apart", "near", "offset", "equal", "float32", "suppressed", "gaps", "masked")
# a softcap makes -inf finite
PAIRS = [
    (case, option)
    for case in CASES
    for option in OPTIONS
    if option == "plain" or case not in ("suppressed", "gaps")
]


def weigh(stats: Any) -> Tensor:
    return sum((getattr(stats, name) * (i + 1)).sum() for i, name in enumerate(NAMES))


def with_gradients(x: Tensor, y: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    kl = fasttax.token_kl(x, y, mask=mask, **options)
    return (kl.detach(), *torch.autograd.grad(kl, (x, y), torch.linspace(-1, 2, 6).to(kl)))


def work(rank: int, folder: Path) -> None:
    group, world = dist.group.WORLD, dist.get_world_size()
    part, sent = slice(CUTS[world][rank], CUTS[world][rank + 1]), []
    gather = dist.all_gather

    def counted(out: list[Tensor], mine: Tensor, **kwargs: Any) -> Any:
        sent.append(mine.numel())
        return gather(out, mine, **kwargs)

    dist.all_gather = counted  # type: ignore[assignment]
    results: dict[str, Any] = {}
    for case, option in PAIRS:
        x, y, ids, mask = rows(case)
        a, b = x[:, part].clone().requires_grad_(), y[:, part].clone().requires_grad_()
        stats = fasttax.token_stats(
            a, b, ids, outputs=NAMES, mask=mask, tp_group=group, **OPTIONS[option]
        )
        weigh(stats).backward()
        kl = [
            with_gradients(a, b, mask, tp_group=group, **which, **OPTIONS[option]) for which in KLS
        ]
        results[f"{case} {option}"] = (
            {name: getattr(stats, name).detach() for name in NAMES},
            a.grad,
            b.grad,
            kl,
        )
    x, y, ids, _ = rows("apart")
    for name, call in {
        "stats": lambda: fasttax.token_stats(
            x[:, part], y[:, part], ids, outputs=NAMES, tp_group=group
        ),
        "kl": lambda: fasttax.token_kl(x[:, part], y[:, part], tp_group=group),
        "jsd": lambda: fasttax.token_kl(
            x[:, part], y[:, part], kind="jsd", inf="mask", tp_group=group
        ),
    }.items():
        sent.clear()
        call()
        results[f"floats a token, {name}"] = sum(sent) / 6
    stats = fasttax.token_stats(
        x[:, part], y[:, part], ids, outputs=("kl", "entropy", "k1"), kind="jsd", tp_group=group
    )
    results["mixed"] = (stats.kl, stats.entropy, stats.k1)
    with pytest.raises(
        IndexError, match="token_stats: ids: expected values in \\[0, 37\\), got 0 to 37"
    ):
        fasttax.token_stats(x[:, part], None, torch.tensor([0, 1, 2, 3, 4, 37]), tp_group=group)
    with pytest.raises(ValueError, match="tp_group: expected a shard with V >= 1 on some rank"):
        fasttax.token_kl(x[:, :0], y[:, :0], tp_group=group)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=sorted(CUTS))
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(work, folder, request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize(("case", "option"), PAIRS)
def test_every_rank_has_the_single_process_result(
    case: str, option: str, ranks: list[dict[str, Any]]
) -> None:
    x, y, ids, mask = rows(case)
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    stats = fasttax.token_stats(a, b, ids, outputs=NAMES, mask=mask, **OPTIONS[option])
    weigh(stats).backward()
    cuts = CUTS[len(ranks)]
    for rank, result in enumerate(ranks):
        values, d_x, d_y, kl = result[f"{case} {option}"]
        for name in NAMES:
            torch.testing.assert_close(values[name], getattr(stats, name).detach(), msg=named(name))
            assert torch.equal(values[name], ranks[0][f"{case} {option}"][0][name]), (
                "the ranks differ"
            )
        part = slice(cuts[rank], cuts[rank + 1])
        if case != "gaps":  # of an infinite KL the gradient is NaN in places
            # its slice, not the slice times the world size
            torch.testing.assert_close(d_x, a.grad[:, part], check_stride=False)
            torch.testing.assert_close(d_y, b.grad[:, part], check_stride=False)
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-7} if case == "float32" else {"rtol": 1e-7, "atol": 1e-14}
        )
        for which, (value, *d) in zip(KLS, kl, strict=True):
            single, *d_single = with_gradients(a, b, mask, **which, **OPTIONS[option])
            torch.testing.assert_close(
                value, single, **{**tolerance, "atol": 0.0}, msg=named(which)
            )
            if case == "float32":
                options: Any = {"inf": "propagate", **which, **OPTIONS[option]}
                upstream = torch.linspace(-1, 2, 6)
                own, truth = (
                    run_oracle(x, y, upstream, dtype, **options)[1:]
                    for dtype in (torch.float32, torch.float64)
                )
                for mine, eager, exact in zip(d, own, truth, strict=True):
                    allowed = 4 * float((eager.double() - exact).abs().max())
                    errors = (mine.double() - exact[:, part]).abs().flatten()
                    error = max(errors.tolist(), default=0.0)
                    assert error <= allowed, f"{which}: {error:.1e} > {allowed:.1e}"
            elif single.isfinite().all():
                for mine, whole in zip(d, d_single, strict=True):
                    torch.testing.assert_close(
                        mine,
                        whole[:, part],
                        **tolerance,
                        check_stride=False,
                        msg=named(which),
                    )


def test_equal_rows_are_exactly_zero(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        values, _, _, kl = result["equal plain"]
        for zero in (
            values["kl_policy_ref"],
            values["kl_ref_policy"],
            *(value for results in kl for value in results),
        ):
            assert torch.equal(zero, torch.zeros_like(zero))


def test_a_few_floats_a_token_cross(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        # lse, logp and entropy, both KLs, owner; the reference's lse and logp; sizes
        assert result["floats a token, stats"] <= 9
        # what a sweep leaves; sizes
        assert result["floats a token, kl"] <= 9
        # two lse; what two sweeps leave; sizes
        assert result["floats a token, jsd"] <= 19


def test_a_jsd_beside_other_outputs(ranks: list[dict[str, Any]]) -> None:
    x, y, ids, _ = rows("apart")
    stats = fasttax.token_stats(x, y, ids, outputs=("kl", "entropy", "k1"), kind="jsd")
    for result in ranks:
        torch.testing.assert_close(result["mixed"], (stats.kl, stats.entropy, stats.k1))
