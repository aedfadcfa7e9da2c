"""Result files of lm-evaluation-harness, as version 0.4 writes them (read against 0.4.13).

"results" has for each task and group a row whose "METRIC,FILTER" is a score and
"METRIC_stderr,FILTER" its standard error, or "N/A"; "group_subtasks" says what is in a group,
"n-samples" how many items a task has, "higher_is_better" a metric's direction, "versions",
"n-shot" and "task_hashes" what was asked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fasttax._base import checks, files
from fasttax.tax.measurements import Measurements

OP = "TaxReport.from_lm_eval"
SAME = {"versions": "version", "n-shot": "number of shots", "task_hashes": "hash of prompts"}

Report = TypeVar("Report", bound=Measurements)


@dataclass(frozen=True)
class Scored:
    """A task's score, by which metric, with its standard error and its items where known."""

    metric: str
    score: float
    se: float | None
    n: int | None


@dataclass
class Results:
    """One file's rows."""

    path: Path
    content: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {
            str(task): row for task, row in self.content["results"].items() if isinstance(row, dict)
        }

    @property
    def name(self) -> str:
        """The model's: the last part of its path."""
        arguments = (self.content.get("config") or {}).get("model_args")
        model = self.content.get("model_name")
        if not model and isinstance(arguments, dict):
            model = arguments.get("pretrained")
        if not isinstance(model, str) or not model:
            return self.path.parent.name or self.path.stem
        return Path(model).name

    def tasks(self) -> list[str]:
        """Those with a score, without what lies in a group that has one itself."""
        scored = [task for task in self.rows if _metrics(self.rows[task])]
        groups: dict[str, list[str]] = self.content.get("group_subtasks") or {}
        inside: set[str] = set()
        waiting = [part for task in scored for part in groups.get(task) or []]
        while waiting:
            part = waiting.pop()
            if part not in inside:
                inside.add(part)
                waiting += groups.get(part) or []
        return [task for task in scored if task not in inside]

    def scored(self, task: str, metric: str | None) -> Scored:
        """A task's score by `metric`, or by the first that it has."""
        row = self.rows.get(task)
        if row is None:
            raise checks.fail(
                OP, "tasks", f"some of {', '.join(self.tasks())} in {self.path}", repr(task)
            )
        keys = _metrics(row)
        found = [key for key in keys if metric in (None, key, key.partition(",")[0])]
        if not found:
            raise checks.fail(OP, "metrics", f"one of {task!r}'s metrics, {keys}", repr(metric))
        name, _, filtered = found[0].partition(",")
        directions = self.content.get("higher_is_better") or {}
        up = directions.get(task, {}).get(name)
        if up is False:
            raise checks.fail(
                OP,
                "tasks",
                "scores that are better when higher, which have a mean",
                f"{task!r} by {found[0]!r}, which is better when lower",
                f"choose another metric with metrics={{{task!r}: ...}}, or leave the task out with "
                "tasks=[...]",
            )
        error = row.get(f"{name}_stderr,{filtered}")
        se = _number(error)
        return Scored(found[0], float(row[found[0]]), se, self._items(task))

    def _items(self, task: str, groups: frozenset[str] = frozenset()) -> int | None:
        """How many items were run; of a group all of its tasks'. `groups`: those that it is in."""
        samples = self.content.get("n-samples") or {}
        if task in samples:
            count = samples[task].get("effective")
            return count if isinstance(count, int) and count > 0 else None
        parts = (self.content.get("group_subtasks") or {}).get(task) or []
        within = groups | {task}
        counts = [self._items(part, within) for part in parts if part not in within]
        known = [count for count in counts if count is not None]
        return sum(known) if known and len(known) == len(counts) else None


def report(
    kind: type[Report],
    paths: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    alignment: Iterable[str],
    metrics: Mapping[str, str],
    tasks: Iterable[str] | None,
) -> Report:
    """The report of the files, of which the first is the base's."""
    if isinstance(paths, (str, os.PathLike)):
        raise checks.fail(
            OP, "paths", "a list of files", repr(os.fspath(paths)), "pass [base, ...]"
        )
    given = list(paths.values()) if isinstance(paths, Mapping) else list(paths)
    if len(given) < 2:
        raise checks.fail(
            OP, "paths", "the base's file and a checkpoint's or more", str(len(given))
        )
    base, *others = (read(path) for path in given)
    alignment = list(alignment)  # which is gone through more than once
    wanted = list(tasks) if tasks is not None else base.tasks()
    strange = [task for task in alignment if task not in wanted]
    if strange:
        raise checks.fail(OP, "alignment", f"some of {', '.join(wanted)}", ", ".join(strange))
    able = [task for task in wanted if task not in alignment]
    if not able:
        raise checks.fail(OP, "alignment", "not every task: some for the capability", "all of them")
    first = {task: base.scored(task, metrics.get(task)) for task in wanted}
    for other in others:
        _same_tasks(other, wanted)
        _same_questions(base, other, wanted)
    # every file by the metric that the base's was read by
    chosen = {task: scored.metric for task, scored in first.items()}
    names = _names(paths, others)
    made = kind(**_arguments(first, able, alignment))
    for name, other in zip(names, others, strict=True):
        scored = {task: other.scored(task, chosen[task]) for task in wanted}
        _same_items(other, first, scored)
        made.add(name, **_arguments(scored, able, alignment))
    return made


