"""The demo's report: a table on the terminal and in a file, pareto.png, and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasttax._base import files
from fasttax._base import page as pages
from fasttax.demo import figure
from fasttax.demo.compare import Comparison, tax_report
from fasttax.demo.methods import SHARES, title

COLUMNS = (  # metric, heading, factor, digits
    ("answer_nll", "answer NLL ↓", 1.0, 3),
    ("perplexity", "perplexity ↓", 1.0, 2),
    ("last_word", "last word % ↑", 100.0, 1),
    ("kl_general", "KL general", 1.0, 4),
    ("kl_answers", "KL answers", 1.0, 3),
    ("fisher_distance", "Fisher distance", 1.0, 4),
)
HEADINGS = ("method", *(f"share {share:g}" for share in SHARES), "step's time")
NOTES = """
Tax: NLL on held-out general text beyond the base's, nats a token. Share: of the plain run's gain in
the NLL of held-out answers. A method's tax at a share is read off its own frontier, from the base
through its grid to the plain run, linear between neighbours; every point is measured on the same
held-out items, so that all frontiers are a little lucky. Passages of one topic are not fully
independent, so errors over items are rather too small than too large. A step's time is that of
training (on a CPU processor time) over the plain run's; stopped and merged models train nothing.
Last word: each word of three letters or more in the last two thirds of a passage, taken as the last
word of the passage up to it; it counts when greedy decoding gets all of its tokens right.
Preference: the good answer has the higher mean token log-probability. KL is KL(model || base).
Fisher distance: sum of the diagonal Fisher times squared weight change.
"""


def _comparison(results: dict[str, Any]) -> list[list[str]]:
    """A row a method: its tax at each share, and its step's time."""
    comparison = Comparison(results["points"])
    rows = []
    for method in comparison.rows:
        found = [comparison.at(method, share) for share in SHARES]
        time = comparison.step_time(method)
        rows.append(
            [
                title(method),
                *("not reached" if at is None else str(at) for at in found),
                "none" if time is None else f"{time:.1f}x",
            ]
        )
    return rows


def _caption(results: dict[str, Any]) -> str:
    s, over = results["settings"], Comparison(results["points"]).over
    return (
        f"Tax in nats a token at shares of plain fine-tuning's gain, mean ± standard error over "
        f"{over}. {results['model']['name']}, {s['steps']} steps of {s['batch_size']} answers, "
        f"replay of {s['replay_batch']} passages a step."
    )


def markdown(results: dict[str, Any]) -> str:
    """The comparison as a table with its caption below."""
    lines = [HEADINGS, ("---", *("---:" for _ in HEADINGS[1:])), *_comparison(results)]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    machine, versions = results["machine"], results["versions"]
    return (
        f"{rows}\n\n{_caption(results)} {machine['cpu']}, {machine['threads']} threads, torch "
        f"{versions['torch']}, {results['started'][:10]}, {results['seconds']:.0f} s "
        f"({results['processor_seconds']:.0f} s of processor time).\n"
    )


def print_table(results: dict[str, Any]) -> None:
    """The comparison on the terminal."""
    rows = _comparison(results)
    if not rows:
        print("No method can be compared yet.")
        return
    shown = Table(title=_caption(results), title_justify="left")
    for i, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    # a table squeezed into the 80 columns of a pipe cannot be read
    Console(width=max(Console().width, 100)).print(shown)


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes what there is to show, and report.html; returns the page's path."""
    picture = folder / "pareto.png"
    compared = bool(Comparison(results["points"]).rows)
    if compared:
        text = markdown(results)
        files.whole("demo", picture, lambda path: figure.draw(results, path))
        files.whole("demo", folder / "table.md", lambda path: path.write_text(text, "utf-8"))
        tax_report(results).save(folder / "tax.json")
    page = folder / "report.html"
    body = page_of(results, picture if compared else None)
    files.whole("demo", page, lambda path: path.write_text(body, encoding="utf-8"))
    return page


