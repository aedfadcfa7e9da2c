"""What `attach` says of mappings that lack a key, or have one that nobody reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fasttax.integrations.transformers import attach
from tests.tools import launched, tiny_lm

TEXTS = [{"input_ids": tiny_lm.ids(2)}]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launched.trainer(Path(tmp_path_factory.mktemp("trainer")), use_cpu=True)


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        (
            {"ref_model": None},
            "attach: kl: expected the keys 'ref_model' and 'beta', got no 'beta'; add 'beta': its "
            "coefficient, 0.1 to begin with, or an AdaptiveKL(target=0.05)",
        ),
        (
            {"beta": 0.1},
            "got no 'ref_model'; add 'ref_model': the model that the KL is to (None: the trainer's "
            "own reference, or the model without its adapter)",
        ),
        ({}, "got no 'ref_model' and no 'beta'; add 'ref_model': the model"),
        ({"ref_model": None, "betas": 0.1}, "got 'betas'; did you mean 'beta'?"),
        ({"ref": None, "beta": 0.1}, "got 'ref'; did you mean 'ref_model'?"),
        ({"ref_model": None, "beta": 1, "trainer": 2}, "got 'trainer'; leave it out"),
    ],
)
def test_kl(kl: dict[str, Any], said: str, trainer: Any) -> None:
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match=re.escape(said)):
        attach(trainer, kl=kl)
    assert trainer.callback_handler.callbacks == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replay": {"loader": TEXTS, "weights": 1.0}}, "replay: .*'weights'; did you mean"),
        ({"project": {"general": TEXTS, "direction": 8}}, "did you mean 'directions'"),
        (
            {"log_quadratic": {"ref_model": tiny_lm.model(), "batches": TEXTS, "batch": 1}},
            "did you mean 'batches'",
        ),
    ],
)
def test_others(given: dict[str, Any], said: str, trainer: Any) -> None:
    with pytest.raises(ValueError, match=f"attach: .*{said}"):
        attach(trainer, **given)
