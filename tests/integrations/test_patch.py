"""What `patch` replaces in the TRL that is installed, and what it leaves alone; of any version."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import trl
from torch import Tensor

from fasttax.integrations import _trl_targets
from fasttax.integrations._trl_replacements import Replaced
from fasttax.integrations.trl import CHOICES, Patch, patch
from tests.tools import tiny_lm, trl_runs

EVERYWHERE = ("gkd", "gold", "orpo", "cpo", "online_dpo")  # fits from TRL 0.27 on
VERSION = tuple(map(int, trl.__version__.split(".")[:2]))
# TRL 0.27's OnlineDPO does not run with transformers 5, nor does its CPO with rows of 64
RUNS = EVERYWHERE if VERSION > (1, 0) else ("gkd", "gold", "orpo")


@pytest.fixture(autouse=True)
def _unpatched() -> None:
    """What fits is looked up before a test changes anything."""
    fitting()


@functools.cache
def fitting() -> tuple[str, ...]:
    """The labels that this TRL has."""
    with patch(quiet=True) as handle:
        return tuple(handle.patched)


def bound(label: str) -> Any:
    """What a dotted name is bound to."""
    parts = label.split(".")
    depth = next(n for n in range(len(parts) - 1, 0, -1) if _imports(".".join(parts[:n])))
    owner: Any = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:-1]:
        owner = getattr(owner, part)
    return vars(owner).get(parts[-1])


def _imports(name: str) -> bool:
    try:
        return isinstance(importlib.import_module(name), ModuleType)
    except ImportError:
        return False


def is_ours(value: Any) -> bool:
    return isinstance(getattr(value, "__func__", value), Replaced)


def of(trainer: str) -> list[str]:
    """The labels that serve a trainer."""
    targets = [t for t in _trl_targets.TARGETS if trainer in t.trainers]
    places = {place.label for target in targets for place in target.places}
    return [label for label in fitting() if label in places]


# --- what is replaced -----------------------------------------------------------------------------


def test_every_target_is_patched_or_skipped_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handle = patch()
    said = capsys.readouterr().err
    assert f"fasttax: replaced {', '.join(handle.patched)}\n" in said
    for label, reason in handle.skipped.items():
        assert f"fasttax: left alone {label}: {reason}\n" in said
    assert len(handle.patched) + len(handle.skipped) == len(_trl_targets.TARGETS) == 8
    assert all(is_ours(bound(label)) for label in handle.patched)
    assert repr(handle).startswith(f"Patch({handle.patched[0]}")
    handle.undo()
    handle.undo()
    assert repr(handle) == "Patch(undone)"
    assert not any(is_ours(bound(label)) for label in handle.patched)
    assert all(of(name) for name in EVERYWHERE)


def test_the_tested_versions_fit_wholly() -> None:
    if VERSION < (1, 15):
        assert len(fitting()) == 5
        return
    with patch(strict=True, quiet=True) as handle:
        assert (len(handle.patched), handle.skipped) == (8, {})


@pytest.mark.parametrize("version", ["0.27.2", "1.15.0", "1.17.0", "2.0.0.dev0"])
def test_the_version_does_not_count(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(fitting())
    monkeypatch.setattr(trl, "__version__", version)
    with patch(quiet=True) as handle:
        assert handle.patched == wanted


@pytest.mark.parametrize("name", RUNS)
def test_a_patched_run_is_the_unpatched_one(name: str, tmp_path: Path) -> None:
    """The trainers that every version has; the others' runs are in test_trl.py."""

    def trained() -> Any:
        trainer = trl_runs.make(name, tmp_path)
        transformers.set_seed(5)
        trainer.train()
        return trainer

    theirs = trained()
    with patch(name, quiet=True) as handle:
        ours = trained()
    assert set(handle.calls) == set(handle.patched) == set(of(name))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5, abs=2e-6)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)


def test_trainers_are_named_as_trl_does() -> None:
    for given in ("GKD", "OnlineDPOTrainer", "gold"):
        patch(given, quiet=True).undo()
    with patch(trl_runs.classes("gkd")[0], quiet=True) as handle:
        assert handle.patched == of("gkd")
    with pytest.raises(
        ValueError,
        match=r"patch: trainers: expected one of 'sft', 'dpo', .*'online_dpo', got 'ppo'",
    ):
        patch("ppo")
    with pytest.raises(
        ValueError, match=r"patch: trainers: expected one of 'sft', .* or a trainer of these kinds"
    ):
        patch(trl.RewardTrainer)


# --- what does not fit ----------------------------------------------------------------------------

