"""Softcaps in the Triton kernels: how exact rows under one cap are in Triton's interpreter, by
float64 on the same logits, and what their sweep costs beside that of rows without a cap.
"""

from __future__ import annotations

import pytest
import torch

from tests.tools.kl_cases import run_oracle
from tests.tools.utils import assert_within

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
from fasttax.kl.call import tempering
from fasttax.triton import kl_launch
from tests.tools.triton_tools import check_in_the_interpreter

CAPS = (15.0, 30.0, 50.0, 1e6)  # the last of which is none of a model's
OFFSETS = (0.0, 1000.0, -1000.0)
KLS = ("policy_ref", "ref_policy")
V = 3 * 4096 + 64  # three whole steps of a capped KL, and one that is not
FAR = 9000  # in the last whole one
ROWS = 1


def data(name: str, dtype: torch.dtype, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy and reference logits."""
    from bench import logits

    if name == "a far entry":  # one step has an entry that only one of the models has any mass in
        x, y = logits.pair("moved .1", ROWS, V, dtype)
        x, y = x.clone(), y.clone()
        x[:, FAR] = 12.0
        return x, y
    if name.endswith("caps high"):  # 1 + e^88.4 is a float, twice that is none
        x, y = logits.pair("moved .1", ROWS, V, dtype)
        x, y = x.clone(), y.clone()
        x[:, 0] = y[:, 0] = 3 * cap  # so that the frame is as high
        x[:, 5000], y[:, 5000] = cap, 0  # and the steps after it are taken as far apart
        x[:, FAR] = y[:, FAR] = 0
        (x if name.startswith("policy") else y)[:, FAR] = 44.2 * cap
        return x, y
    if name == "suppressed":
        x, y = logits.pair("moved .1", ROWS, V, dtype)
        x, y = x.clone(), y.clone()
        x[:, FAR : FAR + 100], y[:, FAR + 50 : FAR + 200] = -torch.inf, -torch.inf
        return x, y
    if name == "infinite":
        x, y = logits.pair("moved .1", ROWS, V, dtype)
        x, y = x.clone(), y.clone()
        x[0, 5], x[:, FAR], y[:, FAR] = torch.inf, torch.inf, torch.inf
        return x, y
    return logits.pair(name, ROWS, V, dtype)


NAMES = (
    *("moved .01", "moved .1", "moved .3", "confident", "equal", "far"),
    *("a far entry", "suppressed", "infinite", "policy 44.2 caps high", "ref 44.2 caps high"),
)


def check(kind: str, cap: float) -> None:
    """Values to 1e-5, those of a small KL too; gradients by PyTorch's own error in float32."""
    options = {"softcap": cap, "ref_softcap": cap, "temperature": 0.8}
    args = tempering("test", kind=kind, **options).args()
    up = torch.linspace(1, 2, ROWS)
    for name in NAMES:
        for offset in OFFSETS:
            x, y = data(name, torch.bfloat16, cap)
            if offset:
                if name not in ("moved .1", "far"):
                    continue
                x, y = ((z.float() + offset).bfloat16() for z in (x, y))
            case = (kind, cap, name, offset)
            value, saved = kl_launch.token_kl(x, y, None, *args)
            d_x, d_y = kl_launch.token_kl_backward(up, x, y, None, saved, *args, True, True)
            if name == "moved .1":
                both = kl_launch.token_kl_grad(up, x, y, None, *args, True, False)
                assert torch.equal(both[0], value), case
                assert torch.equal(both[1], d_x), case
            wide = (x.double(), y.double())
            truth = run_oracle(*wide, up, torch.float64, kind=kind, **options)
            own = run_oracle(*wide, up, torch.float32, kind=kind, **options)
            if name == "infinite":  # autograd's own gradients are NaN there
                assert float(d_x[:, FAR].abs().max()) < 1e-15, case
                assert not d_x.isnan().any(), case
            if name == "equal":
                assert not any(z.any() for z in (value, d_x, d_y)), case
                continue
            error, of_eager = ((z - truth[0]).abs() for z in (value, own[0]))
            # logits offset by 1000 are all at a model's cap; at 1e6 they are rounded as eager's
            allowed = 1e-9 + 2 * of_eager if offset else 0.0
            assert bool((error <= torch.maximum(1e-5 * truth[0], allowed + 0 * error)).all()), (
                case,
                value,
                truth[0],
            )
            if name == "infinite":
                continue
            for mine, eager, exact in zip((d_x, d_y), own[1:], truth[1:], strict=True):
                assert_within(mine, eager.bfloat16(), exact, ulps=8, name=str(case))


@pytest.mark.parametrize("kind", KLS)
def test_exact_under_a_cap(kind: str) -> None:
    check_in_the_interpreter(__file__, f"[t.check({kind!r}, cap) for cap in t.CAPS]")
