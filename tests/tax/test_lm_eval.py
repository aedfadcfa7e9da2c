"""TaxReport.from_lm_eval: result files as lm-evaluation-harness 0.4.13 writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fasttax import cli
from fasttax.tax import TaxReport

SUBJECTS = ("mmlu_law", "mmlu_art")


def results(shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """The shape that evaluator.py and evaluation_tracker.py of 0.4.13 give a file."""
    rows = {
        "arc_easy": {
            "name": "arc_easy",
            "alias": "arc_easy",
            "sample_len": 2376,
            "acc,none": 0.6 - shift,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.5 - shift,
            "acc_norm_stderr,none": 0.011,
        },
        "ifeval": {
            "name": "ifeval",
            "alias": "ifeval",
            "sample_len": 541,
            "prompt_level_strict_acc,none": 0.3 + shift,
            "prompt_level_strict_acc_stderr,none": 0.02,
            "inst_level_strict_acc,none": 0.4,
            "inst_level_strict_acc_stderr,none": "N/A",
        },
        "mmlu": {"name": "mmlu", "alias": "mmlu", "acc,none": 0.4, "acc_stderr,none": 0.004},
        **{
            s: {"name": s, "alias": f" - {s}", "sample_len": 100, "acc,none": 0.4} for s in SUBJECTS
        },
    }
    found: dict[str, Any] = {
        "results": rows,
        "groups": {"mmlu": rows["mmlu"]},
        "group_subtasks": {"mmlu": list(SUBJECTS), "arc_easy": [], "ifeval": []},
        "configs": {},
        "versions": {"arc_easy": 1.0, "ifeval": 4.0, "mmlu": 2},
        "n-shot": {"arc_easy": 0, "ifeval": 0},
        "higher_is_better": {
            "arc_easy": {"acc": True, "acc_norm": True},
            "ifeval": {"prompt_level_strict_acc": True, "inst_level_strict_acc": True},
            "mmlu": {"acc": True},
        },
        "n-samples": {
            "arc_easy": {"original": 2376, "effective": 2376},
            "ifeval": {"original": 541, "effective": 541},
            **{s: {"original": 100, "effective": 100} for s in SUBJECTS},
        },
        "config": {"model": "hf", "model_args": {"pretrained": "org/base"}, "random_seed": 0},
        "model_name": "org/base",
        "lm_eval_version": "0.4.13",
    }
    return {**found, **changes}


def write(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_scores_errors_items_and_groups(tmp_path: Path) -> None:
    base = write(tmp_path / "base" / "results_2026-11-01T00-00-00.json", results())
    dpo = write(tmp_path / "dpo" / "r.json", results(0.1, model_name="runs/dpo-500"))
    report = TaxReport.from_lm_eval([base, dpo])
    assert report.base.capability == pytest.approx({"arc_easy": 0.6, "ifeval": 0.3, "mmlu": 0.4})
    (c,) = report.checkpoints
    assert c.name == "dpo-500"
    assert c.se == {"arc_easy": 0.01, "ifeval": 0.02, "mmlu": 0.004}
    assert c.n == {"arc_easy": 2376, "ifeval": 541, "mmlu": 200}
    assert report.base.se == c.se
    split = TaxReport.from_lm_eval(
        [tmp_path / "base", tmp_path / "dpo" / "r.json"], alignment=iter(["ifeval"])
    )
    (c,) = split.checkpoints
    assert (split.tax(c), split.gain(c)) == pytest.approx((0.05, 0.1))
    assert split.taxes(c) == pytest.approx({"arc_easy": 0.1, "mmlu": 0.0})


def test_metrics_tasks_and_names(tmp_path: Path) -> None:
    one, two = (write(tmp_path / n / "results_1.json", results()) for n in ("a", "b"))
    report = TaxReport.from_lm_eval(
        [one, one, two], metrics={"arc_easy": "acc_norm"}, tasks=["arc_easy"]
    )
    assert report.base.capability == {"arc_easy": 0.5}
    assert [c.name for c in report.checkpoints] == ["a/results_1", "b/results_1"]
    named = TaxReport.from_lm_eval({"base": one, "mine": two})
    assert [c.name for c in named.checkpoints] == ["mine"]
    newer = write(tmp_path / "a" / "results_2.json", results(0.1))
    assert TaxReport.from_lm_eval([tmp_path / "a", one]).base.capability["arc_easy"] == 0.5
    assert Path(newer).is_file()


def row(**changes: Any) -> dict[str, Any]:
    made = results()
    made["results"] = {"wiki": {"alias": "wiki", "word_perplexity,none": 9.0}, **made["results"]}
    made["higher_is_better"]["wiki"] = {"word_perplexity": False}
    return {**made, **changes}


REFUSED: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "expected JSON"),
    "another file": ([1], "result file of lm-evaluation-harness"),
    "no scores": ({"results": {"a": {"alias": "a"}}}, "tasks with scores"),
    "a task less": (
        results(results={"arc_easy": {"acc,none": 0.5}}),
        r"tasks 'ifeval', 'mmlu', .*other.json with arc_easy; .* take tasks=\['arc_easy'\]$",
    ),
    "no task of the base's": (
        results(results={"boolq": {"acc,none": 0.5}}, **{"group_subtasks": {}}),
        "'arc_easy', 'ifeval', 'mmlu', .* evaluate there too what is missing$",
    ),
    "fewer items": (
        results(**{"n-samples": {"arc_easy": {"original": 2376, "effective": 100}}}),
        r"'arc_easy' with the base's 2376 items, got 100 in .*other\.json; .* --limit",
    ),
    "another version": (results(versions={"arc_easy": 2.0}), "version, 1.0"),
    "other shots": (results(**{"n-shot": {"arc_easy": 5}}), "number of shots"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, tmp_path: Path) -> None:
    content, says = REFUSED[case]
    base = write(tmp_path / "base.json", results())
    other = tmp_path / "other.json"
    other.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=says):
        TaxReport.from_lm_eval([base, other])


def test_what_is_better_when_lower_has_no_mean(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.json", row()) for n in "ab"]
    with pytest.raises(ValueError, match="better when lower"):
        TaxReport.from_lm_eval(paths)
    with pytest.raises(ValueError, match=r"tasks: expected some of wiki, arc_easy, .* got 'boolq'"):
        TaxReport.from_lm_eval(paths, tasks=["boolq"])
    # the way out that it names
    assert TaxReport.from_lm_eval(paths, tasks=["arc_easy"]).base.capability == {"arc_easy": 0.6}
    with pytest.raises(FileNotFoundError, match="output_path"):
        TaxReport.from_lm_eval([tmp_path, tmp_path])
    with pytest.raises(ValueError, match="a checkpoint's or more"):
        TaxReport.from_lm_eval(paths[:1])


def test_command_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base" / "results_1.json", results())
    dpo = write(tmp_path / "dpo" / "results_1.json", results(0.1, model_name="dpo"))
    out = tmp_path / "out.json"
    assert cli.main(["tax", base, dpo, "--alignment", "ifeval", "--json", str(out)]) == 0
    assert "tax by benchmark" in capsys.readouterr().out
    again = TaxReport.load(out)
    assert again.tax(again.checkpoints[0]) == pytest.approx(0.05)
    assert cli.main(["tax", str(out), dpo]) == 2
    assert "lm-evaluation-harness" in capsys.readouterr().err
    assert cli.main(["tax", base, dpo, "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert "create it first" in capsys.readouterr().err
