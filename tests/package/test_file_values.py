"""What files hold: what no Fisher, checkpoint or cache can have is refused where it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fasttax
from fasttax import DiagonalFisher, FisherEstimate
from fasttax._base import mapped
from fasttax._base.packed import SPLIT, decode_anchor, encode_anchor
from fasttax.integrations.reference import TopKReference
from tests.tools.models import TokenModel, ids

HEADER = {"fasttax": "FisherEstimate", "metadata": "{}"}  # of a file of an earlier version


# --- what is no Fisher -------------------------------------------------------------------------

ONE = torch.ones(3)
CODES = torch.ones(3, dtype=torch.uint8)
RANGES = torch.zeros(1, 2)
NO_FISHERS: dict[str, dict[str, Tensor]] = {
    "negative": {"fisher.w": -ONE},
    "NaN": {"fisher.w": ONE * torch.nan},
    "infinite": {"fisher.w": ONE / 0},
    "integers": {"fisher.w": ONE.int()},
    "bools": {"fisher.w": ONE.bool()},
    "codes without ranges": {"fisher.w": CODES},
    "ranges of another size": {"fisher.w": CODES, "scales.w": torch.zeros(2, 2)},
    "ranges in bfloat16": {"fisher.w": CODES, "scales.w": RANGES.bfloat16()},
    "infinite ranges": {"fisher.w": CODES, "scales.w": RANGES + 1e30},
    "NaN ranges": {"fisher.w": CODES, "scales.w": RANGES * torch.nan},
    "negative steps": {"fisher.w": CODES, "scales.w": RANGES - 1},
    "ranges of floats": {"fisher.w": ONE, "scales.w": RANGES},
    "ranges alone": {"fisher.v": ONE, "scales.w": RANGES},
}


@pytest.mark.parametrize("case", NO_FISHERS)
def test_files_of_what_is_no_fisher(case: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    save_file(NO_FISHERS[case], path, metadata=HEADER)
    with pytest.raises(ValueError, match=rf"{path}: \w+\.w: expected"):
        FisherEstimate.load(path)
    if case != "ranges alone":  # which a merge does not ask for
        models: Any = [{"w": ONE}, {"w": 2 * ONE}]
        with pytest.raises(ValueError, match=rf"{path}: \w+\.w: expected"):
            fasttax.merge.fisher_average(models, [path, path])


def test_checkpoints_of_what_is_no_sum(tmp_path: Path) -> None:
    path = tmp_path / "state"
    estimator = DiagonalFisher(TokenModel())
    estimator.update(ids(2, 6))
    estimator.checkpoint(path)
    with mapped.TensorFile(path) as file:
        tensors, about = dict(file), file.about
    old = {"fasttax": "DiagonalFisher", "metadata": about["metadata"]}
    for spoil in (lambda t: -t - 1, lambda t: t * torch.nan, lambda t: t / 0, lambda t: t.int()):
        save_file({**tensors, "sum.up.weight": spoil(tensors["sum.up.weight"])}, path, old)
        with pytest.raises(ValueError, match=rf"{path}: sum\.up\.weight: expected"):
            DiagonalFisher(TokenModel()).resume(path)


@pytest.mark.parametrize("bad", [torch.nan, -1.0, torch.inf, 1e300])
def test_u8log_has_no_code_for_it(bad: float) -> None:
    values = {"fine": torch.ones(3, dtype=torch.float64)}
    values["odd"] = torch.tensor([1.0, bad], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"FisherEstimate\.to: storage: .* in odd"):
        FisherEstimate(values).to("u8log")


# --- a resumed estimate ------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A checkpoint of six batches of two."""
    path = tmp_path / "state"

    def crashing() -> Iterator[Tensor]:
        yield from ids(12, 6).split(2)
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fasttax.estimate_fisher(TokenModel(), crashing(), **again(path))
    return path


def again(path: Path) -> Any:
    return {"checkpoint": path, "checkpoint_every": 1, "progress": False}


@pytest.mark.parametrize("options", [{"shift": False}, {"fallback": "loop"}])
def test_other_options_are_another_estimate(options: Any, state: Path) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: .* in the file"):
        fasttax.estimate_fisher(TokenModel(), ids(16, 6).split(2), **again(state), **options)


