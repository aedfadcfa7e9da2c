"""merge: one alpha for each pattern, a sweep over alphas, a floor and a norm for Fishers."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import cli, merge
from tests.tools import tiny_lm


def model(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("layers.0.mlp.w", "layers.0.attn.w", "layers.1.mlp.w", "head")
    return {name: torch.randn(4, 3, generator=g) for name in names}


def test_the_first_pattern_that_fits_decides() -> None:
    base, aligned = model(1), model(2)
    alpha = {"layers.0.*": 0.25, "*.mlp.*": 0.5, "*": 1.0}
    got = merge.linear(base, aligned, alpha)
    for name, share in zip(base, (0.25, 0.25, 0.5, 1.0), strict=True):
        assert torch.equal(got[name], merge.linear(base, aligned, share)[name]), name
    assert torch.equal(got["head"], aligned["head"])
    one = merge.linear(base, aligned, {"*": 0.3})
    assert all(torch.equal(v, merge.linear(base, aligned, 0.3)[n]) for n, v in one.items())
    wrapped = {f"module.{name}": t for name, t in base.items()}
    under = merge.linear(wrapped, aligned, alpha)
    assert all(torch.equal(under[f"module.{name}"], t) for name, t in got.items())


REFUSED: dict[str, tuple[Any, str]] = {
    "no pattern": ({}, "no pattern"),
    "left over": ({"layers.*": 0.5}, "head\nend the patterns with"),
    "fits nothing": ({"layer.*": 0.5, "*": 1.0}, "'layer.\\*', which is that of none"),
    "hidden behind another": ({"*": 1.0, "head": 0.5}, "put special patterns before"),
    "not finite": ({"*": math.nan}, r"alpha\['\*'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patterns_refused(case: str) -> None:
    alpha, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        merge.linear(model(1), model(2), alpha)
    # the ways out that the errors name
    merge.linear(model(1), model(2), {"layers.*": 0.5, "*": 0.0})
    merge.linear(model(1), model(2), {"head": 0.5, "*": 1.0})


def test_a_tied_weight_has_one_alpha() -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    with pytest.raises(ValueError, match="which are one tensor"):
        merge.linear(Tied(1), Tied(2), {"head.*": 0.1, "*": 0.2})
    merge.linear(Tied(1), Tied(2), {"*": 0.2})


def test_adapter_factors_under_different_ends_are_refused() -> None:
    one = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(3, 2)}
    other = {name: 2 * t for name, t in one.items()}
    with pytest.raises(ValueError, match="lora_A"):
        merge.linear(one, other, {"*lora_A*": 0.0, "*": 1.0})
    assert torch.equal(
        merge.linear(one, other, {"*": 1.0})["lora_A.weight"], other["lora_A.weight"]
    )


# --- sweep ----------------------------------------------------------------------------------------


def test_a_sweep_measures_every_point() -> None:
    base, aligned = model(1), model(2)
    seen: list[Tensor] = []

    def measure(weights: dict[str, Tensor]) -> tuple[float, float]:
        seen.append(weights["head"])
        moved = float((weights["head"] - base["head"]).norm())
        return 1 - moved**2, moved

    report = merge.sweep(base, aligned, [0, 0.5, 1], measure)
    assert [c.name for c in report.checkpoints] == ["alpha 0", "alpha 0.5", "alpha 1"]
    assert report.runs() == ["merge.linear"]
    assert len(seen) == 3  # the base counts for alpha 0
    far = float((aligned["head"] - base["head"]).norm())
    assert [report.gain(c) for c in report.checkpoints] == pytest.approx([0, far / 2, far])
    assert report.tax(report.checkpoints[1]) == pytest.approx(far**2 / 4)
    assert "merge.linear" in report.tax_at(far / 4)


def test_a_sweep_over_modules_and_folders(tmp_path: Path) -> None:
    base, aligned = tiny_lm.model(0), tiny_lm.model(1)
    for name, m in (("base", base), ("aligned", aligned)):
        m.save_pretrained(tmp_path / name)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    found: dict[str, list[Tensor]] = {"module": [], "folder": []}
    places: list[Path] = []

    def of_module(model: Any) -> dict[str, Any]:
        assert model is not base
        found["module"].append(model(tiny_lm.ids()).logits)
        return {"capability": {"a": 1.0}, "alignment": 0.0, "kl": 0.1, "se": {"a": 0.01}}

    def of_folder(path: Path) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        places.append(path)
        found["folder"].append(AutoModelForCausalLM.from_pretrained(path)(tiny_lm.ids()).logits)
        return {"capability": {"a": 1.0}, "alignment": 0.0}

    alphas = [0.5, {"*.layers.0.*": 0.0, "*": 1.0}]
    with torch.no_grad():
        report = merge.sweep(base, aligned, alphas, of_module, progress=False)
        merge.sweep(
            str(tmp_path / "base"),
            tmp_path / "aligned",
            alphas,
            of_folder,
            folder=tmp_path,
            progress=False,
        )
    assert report.checkpoints[1].name == "alpha *.layers.0.* 0, * 1"
    assert (report.checkpoints[0].kl, report.base.se) == (0.1, {"a": 0.01})
    for one, other in zip(found["module"], found["folder"], strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    assert not any(place.exists() for place in places)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "base"]


def _always(result: Any, weights: Any) -> Any:
    return result


def test_a_sweep_refuses() -> None:
    base, aligned = model(1), model(2)
    with pytest.raises(ValueError, match=r"'alpha 0\.5' twice"):
        merge.sweep(base, aligned, [0.5, 0.5], lambda weights: (1, 1))
    with pytest.raises(ValueError, match="one or more"):
        merge.sweep(base, aligned, [], lambda weights: (1, 1))
    for wrong in (1.0, (1, 2, 3), {"capability": 1}, {"capability": 1, "alignment": 1, "kls": 1}):
        with pytest.raises(ValueError, match="measure: expected"):
            merge.sweep(base, aligned, [0.5], partial(_always, wrong))


# --- Fishers --------------------------------------------------------------------------------------


def test_floor_and_norm_against_the_formula() -> None:
    """As Matena & Raffel (2022) have them: raised to the floor, then divided by the norm."""
    models = [model(1), model(2)]
    g = torch.Generator().manual_seed(3)
    fishers = [
        {name: torch.rand(4, 3, generator=g) ** 8 * size for name in models[0]}
        for size in (1.0, 1e-3)
    ]
    for floor, normalize in ((0.0, None), (1e-3, None), (0.0, "l2"), (1e-3, "l2")):
        got = merge.fisher_average(models, fishers, floor=floor, normalize=normalize)
        raised = [{n: f.double().clamp(min=floor) for n, f in each.items()} for each in fishers]
        norms = [1.0, 1.0]
        if normalize:
            norms = [math.sqrt(sum(float((f * f).sum()) for f in each.values())) for each in raised]
        for name in models[0]:
            shares = [each[name] / norm for each, norm in zip(raised, norms, strict=True)]
            exact = sum(s * m[name].double() for s, m in zip(shares, models, strict=True))
            torch.testing.assert_close(
                got[name].double(), exact / sum(shares), rtol=1e-5, atol=1e-6
            )


def test_a_floor_keeps_a_tiny_fisher_from_deciding_alone() -> None:
    models = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    fishers = [{"w": torch.tensor([1e-30])}, {"w": torch.tensor([0.0])}]
    assert merge.fisher_average(models, fishers)["w"] == 1
    assert merge.fisher_average(models, fishers, floor=1e-6)["w"] == 2
    with pytest.raises(ValueError, match=r"fishers\[1\].*zeros alone"):
        merge.fisher_average(models, fishers, normalize="l2")
    with pytest.raises(ValueError, match="'l2'"):
        merge.fisher_average(models, fishers, normalize="l1")
    with pytest.raises(ValueError, match="floor"):
        merge.fisher_average(models, fishers, floor=-1.0)


def test_a_tied_weight_is_in_the_norm_once() -> None:
    shared = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    models = [{"a": w, "b": w, "c": torch.ones(1)} for w in shared]
    fishers = [
        {"a": torch.tensor([3.0, 0.0]), "c": torch.tensor([4.0])},
        {"a": torch.tensor([0.6, 0.0]), "c": torch.tensor([0.8])},
    ]
    got = merge.fisher_average(models, fishers, normalize="l2")  # both are (0.6, 0.8) then
    assert got["a"].tolist() == [2.0, 3.5]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, aligned = tiny_lm.save(tmp_path / "base", 0), tiny_lm.save(tmp_path / "aligned", 1)
    line = ["merge", "linear", base, aligned, "--output", str(tmp_path / "out")]
    assert cli.main([*line, "--alpha", "*.layers.0.*=0", "--alpha", "*=1"]) == 0
    got = merge.linear(tmp_path / "out", aligned, 0.0)
    assert torch.equal(got["lm_head.weight"], tiny_lm.model(1).lm_head.weight)
    for wrong in (["half"], ["0.5", "0.6"], ["*="]):
        words = [word for alpha in wrong for word in ("--alpha", alpha)]
        assert cli.main([*line, *words]) == 2
        assert "PATTERN=NUMBER" in capsys.readouterr().err
