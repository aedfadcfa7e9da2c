"""The Fisher on a GPU does not wait for it: a model on the meta device, which has no values to look
at, counts its batches. What can be wrong with a batch that lies on a GPU is said when the estimate
is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import functional
from fasttax._base import files, waits
from tests.tools.models import VOCAB, TokenModel, causal_lm
from tests.tools.models import ids as tokens
from tests.tools.syncs import NoSync


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors count as a GPU's, whose values nobody may look at."""
    monkeypatch.setattr(waits, "waits", lambda t: True)


def ids() -> Tensor:
    return tokens(3, 9)


def lm() -> nn.Module:
    """Of transformers, whose masks have a look of their own at the tokens' places."""
    model: nn.Module = causal_lm("llama")
    return model


def without_values(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model on the meta device, whose weights nobody can hash."""
    monkeypatch.setattr(files, "weights_hash", lambda named: "none")
    return make().to("meta")


def count(
    make: Callable[[], nn.Module],
    batches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> NoSync:
    """The estimator counts batches from the CPU, and then the same from the device."""
    model = without_values(make, monkeypatch)
    options = {"verify": False, "generator": torch.Generator("cpu"), **options}
    estimator = fasttax.DiagonalFisher(model, **options)
    for batch in (*batches, *(there(batch) for batch in batches)):
        with NoSync("meta") as seen:
            estimator.update(batch)
    assert estimator.batches == 2 * len(batches)
    return seen


def there(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to("meta")
    if isinstance(batch, tuple):
        return tuple(t.to("meta") for t in batch)
    return {k: t.to("meta") for k, t in batch.items()}


def estimate(batches: list[Any]) -> fasttax.FisherEstimate:
    estimator = fasttax.DiagonalFisher(lm())
    for batch in batches:
        estimator.update(batch)
    return estimator.finalize()


def masked() -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    return {
        "input_ids": ids(),
        "attention_mask": mask,
        "labels": ids().masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("unit", ["example", "token", "batch"])
def test_update_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    seen = count(TokenModel, [ids(), ids()], monkeypatch, unit=unit)
    # the units' boundaries once, for all layers, and the random numbers of a generator on the CPU
    assert seen.crossed <= 3


def test_with_the_datas_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    count(TokenModel, [masked(), masked()], monkeypatch, labels="true")


def test_the_heads_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    count(TokenModel, [ids(), ids()], monkeypatch, labels="exact_head", mc_samples=2)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.LayerNorm(20), nn.Linear(20, 5))


def inputs(n: int = 4) -> Tensor:
    return torch.randn(n, 2, 7, generator=torch.Generator().manual_seed(2))


def test_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 4, -100, 2])
    count(classifier, [(inputs(), labels)], monkeypatch, labels="true")
    count(classifier, [inputs()], monkeypatch, likelihood="bernoulli")


def test_observe_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_values(TokenModel, monkeypatch)
    options: dict[str, Any] = {"verify": False, "generator": torch.Generator("cpu")}
    estimator = fasttax.DiagonalFisher(model, **options)
    for _ in range(2):
        with NoSync("meta"), estimator.observe():
            model(ids().to("meta")).logits.float().logsumexp(-1).sum().backward()
    assert estimator.examples == 6


@pytest.mark.parametrize("make", [lambda: [ids(), ids(), masked()], lambda: [masked()] * 3])
def test_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], list[Any]]
) -> None:
    plain = estimate(make())
    monkeypatch.setattr(waits, "waits", lambda t: True)
    other = estimate(make())
    assert other.metadata["tokens"] == plain.metadata["tokens"]
    assert other.metadata["relative_error"] == pytest.approx(plain.metadata["relative_error"])
    for name, value in plain.items():
        assert torch.equal(other[name], value), name


# --- what is wrong is said late, and no number comes before it ------------------------------------


def with_wrong_id() -> Tensor:
    wrong = ids()
    wrong[1, 3] = VOCAB + 4
    return wrong


def labelled(label: int) -> dict[str, Tensor]:
    labels = ids()
    labels[2, 2] = label
    return {"input_ids": ids(), "labels": labels}


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(ValueError, match=message):
        yield


@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("ask", ["finalize", "checkpoint"])
def test_wrong_labels_are_named_when_the_estimate_is_asked_for(
    on_a_gpu: None, ask: str, fallback: str | None, tmp_path: Any
) -> None:
    estimator = fasttax.DiagonalFisher(lm(), labels="true", verify=False, fallback=fallback)
    estimator.update(labelled(3))
    estimator.update(labelled(VOCAB + 7))
    estimator.update(labelled(3))
    for _ in range(2):
        with refused(rf"labels.*in \[0, {VOCAB}\).*3 to {VOCAB + 7}"):
            estimator.finalize() if ask == "finalize" else estimator.checkpoint(tmp_path / "f")


def test_wrong_ids_are_named(on_a_gpu: None) -> None:
    estimator = fasttax.DiagonalFisher(lm(), verify=False)
    estimator.update(ids())
    estimator.update(with_wrong_id())
    with refused(rf"batch\['input_ids'\]: expected ids in \[0, {VOCAB}\), got 3 to {VOCAB + 4}"):
        estimator.finalize()


def test_wrong_probabilities_are_named(on_a_gpu: None) -> None:
    options: dict[str, Any] = {"likelihood": "bernoulli", "labels": "true", "verify": False}
    estimator = fasttax.DiagonalFisher(classifier(), **options)
    labels = torch.rand(4, 5)
    estimator.update((inputs(), labels))
    estimator.finalize()
    estimator.update((inputs(), labels - 0.9))
    with refused(r"labels in \[0, 1\], got -0\.\d+ to"):
        estimator.finalize()


# --- the functional ops ---------------------------------------------------------------------------

X, D = torch.randn(6, 3), torch.randn(6, 4)
WORDS = torch.tensor([0, 2, 2, 1, 0, 1])
OPS: dict[str, Callable[..., Tensor]] = {
    "linear_sqgrad": lambda cu: functional.linear_sqgrad(X, D, cu_seqlens=cu),
    "norm_sqgrad": lambda cu: functional.norm_sqgrad(X, X, cu_seqlens=cu),
    "bias_sqgrad": lambda cu: functional.bias_sqgrad(D, cu_seqlens=cu),
    "embedding_sqgrad": lambda cu: functional.embedding_sqgrad(WORDS, D, 5, cu_seqlens=cu),
}


@pytest.mark.parametrize("op", OPS)
def test_functional_ops_wait_for_nothing(on_a_gpu: None, op: str) -> None:
    with NoSync() as seen:
        OPS[op](torch.tensor([0, 2, 2, 6]))
    assert seen.calls["aten::_assert_async"] >= 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", [[1, 6], [0, 5], [0, 4, 2, 6]])
def test_the_device_stops_at_wrong_boundaries(on_a_gpu: None, op: str, wrong: list[int]) -> None:
    """On the CPU, which has the device's assertion too, at once."""
    with pytest.raises(RuntimeError, match=rf"{op}: cu_seqlens: expected boundaries that rise"):
        OPS[op](torch.tensor(wrong))


def test_the_device_stops_at_wrong_ids(on_a_gpu: None) -> None:
    with pytest.raises(RuntimeError, match=r"embedding_sqgrad: ids: expected values in \[0, 2\)"):
        functional.embedding_sqgrad(WORDS, D, 2)


def test_masked_tokens_of_the_head_are_not_counted_out(on_a_gpu: None) -> None:
    hidden, weight, mask = torch.randn(6, 3), torch.randn(7, 3), torch.tensor([1, 0, 1, 1, 0, 1])
    hidden[1] = torch.nan
    with NoSync():
        got = functional.lm_head_fisher(hidden, weight, mask=mask)
    torch.testing.assert_close(got, functional.lm_head_fisher(hidden[mask != 0], weight))
