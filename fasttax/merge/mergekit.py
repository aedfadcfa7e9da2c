"""mergekit's configurations: written from alphas by pattern, and read where fasttax has the form.

mergekit (github.com/arcee-ai/mergekit, read at 007d093) looks up a parameter by the first `filter`
that is a part of a tensor's name; "*" and none fit every name. A merge of one base and one aligned
model is `linear` with weights 1 - alpha and alpha, or `task_arithmetic` with weight alpha; `ties`,
`dare_linear` and `dare_ties` sparsify the task vector and are mergekit's own.
"""

from __future__ import annotations

import glob
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttax._base import checks, files
from fasttax.merge import alphas
from fasttax.merge.alphas import Alpha

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
OURS = ("linear", "task_arithmetic")  # of one base and one aligned model
SPARSE = ("ties", "dare_linear", "dare_ties")  # those with a density
WILD = set("*?[")
# what may stand in a configuration whose outcome is `merge.linear`'s
KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
# and what of parameters: of all models ("lambda" is of task_arithmetic), and of one
SHARED = {
    "linear": ("normalize", "weight"),
    "task_arithmetic": ("normalize", "weight", "lambda", "int8_mask"),
}
OWN = ("weight",)
READ = "merge.read_mergekit"


@dataclass(frozen=True)
class Configured:
    """What a configuration asks of `merge.linear`."""

    base: str
    aligned: str
    alpha: float | dict[str, float]


def write_mergekit(
    path: str | os.PathLike[str],
    base: str,
    aligned: str,
    alpha: Alpha,
    *,
    method: str = "linear",
    density: float | None = None,
    dtype: str = "float32",
) -> Path:
    """A configuration for `mergekit-yaml PATH OUTPUT`, in YAML.

    Args:
        path: of the file, written whole or not at all.
        base: a Hub id or folder, as mergekit takes it.
        aligned: the same.
        alpha: as for `merge.linear`; a pattern must be `*`, or a part of a name between two `*`,
            which is what mergekit can say.
        method: one of `linear`, `task_arithmetic` (both are `merge.linear`'s result), `ties`,
            `dare_linear`, `dare_ties`, whose task vector keeps a share `density`.
        density: from 0 (not included) to 1; of the last three, 0.5 by default, of them alone.
        dtype: in which mergekit computes, and of the weights that it saves.

    Raises:
        ValueError: a pattern that mergekit can't say, or an argument that does not fit.

    Example:
        >>> fasttax.merge.write_mergekit("merge.yml", "base", "aligned", 0.6, method="ties")
        PosixPath('merge.yml')
    """
    op = "merge.write_mergekit"
    checks.choice(op, "method", method, METHODS)
    given = alphas.checked(op, alpha)
    share = _density(op, method, density)
    weight = {"weight": _conditions(op, given, 1.0)}
    if method == "linear":
        rest = {"weight": _conditions(op, given, -1.0)}
        models = [{"model": base, "parameters": rest}, {"model": aligned, "parameters": weight}]
        content: dict[str, Any] = {"merge_method": method, "models": models}
    else:
        own: dict[str, Any] = weight if share is None else {**weight, "density": share}
        content = {"merge_method": method, "base_model": base}
        content["models"] = [{"model": aligned, "parameters": own}]
    # mergekit's default divides by the sum of the weights, which is not the alpha of one task
    content |= {"parameters": {"normalize": False}, "dtype": dtype}
    text = "\n".join(_lines(content, "")) + "\n"
    return files.whole(op, path, lambda name: name.write_text(text, encoding="utf-8"))


def _density(op: str, method: str, density: float | None) -> float | None:
    if method not in SPARSE:
        if density is not None:
            expected, way_out = f"none with method {method!r}", f"choose one of {', '.join(SPARSE)}"
            raise checks.fail(op, "density", expected, density, way_out)
        return None
    if density is None:
        return 0.5
    return checks.number(op, "density", density, low=0, open_low=True, high=1)


