"""What a type checker sees of the public functions: `make lint` reads it, and it runs as well."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import fasttax


def test_results_have_their_types() -> None:
    x, w = torch.randn(2, 4), torch.randn(6, 4)
    assert_type(fasttax.token_kl(x, x + 1), Tensor)
    assert_type(fasttax.token_kl(x, x + 1, kind="jsd", reduction="mean"), Tensor)
    assert_type(fasttax.linear_token_kl(x, w, x, w, reduction="sum"), Tensor)
    assert_type(fasttax.linear_token_kl(x, w, x, w, return_entropy=True), tuple[Tensor, Tensor])
    assert_type(fasttax.token_stats(x, outputs=("entropy",)), fasttax.TokenStats)
    assert_type(fasttax.kl_estimate(x, x, kind="k1"), Tensor)


def test_dir_is_the_public_names() -> None:
    assert set(dir(fasttax)) == {*fasttax.__all__, "demo", "integrations", "tax", "__version__"}
