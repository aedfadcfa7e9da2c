"""Words from numbers: which strength is chosen, and what the report may say.

Nothing here knows the outcome beforehand.

A difference counts when the paired mean over the same held-out items is more than two standard
errors from zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NAMES = {"plain": "Plain fine-tuning", "kl": "KL", "ewc": "EWC", "both": "KL and EWC together"}


def rule(keep: float) -> str:
    """How a strength is chosen, for the report; `keep` is a share of plain fine-tuning's gain."""
    return (
        "Every candidate strength is trained with the full budget. On the validation split, among "
        f"the candidates that keep at least {keep:.0%} of plain "
        "fine-tuning's gain in answer NLL, the one with the lowest perplexity on general text is "
        "chosen; if none keeps that much, the one with the lowest "
        "answer NLL. The combined run takes both chosen strengths. Test items are measured for the "
        "chosen runs only."
    )


def choose(
    candidates: Sequence[dict[str, Any]],
    base: dict[str, float],
    plain: dict[str, float],
    keep: float,
) -> tuple[int, str]:
    """Index of the candidate that the rule picks, and why."""

    def mean(c: dict[str, Any], metric: str) -> float:
        return float(c["validation"][metric]["mean"])

    needed = base["answer_nll"] - keep * (base["answer_nll"] - plain["answer_nll"])
    good = [i for i, c in enumerate(candidates) if mean(c, "answer_nll") <= needed]
    if good:
        best = min(good, key=lambda i: mean(candidates[i], "general_nll"))
        return best, f"lowest general NLL of the {len(good)} with answer NLL up to {needed:.3f}"
    best = min(range(len(candidates)), key=lambda i: mean(candidates[i], "answer_nll"))
    return best, f"none reached answer NLL {needed:.3f}; this one comes nearest"


def sentences(results: dict[str, Any]) -> list[str]:
    """The verdicts for what is there; a partial result gives fewer of them."""
    runs = results["runs"]
    said = []
    if "plain" in runs:
        said.append(_plain(results["base"], runs["plain"]))
    said += [
        _against_plain(name, results["base"], runs["plain"], runs[name])
        for name in ("kl", "ewc", "both")
        if name in runs and "plain" in runs
    ]
    if "timing" in results:
        said.append(_timing(results["timing"]))
    return said


def _change(d: dict[str, Any], digits: int = 3) -> str:
    return f"{d['mean']:+.{digits}f} ± {d['se']:.{digits}f}"


def _plain(base: dict[str, Any], plain: dict[str, Any]) -> str:
    b, p, d = base["metrics"], plain["metrics"], plain["against_base"]
    aligned = {"better": "improved", "worse": "worsened", "same": "did not measurably change"}[
        d["answer_nll"]["verdict"]
    ]
    text = (
        f"Plain fine-tuning {aligned} the held-out answers (NLL {b['answer_nll']['mean']:.3f} to "
        f"{p['answer_nll']['mean']:.3f}, paired change "
        f"{_change(d['answer_nll'])}; preference accuracy {b['preference']['mean']:.0%} to "
        f"{p['preference']['mean']:.0%}). "
    )
    general = d["general_nll"]
    numbers = (
        f"perplexity on general text {b['perplexity']['mean']:.2f} to "
        f"{p['perplexity']['mean']:.2f}, paired change in NLL {_change(general)}"
    )
    if general["verdict"] == "worse":
        more = math.expm1(general["mean"])
        return f"{text}It paid an alignment tax: {numbers}, that is {more:+.1%} perplexity."
    if general["verdict"] == "better":
        return (
            f"{text}It paid no tax on general text, which it even models better: {numbers}. There "
            "is nothing for a regulariser to win back here."
        )
    return (
        f"{text}No tax beyond noise was measured ({numbers}), so there is little for a regulariser "
        "to win back here."
    )


def _against_plain(
    name: str, base: dict[str, Any], plain: dict[str, Any], run: dict[str, Any]
) -> str:
    text = (
        f"{NAMES[name]} ({run['label']}) {_capability(plain, run)}. {_alignment(base, plain, run)}."
    )
    for metric, label in (
        ("preference", "Preference accuracy"),
        ("last_word", "Last-word accuracy"),
    ):
        change = run["against_plain"][metric]
        if change["verdict"] != "same":
            points = f"{abs(change['mean']) * 100:.1f} ± {change['se'] * 100:.1f} points"
            text += f" {label} was {change['verdict']} than plain's by {points}."
    return text


def _capability(plain: dict[str, Any], run: dict[str, Any]) -> str:
    """What a run did to general text, and how much of the tax it won back."""
    general, tax = run["against_plain"]["general_nll"], plain["against_base"]["general_nll"]
    here, there = run["metrics"]["perplexity"]["mean"], plain["metrics"]["perplexity"]["mean"]
    numbers = (
        f"perplexity {here:.2f} against plain's {there:.2f}, paired change in NLL "
        f"{_change(general)}"
    )
    if general["verdict"] == "worse":
        return (
            "did not help at this strength: it kept less capability than plain fine-tuning "
            f"({numbers})"
        )
    if general["verdict"] != "better":
        return f"did not measurably help capability at this strength ({numbers})"
    text = f"kept more capability than plain fine-tuning ({numbers})"
    if tax["verdict"] != "worse":
        return text
    back = -general["mean"] / tax["mean"]
    share = f"{back:.0%}" if back < 1 else "all"
    return f"{text}, winning back {share} of the tax"


def _alignment(base: dict[str, Any], plain: dict[str, Any], run: dict[str, Any]) -> str:
    """What a run did to the answers, and how much of plain fine-tuning's gain it has."""
    answers = run["against_plain"]["answer_nll"]
    start, there, here = (row["metrics"]["answer_nll"]["mean"] for row in (base, plain, run))
    numbers = f"answer NLL {here:.3f}, paired change {_change(answers)}"
    if plain["against_base"]["answer_nll"]["verdict"] == "better":
        numbers += f", {(start - here) / (start - there):.0%} of plain's gain"
    aligned = {
        "better": "aligned better",
        "worse": "aligned less well",
        "same": "aligned as well as plain within noise",
    }[answers["verdict"]]
    return f"It {aligned} ({numbers})"


def _timing(timing: dict[str, Any]) -> str:
    p, s = timing["percent_of_plain_step"], timing["seconds"]
    return (
        f"fasttax added {p['kl fasttax']:.1f} % to a plain step of {s['plain step']:.2f} s for KL "
        f"and {p['ewc fasttax']:.1f} % for EWC; composed in plain "
        f"PyTorch, the same quantities added {p['kl composed']:.1f} % and {p['ewc composed']:.1f} "
        "%. KL also needs the reference model's forward, "
        f"{p['reference forward']:.0f} % of a plain step with either."
    )