def _conditions(op: str, alpha: float | dict[str, float], sign: float) -> Any:
    """A weight's setting: alpha itself for sign 1, 1 - alpha for -1, by mergekit's filters."""

    def weight(value: float) -> float:
        return value if sign > 0 else 1 - value

    if isinstance(alpha, float):
        return weight(alpha)
    found = []
    for pattern, value in alpha.items():
        part = pattern[1:-1] if len(pattern) > 1 else ""
        said = pattern[:1] == pattern[-1:] == "*" and not WILD & set(part)
        if not said:
            raise checks.fail(
                op,
                "alpha",
                "'*', or a part of names between two '*' as '*.mlp.*', which mergekit's filter is",
                repr(pattern),
                "use such patterns, or merge with merge.linear, which takes any",
            )
        found.append({"filter": part or "*", "value": weight(value)})
    return found


def _lines(value: Mapping[str, Any], indent: str) -> list[str]:
    """A mapping of scalars, mappings and lists of mappings in YAML's block style."""
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif isinstance(item, list):
            lines.append(f"{indent}{key}:")
            for row in item:
                first, *others = _lines(row, indent + "    ")
                lines += [f"{indent}  - {first.lstrip()}", *others]
        else:
            lines.append(f"{indent}{key}: {_scalar(item)}")
    return lines


def _scalar(value: Any) -> str:
    """JSON's form, which YAML reads, but that a number with an exponent needs a point there."""
    text = json.dumps(value)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text


def read_mergekit(path: str | os.PathLike[str]) -> Configured:
    """What a configuration asks for, where it is a merge of a base and an aligned model by weight.

    Args:
        path: of a mergekit configuration, in YAML.

    Returns:
        `.base`, `.aligned` and `.alpha`, as `merge.linear` takes them.

    Raises:
        ValueError: no such configuration; for TIES, DARE, slices and other methods the text names
            mergekit's command.
        ModuleNotFoundError: PyYAML is not installed.

    Example:
        >>> path = fasttax.merge.write_mergekit("merge.yml", "base", "aligned", 0.6)
        >>> found = fasttax.merge.read_mergekit(path)
        >>> found.base, found.aligned, found.alpha  # what `merge.linear` takes
        ('base', 'aligned', 0.6)
    """
    file = _File(path)
    content = _parsed(Path(path))
    method = content.get("merge_method")
    if method not in OURS:
        raise file.error(f"merge_method {' or '.join(OURS)}", _said(method))
    strange = [str(key) for key in content if key not in KEYS]
    if strange:
        raise file.error(f"none but {', '.join(KEYS)}", ", ".join(strange))
    shared = file.parameters(content.get("parameters"), SHARED[method])
    weights = {
        name: file.parameters(given, OWN).get("weight", shared.get("weight"))
        for name, given in file.models(content.get("models")).items()
    }
    normalize = shared.get("normalize", method == "linear")
    if not isinstance(normalize, bool):
        raise file.error("normalize: true or false", _said(normalize))
    base, aligned = file.sides(content.get("base_model"), method, weights)
    weight = file.setting(weights[aligned])
    if method == "linear":
        alpha = file.shares(file.setting(weights[base]), weight, normalize)
    elif normalize:
        raise file.error(
            "normalize: false with task_arithmetic",
            "normalize: true, under which the weight says nothing",
        )
    else:
        alpha = weight
    return Configured(base, aligned, file.scaled(alpha, shared.get("lambda", 1.0)))


