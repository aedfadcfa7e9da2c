"""The demo's report: a table on the terminal and in a file, pareto.png, and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasttax._base import files
from fasttax._base import page as html
from fasttax._base.page import escape, table
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
    body = _page(results, picture if compared else None)
    files.whole("demo", page, lambda path: path.write_text(body, encoding="utf-8"))
    return page


def _page(results: dict[str, Any], picture: Path | None) -> str:
    name = results.get("model", {}).get("name", "model not loaded")
    sub = f"{escape(name)}, {escape(results['started'])}, {results['seconds']:.0f} s in total"
    parts = [f"<h1>What alignment costs, and what lowers it</h1><p class=sub>{sub}</p>"]
    if results["status"] != "complete":
        parts.append(
            "<p class=partial>Partial: the demo was interrupted. What was finished is shown; the "
            "rest is missing, not zero.</p>"
        )
    parts.append("<ul>" + "".join(f"<li>{escape(s)}</li>" for s in results["verdicts"]) + "</ul>")
    if picture is not None:
        parts.append(html.picture(picture.read_bytes(), "Tax against the share of plain's gain"))
        rows = [[escape(cell) for cell in row] for row in _comparison(results)]
        parts.append("<h2>Tax at equal alignment</h2>" + table(HEADINGS, rows))
        parts.append(f"<p class=note>{escape(_caption(results))}</p>")
    parts.append(_points(results) + f"<p class=note>{NOTES}</p>")
    parts.append(_timing(results) + _provenance(results))
    return html.page("fasttax demo", "".join(parts))


def _points(results: dict[str, Any]) -> str:
    """Every model that was measured."""
    if "base" not in results:
        return ""
    rows = [["base", "", "0", "0", *_measures(results["base"])]]
    for row in results["points"]:
        share = "" if row["share"] is None else f"{row['share']:.3f}"
        method = f"{escape(title(row['method']))}: {escape(row['label'])}"
        rows.append([method, str(row["seed"]), share, f"{row['tax']:+.4f}", *_measures(row)])
    headings = ["run", "seed", "share", "tax", *(heading for _, heading, _, _ in COLUMNS)]
    return "<h2>Every point, on held-out items</h2>" + table(headings, rows)


def _measures(row: dict[str, Any]) -> list[str]:
    """A cell for each of COLUMNS, with its error over items."""
    cells = []
    for metric, _, factor, digits in COLUMNS:
        value = row["metrics"][metric]
        cell = f"{factor * value['mean']:.{digits}f}"
        if value["se"] is not None:
            cell += f"<br><small>± {factor * value['se']:.{digits}f}</small>"
        cells.append(cell)
    return cells


def _timing(results: dict[str, Any]) -> str:
    if "timing" not in results:
        return ""
    timing = results["timing"]
    percent = timing["percent_of_plain_step"]
    names = ("plain step", *percent)
    rows = [
        [
            escape(n),
            f"{timing['seconds'][n] * 1e3:.1f}",
            f"{percent[n]:.1f}" if n in percent else "100",
        ]
        for n in names
    ]
    note = (
        f"<p>Medians of {timing['rounds']} interleaved rounds; the first batch has "
        f"{timing['tokens']} tokens.</p>"
    )
    return f"<h2>Time of a step's parts</h2>{note}" + table(
        ["part", "ms", "% of a plain step"], rows
    )


def _origin(fisher: dict[str, Any]) -> str:
    """Where a Fisher came from and where it lies."""
    if fisher["reused"]:
        return f"reused from {fisher['path']}"
    if fisher["path"] is None:
        return "estimated in this run, not kept"
    return f"estimated in this run, kept in {fisher['path']}"


def _provenance(results: dict[str, Any]) -> str:
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
    return (
        "<h2>Where it comes from</h2><dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        + "</dl>"
    )