def page_of(results: dict[str, Any], picture: Path | None) -> str:
    """What there is to show as HTML; without the picture, nothing is compared yet."""
    name = results.get("model", {}).get("name", "model not loaded")
    return pages.render(
        "demo/report.html",
        title="fasttax demo",
        sub=f"{name}, {results['started']}, {results['seconds']:.0f} s in total",
        complete=results["status"] == "complete",
        verdicts=results["verdicts"],
        picture="" if picture is None else pages.picture(picture.read_bytes()),
        headings=HEADINGS,
        comparison=[] if picture is None else _comparison(results),
        caption="" if picture is None else _caption(results),
        points=_points(results),
        notes=NOTES,
        timing=results.get("timing"),
        parts=_parts(results),
        provenance=_provenance(results),
    )


def _points(results: dict[str, Any]) -> list[list[Any]]:
    """Headings, then every model that was measured."""
    if "base" not in results:
        return []
    rows = [["run", "seed", "share", "tax", *(heading for _, heading, _, _ in COLUMNS)]]
    rows.append(["base", "", "0", "0", *_measures(results["base"])])
    for row in results["points"]:
        share = "" if row["share"] is None else f"{row['share']:.3f}"
        method = f"{title(row['method'])}: {row['label']}"
        rows.append([method, str(row["seed"]), share, f"{row['tax']:+.4f}", *_measures(row)])
    return rows


def _measures(row: dict[str, Any]) -> list[Any]:
    """A cell for each of COLUMNS, with its error over items where there is one."""
    cells: list[Any] = []
    for metric, _, factor, digits in COLUMNS:
        value = row["metrics"][metric]
        cell = f"{factor * value['mean']:.{digits}f}"
        if value["se"] is None:
            cells.append(cell)
        else:
            cells.append((cell, f"{factor * value['se']:.{digits}f}"))
    return cells


def _parts(results: dict[str, Any]) -> list[list[str]]:
    """The parts of a step: milliseconds, and percent of a plain one."""
    if "timing" not in results:
        return []
    timing = results["timing"]
    percent = {"plain step": 100.0, **timing["percent_of_plain_step"]}
    return [[n, f"{timing['seconds'][n] * 1e3:.1f}", f"{percent[n]:.1f}"] for n in percent]


def _origin(fisher: dict[str, Any]) -> str:
    """Where a Fisher came from and where it lies."""
    if fisher["reused"]:
        return f"reused from {fisher['path']}"
    if fisher["path"] is None:
        return "estimated in this run, not kept"
    return f"estimated in this run, kept in {fisher['path']}"


def _provenance(results: dict[str, Any]) -> dict[str, str]:
    s = results["settings"]
    optimizer = f"AdamW at {s['lr']:g}, warmed up and decayed linearly, without weight decay"
    facts = {
        "settings": (
            f"{s['steps']} steps of {s['batch_size']} answers, {optimizer}; at most {s['length']} "
            f"tokens; {s['seeds']} training seeds from {s['seed']} on"
        )
    }
    if "model" in results:
        m, a, g = results["model"], results["data"]["alignment"], results["data"]["general"]
        facts["model"] = (
            f"{m['origin']}; {m['parameters']:,} parameters; hash {m['hash']}; on {m['device']}"
        )
        facts["alignment set"] = (
            f"{a['file']} (sha256 {a['sha256'][:16]}): {a['train']} train, {a['held_out']} held "
            f"out; {a['cut_answers']} answers cut"
        )
        counts = ", ".join(
            f"{g[part]['passages']} {words} passages from {len(g[part]['topics'])} topics"
            for part, words in (("fisher", "Fisher's and replay's"), ("held_out", "held-out"))
        )
        facts["general text"] = f"{g['source']}, split by topic: {counts}"
    for structure, f in results["fishers"].items():
        facts[f"Fisher, {structure}"] = (
            f"{f['metadata'].get('examples')} examples, labels {f['metadata'].get('labels')}, "
            f"{_origin(f)}"
        )
    facts["machine"] = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    facts["files"] = (
        "results.json (all numbers and curves), tax.json (for `fasttax tax`), table.md, "
        "pareto.png, report.html, in this folder"
    )
    return facts