def test_fewer_batches_or_examples_than_the_checkpoint_holds(state: Path) -> None:
    batches = ids(12, 6).split(2)
    with pytest.raises(ValueError, match=r"batches: expected the 6 that the checkpoint .* got 5"):
        fasttax.estimate_fisher(TokenModel(), batches[:5], **again(state))
    with pytest.raises(ValueError, match=r"max_examples: expected at least the 12 .* got 8"):
        fasttax.estimate_fisher(TokenModel(), batches, max_examples=8, **again(state))
    assert state.exists()
    assert fasttax.estimate_fisher(TokenModel(), batches, **again(state)).metadata["examples"] == 12


# --- top-k caches ------------------------------------------------------------------------------


def _cache() -> TopKReference:
    logp = torch.log_softmax(torch.randn(5, 8), -1).topk(3)
    metadata = {"vocabulary": 8}
    return TopKReference(
        torch.arange(5), torch.tensor([0, 2, 5]), logp.values, logp.indices.int(), metadata
    )


CACHES: dict[str, tuple[Callable[[TopKReference], Any], str]] = {
    "NaN": (lambda c: c.logp[1].fill_(torch.nan), "logp"),
    "above 1": (lambda c: c.logp[1].fill_(0.0), "logp"),
    "infinite": (lambda c: c.logp[1].fill_(torch.inf), "logp"),
    "an id too large": (lambda c: c.ids[2, 0].fill_(8), "ids"),
    "a negative id": (lambda c: c.ids[2, 0].fill_(-1), "ids"),
    "an id twice": (lambda c: c.ids[3, 0].copy_(c.ids[3, 1]), "twice"),
    "offsets": (lambda c: c.offsets[1].fill_(6), "offsets"),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_cache_of_what_no_reference_gives(case: str, tmp_path: Path) -> None:
    change, words = CACHES[case]
    cache = _cache()
    cache.save(tmp_path / "cache")
    assert torch.equal(TopKReference.load(tmp_path / "cache").ids, cache.ids)
    change(cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"{tmp_path}/cache: .*{words}"):
        TopKReference.load(tmp_path / "cache")


def test_a_cache_row_that_is_filled_up(tmp_path: Path) -> None:
    cache = _cache()
    cache.logp[2, 1:], cache.ids[2, 1:] = -torch.inf, 0
    cache.save(tmp_path / "cache")
    assert torch.equal(TopKReference.load(tmp_path / "cache").logp, cache.logp)


# --- other defaults ----------------------------------------------------------------------------


@pytest.mark.parametrize("default", ["float64", "bfloat16", "float16", "meta"])
def test_other_defaults_give_the_same_bits(default: str, tmp_path: Path) -> None:
    models: Any = [{"w": torch.randn(600)}, {"w": torch.randn(600)}]
    fishers = [FisherEstimate({"w": torch.rand(600) ** 9}) for _ in range(2)]
    want = [f.to("u8log") for f in fishers]
    merged = fasttax.merge.fisher_average(models, want)["w"]

    def check() -> None:
        for k, f in enumerate(fishers):
            path = tmp_path / f"{k}"
            f.to("u8log").save(path)
            assert torch.equal(FisherEstimate.load(path)["w"], want[k]["w"])
            f.save(tmp_path / f"s{k}", sharded=True)
            assert torch.equal(FisherEstimate.load(tmp_path / f"s{k}")["w"], f["w"])
        got = fasttax.merge.fisher_average(models, [tmp_path / "0", tmp_path / "1"])["w"]
        assert torch.equal(got, merged)
        half = fasttax.merge.linear(models[0], models[1], 0.5, output=tmp_path / "half.safetensors")
        assert torch.equal(load_file(half)["w"], (models[0]["w"] + models[1]["w"]) / 2)

    before = torch.get_default_dtype()
    if default == "meta":
        with torch.device("meta"):
            check()
        return
    torch.set_default_dtype(getattr(torch, default))
    try:
        check()
    finally:
        torch.set_default_dtype(before)


def test_the_split_anchor_under_another_default() -> None:
    anchor = torch.randn(300)
    want = encode_anchor(anchor, SPLIT)
    before = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            got = encode_anchor(anchor, SPLIT)
            back = decode_anchor(got, anchor.shape)
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(got, want)
        assert torch.equal(back, decode_anchor(want, anchor.shape))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_a_cache_under_another_default(default: torch.dtype) -> None:
    cache, before = _cache(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        logp, found = cache.rows(torch.tensor([[2, 3, 4, 0]]), torch.tensor([[1, 1, 1, 0]]))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(logp[0, :2], cache.logp[2:4])
    assert torch.equal(found[0, :2], cache.ids[2:4].long())
    assert not bool(logp[0, 2].any())