@dataclass(frozen=True)
class _File:
    """What a configuration's parts say; what `merge.linear` can't do is an error of the file."""

    path: str | os.PathLike[str]

    def error(self, expected: str, got: str) -> Exception:
        """With mergekit's own command as the way out."""
        theirs = f"run `mergekit-yaml {self.path} OUTPUT`, which makes it"
        return checks.fail(READ, "path", expected, f"{self.path} with {got}", theirs)

    def parameters(self, given: Any, accepted: tuple[str, ...]) -> Mapping[str, Any]:
        """What stands under `parameters`, all of which must be understood: each has effects."""
        if given is None:
            return {}
        if not isinstance(given, Mapping) or not {*given} <= {*accepted}:
            raise self.error(f"parameters of {', '.join(accepted)} alone", _said(given))
        return given

    def models(self, models: Any) -> dict[str, Any]:
        """Each model's parameters, by its name."""
        if not isinstance(models, list) or not all(
            isinstance(m, Mapping) and isinstance(m.get("model"), str) for m in models
        ):
            raise self.error("models, a list of mappings with `model`", "others or none")
        strange = sorted({str(key) for m in models for key in m} - {"model", "parameters"})
        if strange:
            raise self.error("models with `model` and `parameters` alone", ", ".join(strange))
        named = {m["model"]: m.get("parameters") for m in models}
        if len(named) < len(models):
            raise self.error("each model once", f"one of {', '.join(named)} twice")
        return named

    def sides(self, base: Any, method: str, named: Mapping[str, Any]) -> tuple[str, str]:
        """The base and the one aligned model."""
        if base is None and method == "linear":
            base = next(iter(named), None)
        others = [name for name in named if name != base]
        complete = base in named or method == "task_arithmetic"
        if not isinstance(base, str) or len(others) != 1 or not complete:
            got = f"base_model {_said(base)} and models {', '.join(named)}"
            raise self.error("one base and one aligned model", got)
        return base, others[0]

    def number(self, value: Any) -> float:
        """A weight."""
        return checks.number(READ, f"{self.path}: weight", value)

    def setting(self, value: Any) -> float | dict[str, float]:
        """A number, or numbers by the pattern that a filter is."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self.number(value)
        if value is None or value == []:
            expected, got = "a weight for each model", f"{self.path} with a model that has none"
            raise checks.fail(READ, "path", expected, got, "mergekit asks for it, too")
        rows = value if isinstance(value, list) else [value]
        found: dict[str, float] = {}
        for row in rows:
            fits = isinstance(row, Mapping) and isinstance(row.get("value"), int | float)
            if not fits or not {*row} <= {"filter", "value"}:
                expected = "weights that are numbers, or lists of `filter` and `value`"
                raise self.error(expected, _said(value))
            part = row.get("filter")
            # a filter is no pattern: its own `*`, `?` and `[` stand for themselves
            if not isinstance(part, str | int | float | None):
                raise self.error("filters that are parts of names", _said(part))
            pattern = "*" if part in (None, "*") else f"*{glob.escape(str(part))}*"
            found.setdefault(pattern, self.number(row["value"]))
        return found

    def shares(self, rest: Any, weight: Any, normalize: bool) -> float | dict[str, float]:
        """Of the aligned model beside the base's `rest`, alone or by pattern."""
        if isinstance(weight, float) and isinstance(rest, float):
            return self.share(rest, weight, normalize)
        if isinstance(weight, dict) and isinstance(rest, dict) and list(weight) == list(rest):
            return {p: self.share(rest[p], weight[p], normalize) for p in weight}
        expected = "weights of both models, as numbers or with the same filters in the same order"
        raise self.error(expected, "others")

    def share(self, rest: float, weight: float, normalize: bool) -> float:
        """Of one number each."""
        total = rest + weight
        if total == 0 or (not normalize and abs(total - 1) > 1e-6):
            expected = "weights whose sum is 1, or normalize: true and a sum other than 0"
            raise self.error(expected, f"{rest:g} and {weight:g}")
        return weight / total

    def scaled(self, alpha: float | dict[str, float], scale: Any) -> float | dict[str, float]:
        """By task_arithmetic's lambda."""
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise self.error("lambda, a number", _said(scale))
        if isinstance(alpha, float):
            return alpha * scale
        return {pattern: value * scale for pattern, value in alpha.items()}


def _said(value: Any) -> str:
    """Some of a value, which may be aliases of aliases that would fill the memory, or a loop."""
    shown = reprlib.Repr()
    shown.maxlevel = 2
    return shown.repr(value)


def _parsed(path: Path) -> dict[str, Any]:
    """The file's mapping."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{READ}: PyYAML is not installed; run `pip install pyyaml`", name="yaml"
        ) from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # ValueError: numbers and dates that are none; RecursionError: thousands of brackets
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise checks.fail(READ, "path", "YAML", f"{path} ({reason})") from None
    if not isinstance(content, dict) or "merge_method" not in content:
        raise checks.fail(READ, "path", "a mapping with merge_method", str(path))
    return content