def _arguments(
    scored: Mapping[str, Scored], able: Sequence[str], alignment: Sequence[str]
) -> dict[str, Any]:
    """What TaxReport and its add take."""
    return {
        "capability": {task: scored[task].score for task in able},
        "alignment": {task: scored[task].score for task in alignment} or 0.0,
        "se": {task: s.se for task, s in scored.items() if s.se is not None},
        "n": {task: s.n for task, s in scored.items() if s.n is not None},
    }


def read(path: str | os.PathLike[str]) -> Results:
    """A results file, or the last one of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file; names it.
    """
    target = Path(path)
    if target.is_dir():
        found = sorted(target.rglob("results*.json"), key=lambda file: file.name)
        if not found:
            raise FileNotFoundError(
                f"{OP}: {target} has no results_*.json; run lm_eval with --output_path {target}"
            )
        target = found[-1]
    content = files.read_json(
        OP, target, "take a result file of lm-evaluation-harness, results_*.json"
    )
    strange = _strange(content)
    if strange:
        expected = 'a result file of lm-evaluation-harness, with "results"'
        raise checks.fail(OP, "paths", expected, f"{target} with other {strange}")
    results = Results(target, content)
    if not results.tasks():
        raise checks.fail(OP, "paths", "tasks with scores", f"{target} without one")
    return results


# what of a file is read: mappings, and of what their values must be
PARTS: dict[str, type] = {
    "results": object,
    "config": object,
    "group_subtasks": list,
    "higher_is_better": dict,
    "n-samples": dict,
    **dict.fromkeys(SAME, object),
}


def _strange(content: Mapping[str, Any]) -> str:
    """The first part of a file that is not of its kind, "" for none."""
    if content.get("results") is None:
        return "results"
    for name, kind in PARTS.items():
        part = content.get(name)
        if part is None:
            continue
        if not isinstance(part, dict) or not all(isinstance(v, kind) for v in part.values()):
            return name
        if kind is list and not all(isinstance(text, str) for v in part.values() for text in v):
            return name
    return ""


def _metrics(row: Mapping[str, Any]) -> list[str]:
    """The keys of a row that are scores."""
    return [
        key
        for key, value in row.items()
        if "," in key
        and not key.partition(",")[0].endswith("_stderr")
        and _number(value) is not None
    ]


def _number(value: object) -> float | None:
    """A finite number, or None; the harness writes "N/A" and " " too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond float64
        return None


def _same_tasks(other: Results, tasks: Sequence[str]) -> None:
    """The other file must have what is read of the base's."""
    missing = [task for task in tasks if task not in other.rows]
    if missing:
        common = [task for task in tasks if task in other.rows]
        raise checks.fail(
            OP,
            "paths",
            f"the base's task{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}",
            f"{other.path} with {', '.join(other.tasks())}",
            "evaluate there too what is missing" + f", or take tasks={common}" * bool(common),
        )


def _same_items(other: Results, base: Mapping[str, Scored], scored: Mapping[str, Scored]) -> None:
    """As many as the base's: a run with --limit has others."""
    for task, one in base.items():
        two = scored[task]
        if None not in (one.n, two.n) and one.n != two.n:
            raise checks.fail(
                OP,
                "paths",
                f"{task!r} with the base's {one.n} items",
                f"{two.n} in {other.path}",
                "evaluate both alike, with the same --limit or none",
            )


def _same_questions(base: Results, other: Results, tasks: Sequence[str]) -> None:
    """The other file's tasks must have been asked as the base's were."""
    for key, what in SAME.items():
        one, two = base.content.get(key) or {}, other.content.get(key) or {}
        for task in tasks:
            if task in one and task in two and one[task] != two[task]:
                raise checks.fail(
                    OP,
                    "paths",
                    f"{task!r} with the base's {what}, {one[task]}",
                    f"{two[task]} in {other.path}",
                    "evaluate both alike",
                )


def _names(
    paths: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    others: Sequence[Results],
) -> list[str]:
    """The checkpoints': a mapping's, or the models', with their folder's where two are alike."""
    if isinstance(paths, Mapping):
        return [str(name) for name in list(paths)[1:]]
    names = [other.name for other in others]
    if len({*names}) == len(names):
        return names
    longer = [f"{other.path.parent.name}/{other.path.stem}" for other in others]
    if len({*longer}) == len(longer):
        return longer
    return [str(other.path) for other in others]
