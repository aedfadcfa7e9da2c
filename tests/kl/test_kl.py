"""token_kl against a float64 oracle on every backend: the reference and C++ at each instruction
set, over vocabularies, options and hard rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.kl_cases import DTYPES, INF, KINDS, check, oracle, run, run_oracle
from tests.tools.kl_inputs import OPTIONS, VOCABULARIES, peaked, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabularies(V: int, dtype: torch.dtype, kind: str, backend: str | int) -> None:
    for x, y in rows(V, dtype).values():
        check(backend, x, y, kind=kind)


# float16 differs in load and store alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("option", "kind"),
    # a KL reads no beta
    [(o, k) for o in OPTIONS for k in KINDS if "beta" not in OPTIONS[o] or k in ("jsd", "renyi")],
)
def test_options(option: str, dtype: torch.dtype, kind: str, backend: str | int) -> None:
    for sort, (x, y) in rows(147, dtype).items():  # two blocks of 64, a vector, a tail of 3
        if sort != "low" or not {"softcap", "ref_softcap"} & set(
            OPTIONS[option]
        ):  # -500 under a softcap has no gradient left
            check(backend, x, y, kind=kind, **OPTIONS[option])


# hard rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["policy", "ref", "both", "apart"])
# 3000 is in a whole block beyond the first 2048 entries, 9000 in the last, partial vector; 100 is
# seen when the frame is primed
@pytest.mark.parametrize("where", [100, 3000, 9000])
# within the slack of 40, at its edge, and a collapsed row
@pytest.mark.parametrize("height", [12, 39, 60])
def test_peaks(height: float, where: int, who: str, kind: str, backend: str | int) -> None:
    x, y = peaked(height, who, where, 9001)
    for options in ({}, {"ref_temperature": 1.1}):  # the shared frame and the general one
        check(backend, x, y, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_against_peaked(kind: str, backend: str | int) -> None:
    """30001 entries of like mass in one row, one in the other: sum e^ay is what is left when the
    sums of both cancel.
    """
    flat, peak = torch.randn(2, 2, 30001) * 0.3
    peak[:, 77] = 30
    for x, y in ((flat, peak), (peak, flat)):
        for options in ({}, {"ref_temperature": 1.1}, {"inf": "mask"}):
            check(backend, x, y, kind=kind, **options)


@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd"])
@pytest.mark.parametrize("rise", [90.0, 1000.0])
def test_one_row_rises_far(rise: float, kind: str, backend: str | int) -> None:
    """Every further part of a row above the last, or its entries far apart, beside a row that is
    level: what has been summed of both is nothing to one of them, and e^-u is no float.
    """
    g = torch.Generator().manual_seed(0)
    level = torch.randn(2, 8208, generator=g)
    spread = torch.randn(2, 8208, generator=g) * rise
    for rising in (level + torch.arange(8208) // 2048 * rise, spread):
        for x, y in ((rising, 5 * torch.tanh(rising / 5)), (level, rising), (rising, level)):
            out = run(backend, x, y, kind=kind, beta=0.9)
            truth = run_oracle(x, y, torch.ones(2), torch.float64, kind=kind, beta=0.9)
            torch.testing.assert_close(out[0].double(), truth[0], rtol=1e-5, atol=0)
            for d, of in zip(out[1:], truth[1:], strict=True):
                scale = float(of.abs().max().clamp(min=1))
                torch.testing.assert_close(d.double(), of, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("size", "offset", "bound"),
    [
        (1e-3, 0.0, 1e-3),  # KL about 5e-7
        (1e-1, 1000.0, 1e-5),  # KL about 5e-3, policy 1000 above
        (1e-1, -1000.0, 1e-5),
    ],
)
@pytest.mark.parametrize("V", [1003, 9001])
@pytest.mark.parametrize("kind", KINDS)
def test_small_kl_keeps_its_digits(
    kind: str, V: int, size: float, offset: float, bound: float, backend: str | int
) -> None:
    y = torch.randn(8, V)
    x = (y + size * torch.randn(8, V)) + offset
    kl = run(backend, x, y, kind=kind)[0]
    truth = oracle(x.double(), y.double(), kind=kind)
    assert truth.min() > 1e-8
    assert truth.max() < 2e-2
    assert ((kl - truth).abs() / truth).max() <= bound


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"softcap": 5.0, "ref_softcap": 5.0}, {"inf": "mask"}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_are_exactly_zero(
    dtype: torch.dtype, kind: str, options: dict[str, Any], backend: str | int
) -> None:
    for V in (1, 17, 9001):
        x = (5 * torch.randn(3, V)).to(dtype)
        x[1] -= 200
        x[2, V // 2] = -INF if V > 1 else 0.0
        for out in run(backend, x, x.clone(), kind=kind, **options):
            assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_the_ends_is_zero(beta: float, backend: str | int) -> None:
    for out in run(backend, torch.randn(3, 70), torch.randn(3, 70), kind="jsd", beta=beta):
        assert torch.equal(out, torch.zeros_like(out))


logit = st.floats(-1e4, 1e4, width=32) | st.sampled_from([-INF, 0.0, 1000.0, -88.5, 1e-6])


@given(
    st.data(),
    st.integers(1, 70),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 0.3]),
)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def check_never_negative(
    backend: str | int,
    data: st.DataObject,
    V: int,
    kind: str,
    dtype: torch.dtype,
    ref_temperature: float,
) -> None:
    base = st.lists(logit, min_size=V, max_size=V)
    x = torch.tensor([data.draw(base)], dtype=torch.float64).to(dtype)
    y = (
        torch.tensor([data.draw(base)], dtype=torch.float64).to(dtype)
        if data.draw(st.booleans())
        else x * (1 + 2**-7)
    )
    kl = run(backend, x, y, kind=kind, ref_temperature=ref_temperature)[0]
    dead = bool((x == -INF).all() or (y == -INF).all())
    assert bool(kl.isnan().all()) if dead else bool((kl >= 0).all())


def test_never_negative(backend: str | int) -> None:
    check_never_negative(backend)


def test_near_rows_are_never_negative(backend: str | int) -> None:
    """Rounding errors of both signs are as large as these KLs."""
    y = 3 * torch.randn(256, 203)
    for size in (1e-7, 1e-5, 1e-3):
        for kind in KINDS:
            assert (run(backend, y + size * torch.randn_like(y), y, kind=kind)[0] >= 0).all()
