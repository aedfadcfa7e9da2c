"""FisherEstimate: a mapping with provenance, its storages' error bounds, its files, and Adam's
second moment as a stand-in.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fasttax
from fasttax import FisherEstimate
from fasttax._base.packed import BLOCK
from tests.tools.models import TokenModel, ids


def values() -> dict[str, Tensor]:
    """Squares over many orders of magnitude, with exact zeros; sizes at, below and above u8log's
    block, and 0.
    """
    torch.manual_seed(0)
    spread = {
        "a.weight": (7, 41),
        "a.bias": (BLOCK,),
        "b.weight": (1,),
        "empty": (0, 3),
        "c.weight": (BLOCK + 1,),
    }
    out = {n: torch.exp(4 * torch.randn(shape) - 12) for n, shape in spread.items()}
    out["a.weight"][::2] = 0
    return out


def estimate(**metadata: Any) -> FisherEstimate:
    return FisherEstimate(values(), {"examples": 3, "tokens": 10, "normalize": "sum", **metadata})


def test_mapping() -> None:
    f = estimate()
    assert isinstance(f, Mapping)
    assert (len(f), list(f), "a.bias" in f, "z" in f) == (5, list(values()), True, False)
    assert all(torch.equal(t, values()[n]) for n, t in f.items())
    assert "5 tensors" in repr(f)
    assert "examples=3" in repr(f)
    with pytest.raises(KeyError, match=r"a\.wieght.*nearest names: a\.weight"):
        f["a.wieght"]
    numbers: Any = {"x": [1.0]}
    with pytest.raises(TypeError, match=r"values\['x'\].*torch.Tensor"):
        FisherEstimate(numbers)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
def test_storage_error_bounds(storage: str) -> None:
    """bf16: half a unit of 8 bits, 2^-8. u8log: half of a block's 254th part of its range in log2.
    Zeros exact in all.
    """
    packed = estimate().to(storage)
    assert packed.metadata["storage"] == storage
    for n, f in values().items():
        g = packed[n]
        assert g.shape == f.shape
        assert torch.equal(g == 0, f == 0)
        if storage == "fp32":
            assert torch.equal(g, f)
        elif storage == "bf16":
            assert bool(((g.double() - f.double()).abs() <= f.double() * 2**-8).all())
        for block_f, block_g in (
            zip(f.flatten().split(BLOCK), g.flatten().split(BLOCK), strict=True)
            if storage == "u8log"
            else ()
        ):
            logs, got = block_f[block_f > 0].double().log2(), block_g[block_f > 0].double().log2()
            if logs.numel():
                allowed = 0.5 * float(logs.max() - logs.min()) / 254 + 1e-5
                assert float((logs - got).abs().max()) <= allowed
    sizes = {"fp32": 4, "bf16": 2, "u8log": 1}
    assert packed.stored("c.weight").values.element_size() == sizes[storage]


def test_u8log_of_extremes() -> None:
    """One value, all equal, smallest subnormal beside the largest float: finite, ordered, zeros
    kept.
    """
    f = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3e38])
    g = FisherEstimate({"x": f, "equal": torch.full((300,), 0.3), "zero": torch.zeros(5)}).to(
        "u8log"
    )
    assert bool(torch.isfinite(g["x"]).all())
    assert g["x"][0] == 0
    assert bool((g["x"].diff() > 0).all())
    torch.testing.assert_close(g["equal"], torch.full((300,), 0.3), rtol=1e-6, atol=0)
    assert torch.equal(g["zero"], torch.zeros(5))


def test_sum_and_scale() -> None:
    total = estimate() + 2 * estimate() * 0.5
    assert all(torch.equal(total[n], 2 * t) for n, t in values().items())
    assert (total.metadata["examples"], total.metadata["tokens"]) == (6, 20)
    assert (estimate() * 3).metadata["scaled_by"] == 3
    with pytest.raises(ValueError, match=r"(?s)a\.bias: shape \(256,\) and \(2,\).*") as caught:
        estimate() + FisherEstimate(
            {
                **{n: t for n, t in values().items() if n != "b.weight"},
                "a.bias": torch.ones(2),
                "d": torch.ones(1),
            }
        )
    assert "b.weight: only in one" in str(caught.value)
    assert "d: only in one" in str(caught.value)
    for factor in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="factor"):
            estimate() * factor


def test_sum_of_two_halves_is_the_whole() -> None:
    model, x = TokenModel(), ids(4, 5)

    def part(batch: Tensor) -> FisherEstimate:
        estimator = fasttax.DiagonalFisher(model, labels="true")
        estimator.update(batch)
        return estimator.finalize(normalize="sum")

    whole, halves = part(x), part(x[:1]) + part(x[1:])
    for n in whole:
        torch.testing.assert_close(halves[n], whole[n], rtol=1e-5, atol=1e-8)
    assert halves.metadata["examples"] == 4


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
def test_save_and_load(storage: str, tmp_path: Path) -> None:
    f = estimate(labels="true").to(storage)
    f.save(tmp_path / "f.safetensors")
    again = FisherEstimate.load(str(tmp_path / "f.safetensors"))
    assert list(again) == sorted(again) or set(again) == set(f)
    assert all(torch.equal(again[n], f[n]) for n in f)
    assert again.metadata == f.metadata
    assert os.listdir(tmp_path) == ["f.safetensors"]


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated": (damaged, ("truncated", ".save()")),
    "empty": (lambda p: p.write_bytes(b""), ("truncated", ".save()")),
    "text": (
        lambda p: p.write_text("not a tensor file at all"),
        ("truncated or no safetensors file",),
    ),
    "foreign": (
        lambda p: save_file({"w": torch.ones(2)}, p),
        ("not a FisherEstimate file", "no fasttax header"),
    ),
    "ewc": (
        lambda p: fasttax.EWC(TokenModel(), {"up.bias": torch.ones(20)}, strength=1.0).save(p),
        ("not a FisherEstimate file", "'EWC'"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_clear_errors(case: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    estimate().save(path)
    spoil, words = FILES[case]
    spoil(path)
    with pytest.raises(ValueError) as caught:
        FisherEstimate.load(path)
    assert all(w in str(caught.value) for w in (*words, str(path)))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors.*\.save\(\)"):
        FisherEstimate.load(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        estimate().save(tmp_path / "no" / "f.safetensors")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_from_adam_is_the_corrected_second_moment(kind: Any) -> None:
    """With one constant gradient the bias-corrected moment is its square, whatever beta2."""
    model = TokenModel()
    model.embed.requires_grad_(False)
    optimizer = kind(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    grads = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        for n, p in model.named_parameters():
            p.grad = grads.get(n)
        optimizer.step()
    f = FisherEstimate.from_adam(optimizer, model, batch_size=8)
    assert set(f) == set(grads)
    for n, g in grads.items():
        torch.testing.assert_close(f[n], 8 * g**2, rtol=1e-5, atol=0)
    assert f.metadata["estimator"] == "adam_second_moment"
    counted = FisherEstimate.from_adam(optimizer, model, batch_size=np.int64(8))
    assert counted.metadata == f.metadata
    assert type(counted.metadata["batch_size"]) is int
    with pytest.raises(ValueError, match="from_adam: batch_size: expected an integer >= 1"):
        FisherEstimate.from_adam(optimizer, model, batch_size=0)
    with pytest.raises(ValueError, match="from_adam: optimizer"):
        FisherEstimate.from_adam(kind(model.parameters()), model)


@pytest.mark.parametrize("default", ["meta", "float64", "bfloat16"])
def test_other_defaults_change_nothing(default: str) -> None:
    """torch.set_default_device, torch.set_default_dtype: of tensors that say neither."""
    model, x = TokenModel(), ids(3, 6)
    wanted = fasttax.estimate_fisher(model, [x], progress=False)
    with contextlib.ExitStack() as stack:
        if default == "meta":
            stack.enter_context(torch.device("meta"))
        else:
            before = torch.get_default_dtype()
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(getattr(torch, default))
        found = fasttax.estimate_fisher(model, [x], progress=False)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