GKD = "trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss"


def gkd_class() -> Any:
    return trl_runs.classes("gkd")[0]


def fits_not(reason: str) -> None:
    """The others are patched all the same; the trainer by name and strict=True are refused."""
    with patch(quiet=True) as handle:
        assert handle.patched == [label for label in fitting() if label != GKD]
        assert reason in handle.skipped[GKD]
    for named, strict in ((("gkd",), False), ((), True), (("gold", "gkd"), False)):
        with pytest.raises(RuntimeError) as error:
            patch(*named, strict=strict, quiet=True)
        assert f"{GKD} " in str(error.value)
        assert reason in str(error.value)
        assert not any(is_ours(bound(label)) for label in fitting())
    patch("gold", quiet=True).undo()


def test_other_numbers_are_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    own = gkd_class().generalized_jsd_loss

    @functools.wraps(own)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) * 1.01

    monkeypatch.setattr(gkd_class(), "generalized_jsd_loss", staticmethod(scaled))
    fits_not("gives other numbers: result 0 differs by")


def test_other_gradients_are_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    own = gkd_class().generalized_jsd_loss

    @functools.wraps(own)
    def halved(*args: Any, **kwargs: Any) -> Any:
        loss = own(*args, **kwargs)
        return loss.detach() + 0.5 * (loss - loss.detach())

    monkeypatch.setattr(gkd_class(), "generalized_jsd_loss", staticmethod(halved))
    fits_not("gives other numbers: result 1 differs by")


def test_other_arguments_are_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.5) -> Tensor:
        return student_logits.sum()

    monkeypatch.setattr(gkd_class(), "generalized_jsd_loss", staticmethod(other))
    fits_not("has the arguments (student_logits, teacher_logits, alpha) in trl")


def test_a_name_that_is_gone_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gkd_class(), "generalized_jsd_loss")
    fits_not("has nothing of that name")


def test_what_nobody_looks_up_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _trl_targets.looked_up
    monkeypatch.setattr(
        _trl_targets,
        "looked_up",
        lambda module: frozenset() if ".gkd." in module else real(module),
    )
    fits_not("nothing in trl.experimental.gkd.gkd_trainer looks it up")


def test_a_module_that_fails_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *args: Any) -> Any:
        if name == "trl.experimental.gkd.gkd_trainer":
            raise ImportError("cannot import name 'x' from 'transformers'")
        return real(name, *args)

    with monkeypatch.context() as m:
        m.setattr(importlib, "import_module", broken)
        with patch(quiet=True) as handle:
            assert GKD not in handle.patched
            assert "can't be imported: ImportError: cannot import name 'x'" in handle.skipped[GKD]


def test_nothing_that_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trl_targets, "looked_up", lambda module: frozenset())
    with pytest.raises(
        RuntimeError,
        match=r"patch: expected ops that fasttax's fit, got trl\..*; train without patch",
    ):
        patch(quiet=True)


def test_the_error_names_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gkd_class(), "generalized_jsd_loss")
    with pytest.raises(RuntimeError, match=r"; patch\('gold'\) fits$"):
        patch("gkd", "gold", quiet=True)
    patch("gold", quiet=True).undo()  # as advised
    with pytest.raises(RuntimeError, match=r"; leave strict out to patch the others$"):
        patch(strict=True, quiet=True)
    patch(quiet=True).undo()  # as advised


def test_a_patch_on_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    with patch("gkd", quiet=True):
        with pytest.raises(
            RuntimeError, match=rf"{GKD} is patched by fasttax already; undo\(\) that patch first"
        ):
            patch("gkd", quiet=True)
        with patch(quiet=True) as others:  # the rest
            assert GKD in others.skipped
            assert GKD not in others.patched
        assert is_ours(bound(GKD))
    assert not is_ours(bound(GKD))


def test_undo_does_not_drop_a_later_patch() -> None:
    handle = patch("gkd", quiet=True)
    ours = bound(GKD)
    gkd_class().generalized_jsd_loss = "theirs"
    with pytest.raises(
        RuntimeError, match="generalized_jsd_loss was replaced again after fasttax did"
    ):
        handle.undo()
    gkd_class().generalized_jsd_loss = ours
    handle.undo()
    assert not handle.active


def test_the_check_draws_no_random_numbers_and_heeds_no_default() -> None:
    state = torch.get_rng_state()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), patch(quiet=True) as handle:
            assert handle.patched == list(fitting())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(handle, Patch)
    assert set(CHOICES) >= set(EVERYWHERE)
    assert tiny_lm.model().dtype == torch.float32
