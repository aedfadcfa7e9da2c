"""mergekit's configurations: what is written says what merge.linear does, and reads back."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttax import cli, merge

yaml = pytest.importorskip("yaml")
ALPHAS: list[Any] = [0.3, 1e-05, {"*.mlp.*": 0.5, "*embed*": 0.25, "*": 1.0}]
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]


def weight_of(setting: Any, name: str) -> float:
    """mergekit's own rule: the first filter that is a part of the name."""
    if isinstance(setting, float | int):
        return float(setting)
    return next(
        float(row["value"])
        for row in setting
        if row.get("filter") in (None, "*") or row["filter"] in name
    )


def alpha_of(alpha: Any, name: str) -> float:
    if isinstance(alpha, float):
        return alpha
    return next(value for pattern, value in alpha.items() if fnmatchcase(name, pattern))


@pytest.mark.parametrize("alpha", ALPHAS, ids=["number", "exponent", "patterns"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_written_weights_are_the_alphas(method: str, alpha: Any, tmp_path: Path) -> None:
    path = merge.write_mergekit(tmp_path / "m.yml", "org/base: #1", 'a"b', alpha, method=method)
    content = yaml.safe_load(path.read_text())
    assert content["merge_method"] == method
    assert content["parameters"] == {"normalize": False}
    by_model = {m["model"]: m["parameters"] for m in content["models"]}
    for name in NAMES:
        wanted = alpha_of(alpha, name)
        assert weight_of(by_model['a"b']["weight"], name) == pytest.approx(wanted)
        if method == "linear":
            assert weight_of(by_model["org/base: #1"]["weight"], name) == pytest.approx(1 - wanted)
    if method == "linear":
        assert "base_model" not in content
    else:
        assert content["base_model"] == "org/base: #1"
    assert ("density" in by_model['a"b']) == (method in ("ties", "dare_ties"))


@pytest.mark.parametrize("alpha", ALPHAS, ids=["number", "exponent", "patterns"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_read_back(method: str, alpha: Any, tmp_path: Path) -> None:
    path = merge.write_mergekit(tmp_path / "m.yml", "base", "aligned", alpha, method=method)
    found = merge.read_mergekit(path)
    assert (found.base, found.aligned) == ("base", "aligned")
    assert found.alpha == (pytest.approx(alpha) if isinstance(alpha, float) else alpha)


@pytest.mark.parametrize(
    ("alpha", "options", "words"),
    [
        ({"model.layers.3.*": 0.5, "*": 0.0}, {}, "a part of names between two.*merge.linear"),
        ({"*.layers.?.*": 0.5}, {}, "'\\*.layers.\\?.\\*'"),
        (0.5, {"method": "slerp"}, "'ties', 'dare_linear', 'dare_ties'"),
        (0.5, {"density": 0.5}, "density: expected none with method 'linear'.*choose one of ties"),
        (0.5, {"method": "ties", "density": 0.0}, "density"),
    ],
)
def test_what_mergekit_cannot_say(
    alpha: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        merge.write_mergekit(tmp_path / "m.yml", "base", "aligned", alpha, **options)
    assert not list(tmp_path.iterdir())


TWO = (
    "models:\n  - {model: a, parameters: {weight: W1}}\n  - {model: b, parameters: {weight: W2}}\n"
)


def linear(one: str, two: str, more: str = "") -> str:
    return "merge_method: linear\n" + TWO.replace("W1", one).replace("W2", two) + more


SCALED = {"*mlp*": 1.0, "*": 2.0}


def arithmetic(own: str, shared: str) -> str:
    return (
        "merge_method: task_arithmetic\nbase_model: a\n"
        f"models: [{{model: b, parameters: {{{own}}}}}]\nparameters: {{{shared}}}\n"
    )


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        (linear("1", "3"), 0.75),
        (linear("0.5", "0.5", "parameters: {normalize: false}\n"), 0.5),
        (linear("{value: 1}", "{value: 1}"), {"*": 0.5}),
        # a weight of all models is that of those without one of their own
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 2}\n",
            0.5,
        ),
        (arithmetic("weight: 0.5", "lambda: 0.5"), 0.25),
        (arithmetic("weight: [{filter: mlp, value: 0.5}, {value: 1}]", "lambda: 2"), SCALED),
        (arithmetic("", "weight: 0.3"), 0.3),
        (arithmetic("weight: 0.5", "weight: 0.3, normalize: false, int8_mask: true"), 0.5),
        # a filter is a part of a name, literally
        (arithmetic("weight: [{filter: '*.a[0]', value: 0.5}]", ""), {"*[*].a[[]0]*": 0.5}),
    ],
)
def test_mergekits_own_forms(text: str, alpha: Any, tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(text)
    found = merge.read_mergekit(tmp_path / "m.yml")
    assert (found.base, found.aligned, found.alpha) == ("a", "b", alpha)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: ties\n", "mergekit-yaml .*m.yml OUTPUT"),
        ("merge_method: linear\nslices: []\n", "slices; run `mergekit-yaml"),
        (linear("1", "1", "tokenizer_source: union\n"), "tokenizer_source; run `mergekit-yaml"),
        (linear("0.5", "0.6", "parameters: {normalize: false}\n"), "weights whose sum is 1"),
        (linear("[0, 1]", "[1, 0]"), "lists of `filter` and `value`"),
        (linear("[{filter: mlp, value: 1}]", "1"), "the same filters in the same order"),
        ("merge_method: linear\nmodels: [{model: a}]\n", "one base and one aligned model"),
        ("merge_method: task_arithmetic\nmodels: [{model: a}]\n", "one base and one aligned"),
        ("merge_method: linear\nmodels: 3\n", "a list of mappings"),
        ("merge_method: linear\nmodels: [{model: a}, {model: b}]\n", "a weight for each model"),
        (arithmetic("weight: 1", "gamma: 0.1"), "parameters of normalize.*gamma.*mergekit-yaml"),
        (arithmetic("weight: 1, density: 0.5", ""), "parameters of weight alone"),
        (arithmetic("weight: 1", "lambda: [1, 2]"), "lambda, a number"),
        (arithmetic("weight: 1", "normalize: 'false'"), "normalize: true or false"),
        ("merge_method: linear\nparameters: 3\nmodels: [{model: a}]\n", "parameters of"),
        (linear("1", "1") + "  - {model: b, parameters: {weight: 1}}\n", "each model once"),
        (linear("1", "1") + "  - {model: c, slice: 1}\n", "`model` and `parameters` alone"),
        ("- 1\n", "a mapping with merge_method"),
        ("a: [\n", "expected YAML"),
    ],
)
def test_what_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(text)
    with pytest.raises(ValueError, match=words):
        merge.read_mergekit(tmp_path / "m.yml")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("base", 0.0), ("aligned", 1.0)):
        save_file({n: torch.full((4,), value) for n in NAMES}, tmp_path / f"{name}.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "aligned")]
    file, merged = str(tmp_path / "m.yml"), str(tmp_path / "merged.safetensors")
    alpha = ["--alpha", "*.mlp.*=0.5", "--alpha", "*=0.25"]
    wrote = ["merge", "config", *models, *alpha, "--method", "linear", "-o", file]
    assert cli.main(wrote) == 0
    assert cli.main(["merge", "run", file, "--output", merged]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == merged
    values = {name: float(tensor[0]) for name, tensor in load_file(merged).items()}
    assert values == {NAMES[0]: 0.25, NAMES[1]: 0.5, NAMES[2]: 0.25}
    assert cli.main(["merge", "config", *models, *alpha, "--output", file]) == 0  # TIES
    assert cli.main(["merge", "run", file, "--output", str(tmp_path / "x.safetensors")]) == 2
    assert f"mergekit-yaml {file} OUTPUT" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    assert cli.main(["merge", "run", str(tmp_path / "no.yml"), "--output", merged]) == 2
    assert "no.yml" in capsys.readouterr().err
