"""An estimate that goes on after a crash: the same bits, and of the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax import DiagonalFisher
from tests.tools.models import TokenModel, ids, logits_of


def test_resumes_after_a_crash_to_the_same_bits(tmp_path: Path) -> None:
    model, batches, path = TokenModel(), list(ids(14, 6).split(2)), tmp_path / "state.safetensors"
    whole = fasttax.estimate_fisher(model, batches, progress=False)

    def crashing() -> Any:
        yield from batches[:5]
        raise KeyboardInterrupt

    options: Any = {"progress": False, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fasttax.estimate_fisher(model, crashing(), **options)
    assert path.exists()
    with pytest.raises(
        ValueError, match=r"(?s)resume.*labels: 'sample' in the file, 'true' here.*delete the file"
    ):
        fasttax.estimate_fisher(model, batches, labels="true", **options)
    resumed = fasttax.estimate_fisher(model, batches, **options)
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)
    assert resumed.metadata == whole.metadata
    assert not path.exists()
    estimator = DiagonalFisher(model)
    estimator.update(batches[0])
    estimator.checkpoint(path)
    with pytest.raises(ValueError, match="not a FisherEstimate file"):
        fasttax.FisherEstimate.load(path)
    model.up.weight.data.add_(1)
    with pytest.raises(ValueError, match="model_hash"):
        DiagonalFisher(model).resume(path)


def interrupted(model: Any, batches: list[Any], path: Path, stop: int, **options: Any) -> None:
    """An estimate that crashes after `stop` batches."""

    def crashing() -> Any:
        yield from batches[:stop]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fasttax.estimate_fisher(
            model, crashing(), checkpoint=path, checkpoint_every=2, progress=False, **options
        )


def half(batch: Any) -> Any:
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def summed(model: Any, batch: Any) -> torch.Tensor:
    return logits_of(model(batch)).square().sum()


@pytest.mark.parametrize("kind", ["tensors", "mappings", "pairs", "own loss"])
def test_other_batches_of_equal_number_are_no_continuation(tmp_path: Path, kind: str) -> None:
    model, data, path = TokenModel(), list(ids(14, 6).split(2)), tmp_path / "state.safetensors"
    options: dict[str, Any] = {"own loss": {"loss": summed, "labels": "true"}}.get(kind, {})
    shaped: Any = {"mappings": half, "pairs": lambda x: (x, x)}.get(kind, lambda x: x)
    batches = [shaped(x) for x in data]
    interrupted(model, batches, path, 5, **options)
    options |= {"checkpoint": path, "checkpoint_every": 2, "progress": False}
    for others in (
        [shaped(x) for x in ids(14, 6, seed=1).split(2)],  # another data set
        [batches[1], batches[0], *batches[2:]],  # another order
        [*batches[:3], shaped(data[3].flip(0)), *batches[4:]],  # one batch otherwise
    ):
        with pytest.raises(
            ValueError, match=r"batches: expected the 4 .*in that order, got others.*same seed"
        ):
            fasttax.estimate_fisher(model, others, **options)
        assert path.exists()
    whole = fasttax.estimate_fisher(
        model, batches, **{k: v for k, v in options.items() if "checkpoint" not in k}
    )
    resumed = fasttax.estimate_fisher(model, batches, **options)
    for name in whole:  # a loss of one's own is proven anew, on a batch that is summed apart
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-6, atol=1e-9)


def test_a_checkpoint_by_hand_goes_on_and_is_held_from_there(tmp_path: Path) -> None:
    """What update() saw is not hashed; what estimate_fisher passes over is."""
    model, batches, path = TokenModel(), list(ids(14, 6).split(2)), tmp_path / "state.safetensors"
    estimator = DiagonalFisher(model)
    estimator.update(batches[0])
    estimator.checkpoint(path)
    interrupted(model, batches, path, 5)
    options: Any = {"progress": False, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(ValueError, match="in that order, got others"):
        fasttax.estimate_fisher(model, [batches[1], *batches[1:]], **options)
    held = DiagonalFisher(model)
    held.resume(path)
    held.update(batches[4])
    held.checkpoint(path)  # of a batch more than estimate_fisher saw
    resumed = fasttax.estimate_fisher(model, batches, **options)
    whole = fasttax.estimate_fisher(model, batches, progress=False)
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)
