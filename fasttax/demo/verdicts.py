"""Words from numbers: what the report may say.

Nothing here knows the outcome beforehand. A difference counts where its 95 % interval, in pairs
over seeds or over the same held-out items, leaves out zero; a claim that does not hold is printed
as one that fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fasttax.demo.compare import Comparison, Estimate
from fasttax.demo.methods import MERGE, METHODS, PLAIN, SHARES, STOP, TARGET, title

KRONECKER = 0.65  # of the diagonal's tax: what Kronecker factors are to bring
LOWEST = 0.03  # nats a token: what the best method may cost on the tiny model
HOLDS, FAILS, OPEN = "HOLDS", "FAILS", "NOT DECIDED"


def sentences(results: dict[str, Any]) -> list[str]:
    """The verdicts for what is there; a partial result gives fewer of them."""
    plain = [row for row in results["points"] if row["method"] == PLAIN]
    if not plain:
        return []
    comparison = Comparison(results["points"])
    said = [_plain(results["base"]["metrics"], plain)]
    if comparison.seeds:
        said += [*_best(comparison), *_against_merging(comparison)]
        said += [*_claims(comparison, results["settings"]["tiny"]), *_unreached(comparison)]
    said += [
        f"{FAILS}: {title(f['method'])}, seed {f['seed']}: {f['reason']}"
        for f in results["failures"]
    ]
    if "timing" in results:
        said += _timing(results["timing"])
    return said


def _at(share: float) -> str:
    return f"at {share:.0%} of plain fine-tuning's gain"


def _plain(base: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What plain fine-tuning won and lost; of several seeds the first has the item-wise verdict."""
    first = rows[0]
    metrics, change = first["metrics"], first["against_base"]
    count = "" if len(rows) == 1 else f" (seed {first['seed']})"
    text = (
        f"Plain fine-tuning{count} took held-out answers from NLL "
        f"{base['answer_nll']['mean']:.3f} to {metrics['answer_nll']['mean']:.3f} (preference "
        f"accuracy {base['preference']['mean']:.0%} to {metrics['preference']['mean']:.0%}) "
    )
    if change["answer_nll"]["verdict"] != "better":
        return f"{FAILS}: {text.rstrip()}: no measurable gain, so that no method can be compared."
    tax = change["general_nll"]
    numbers = (
        f"perplexity on general text {base['perplexity']['mean']:.2f} to "
        f"{metrics['perplexity']['mean']:.2f}, {tax['mean']:+.3f} ± {tax['se']:.3f} nats a token"
    )
    if tax["verdict"] == "worse":
        return f"{text}and paid a tax: {numbers}."
    return f"{text}and paid no measurable tax ({numbers}): there is little to win back."


def _best(comparison: Comparison) -> Iterator[str]:
    best = comparison.best(TARGET)
    if best is None:
        return
    at, time = comparison.at(best, TARGET), comparison.step_time(best)
    cost = "no training of its own" if time is None else f"{time:.1f} of a plain step's time"
    yield f"Lowest tax {_at(TARGET)}: {title(best)}, {at} nats a token, at {cost}."


def _against_merging(comparison: Comparison) -> Iterator[str]:
    """Every method that trains beside the merge of plain and base, which costs nothing."""
    if comparison.at(MERGE, TARGET) is None:
        return
    better: list[str] = []
    worse: list[str] = []
    alike: list[str] = []
    for method in comparison.rows:
        change = comparison.difference(method, MERGE, TARGET)
        if method in (MERGE, STOP) or change is None:
            continue
        group = alike
        if change.high < 0:
            group = better
        elif change.low > 0:
            group = worse
        group.append(f"{title(method)} ({change.mean:+.3f} ± {change.se:.3f})")
    start = f"Against merging plain with the base, which costs nothing, {_at(TARGET)}:"
    for names, words in (
        (better, "lower tax"),
        (worse, "HIGHER tax"),
        (alike, "no difference beyond noise"),
    ):
        if names:
            yield f"{start} {words}: {', '.join(names)}."


def _claims(comparison: Comparison, tiny: bool) -> Iterator[str]:
    """What this demo is to show, held against its numbers."""
    best = comparison.best(TARGET)
    if tiny and best is not None:
        found = comparison.at(best, TARGET)
        if found is not None:
            text = f"the best method's tax {_at(TARGET)} is at most {LOWEST} nats a token"
            yield _claim(text, found, LOWEST)
    kron = comparison.difference("kron", "ewc", TARGET, KRONECKER)
    if kron is not None:
        yield _claim(
            f"Kronecker EWC's tax {_at(TARGET)} is at most {KRONECKER} of diagonal EWC's "
            f"({comparison.at('kron', TARGET)} and {comparison.at('ewc', TARGET)})",
            kron,
            0.0,
        )
    for share in SHARES:
        other = comparison.best(share, without="kl_lm")
        apart = other and comparison.difference("kl_lm", other, share)
        if other and apart:
            text = (
                f"{title('kl_lm')} has the lowest tax {_at(share)} (the lowest other is "
                f"{title(other)})"
            )
            yield _claim(text, apart, 0.0)


def _claim(text: str, found: Estimate, most: float) -> str:
    """Whether a number is at most `most`, by its interval."""
    outcome = OPEN
    if found.high <= most:
        outcome = HOLDS
    elif found.low > most:
        outcome = FAILS
    seen = f"{found.mean:+.4f} in [{found.low:+.4f}, {found.high:+.4f}], at most {most:g} wanted"
    return f"{outcome}: {text}: {seen}."


def _unreached(comparison: Comparison) -> Iterator[str]:
    """Grids that leave a share to the line between plain or the base and their last point."""
    for method in comparison.rows:
        low, high = comparison.reach(method)
        trained = METHODS[method].parts
        if trained and not (low <= SHARES[0] and high >= SHARES[-1]):
            yield (
                f"{FAILS}: the grid of {title(method)} reaches shares {low:.2f} to {high:.2f}, "
                f"not {SHARES[0]:g} to {SHARES[-1]:g}: beyond it the tax is the straight line to "
                f"the base or the plain run (--strengths {method}=...)"
            )


def _timing(timing: dict[str, Any]) -> Iterator[str]:
    """A sentence for each part whose difference from plain PyTorch is beyond noise."""
    plain = timing["seconds"]["plain step"]
    for part, name in (("kl", "KL"), ("ewc", "EWC (diagonal)")):
        saved = Estimate(**timing["saved_seconds"][part])
        if not math.isfinite(saved.low) or saved.low <= 0 <= saved.high:
            continue
        less = "less" if saved.mean > 0 else "MORE"
        low, high = sorted(abs(100 * end / plain) for end in (saved.low, saved.high))
        yield (
            f"{name} by fasttax took {abs(100 * saved.mean / plain):.1f} % of a plain step {less} "
            f"than composed in plain PyTorch ([{low:.1f}, {high:.1f}] %, {timing['rounds']} "
            "rounds)."
        )
