"""The demo's output: a table on the terminal, the figure, and one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasttax._base import files
from fasttax._base import page as html
from fasttax._base.page import escape, table
from fasttax.demo import figure, verdicts

COLUMNS = (  # metric, heading, factor, digits
    ("answer_nll", "answer NLL ↓", 1.0, 3),
    ("preference", "preference % ↑", 100.0, 0),
    ("perplexity", "perplexity ↓", 1.0, 2),
    ("last_word", "last word % ↑", 100.0, 1),
    ("kl_general", "KL general", 1.0, 4),
    ("kl_answers", "KL answers", 1.0, 3),
    ("fisher_distance", "Fisher distance", 1.0, 4),
)
PARTS = {"plain": (), "kl": ("kl",), "ewc": ("ewc",), "both": ("kl", "ewc")}
NOTES = """
± is one standard error over held-out items. Runs are compared in pairs over the same items, and
called better or worse only beyond two standard errors of the paired difference. Passages of one
topic are not fully independent, so errors on general text are rather too small than too large.
Last word: each word of three letters or more in the last two thirds of a passage, taken as the last
word of the passage up to it; it counts when greedy decoding gets all of its tokens right.
Preference: the good answer has the higher mean token log-probability. KL is KL(model || base).
Fisher distance: sum of Fisher times squared weight change. + %: of a plain step, medians of
interleaved rounds in this run.
"""


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _rows(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Label and, for each column, the number and its error."""
    found = []
    measured = {"base": results["base"], **results["runs"]} if "base" in results else {}
    for name, row in measured.items():
        cells = []
        for metric, _, factor, digits in COLUMNS:
            value = row["metrics"][metric]
            cells.append(
                (
                    _number(factor * value["mean"], digits),
                    "" if value["se"] is None else f"± {_number(factor * value['se'], digits)}",
                )
            )
        cells += _added(results, name)
        found.append((str(row["label"]), cells))
    return found


def _added(results: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """Percent that fasttax, the composition and the reference's forward add to a plain step."""
    if "timing" not in results or name == "base":
        return [("", "")] * 3
    percent = results["timing"]["percent_of_plain_step"]
    sums = [
        sum(percent[f"{part} {kind}"] for part in PARTS[name]) for kind in ("fasttax", "composed")
    ]
    reference = percent["reference forward"] if "kl" in PARTS[name] else 0.0
    return [(_number(value, 1), "") for value in (*sums, reference)]


HEADINGS = [heading for _, heading, _, _ in COLUMNS] + [
    "+ % fasttax",
    "+ % PyTorch",
    "+ % reference forward",
]


def print_table(results: dict[str, Any]) -> None:
    """A row a run, a column a measure, on the terminal."""
    rows = _rows(results)
    if not rows:
        print("No run was measured yet.")
        return
    title = (
        f"{results['model']['name']}: {results['settings']['steps']} steps each; ± one standard "
        "error; + % of a plain step"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("run", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for label, cells in rows:
        table.add_row(
            label, *(f"{value}\n[dim]{error}[/dim]" if error else value for value, error in cells)
        )
    # a table squeezed into the 80 columns of a pipe cannot be read
    Console(width=max(Console().width, 150)).print(table)


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes pareto.png (where there is a run to show) and report.html; returns the page's path."""
    picture = folder / "pareto.png"
    has_picture = "base" in results
    if has_picture:
        files.whole("demo", picture, lambda path: figure.draw(results, path))
    page = folder / "report.html"
    text = _page(results, picture if has_picture else None)
    files.whole("demo", page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


def _page(results: dict[str, Any], picture: Path | None) -> str:
    name = results.get("model", {}).get("name", "model not loaded")
    sub = f"{escape(name)}, {escape(results['started'])}, {results['seconds']:.0f} s in total"
    parts = [f"<h1>What alignment cost, four ways</h1><p class=sub>{sub}</p>"]
    if results["status"] != "complete":
        parts.append(
            "<p class=partial>Partial: the demo was interrupted. What was finished is shown; the "
            "rest is missing, not zero.</p>"
        )
    parts.append("<ul>" + "".join(f"<li>{escape(s)}</li>" for s in results["verdicts"]) + "</ul>")
    if picture is not None:
        parts.append(
            html.picture(picture.read_bytes(), "Capability against alignment, a point for each run")
        )
    parts.append(
        "<h2>Measures on held-out items</h2>"
        + table(
            ["run", *HEADINGS],
            [[escape(label), *map(_cell, cells)] for label, cells in _rows(results)],
        )
    )
    parts.append(f"<p class=note>{NOTES}</p>")
    parts.append(_timing(results) + _strengths(results) + _provenance(results))
    return html.page("fasttax demo", "".join(parts))


def _cell(cell: tuple[str, str]) -> str:
    value, error = cell
    return f"{value}<br><small>{error}</small>" if error else value


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


def _strengths(results: dict[str, Any]) -> str:
    candidates = results["candidates"]
    if not candidates:
        return ""
    rows = []
    for c in candidates:
        v = c["validation"]
        numbers = [
            f"{v[m]['mean']:.3f} <small>± {v[m]['se']:.3f}</small>"
            for m in ("answer_nll", "general_nll")
        ]
        rows.append(
            [
                f"{c['family'].upper()} {c['strength']:g}",
                *numbers,
                escape(c.get("reason", "")) if c["chosen"] else "",
            ]
        )
    for name, v in results["validation"].items():
        rows.append([name, f"{v['answer_nll']:.3f}", f"{v['general_nll']:.3f}", ""])
    chosen = {i for i, c in enumerate(candidates) if c["chosen"]}
    headings = ["candidate", "validation answer NLL", "validation general NLL", "chosen because"]
    rule = verdicts.rule(results["settings"]["keep_gain"])
    return (
        f"<h2>How the strengths were chosen</h2><p>{escape(rule)}</p>"
        f"{table(headings, rows, chosen)}"
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
            f"tokens; seed {s['seed']}"
        )
    }
    if "model" in results:
        m, a, g = results["model"], results["data"]["alignment"], results["data"]["general"]
        facts["model"] = (
            f"{m['origin']}; {m['parameters']:,} parameters; hash {m['hash']}; on {m['device']}"
        )
        sizes = (
            f"{a['train']} train, {a['validation']} validation, {a['test']} test; "
            f"{a['cut_answers']} answers cut"
        )
        facts["alignment set"] = f"{a['file']} (sha256 {a['sha256'][:16]}): {sizes}"
        counts = ", ".join(
            f"{n} {part} passages from {len(g['topics'][part])} topics"
            for part, n in g["passages"].items()
        )
        facts["general text"] = f"{g['source']}, split by topic: {counts}"
    if "fisher" in results:
        f = results["fisher"]
        facts["Fisher"] = (
            f"{f['metadata'].get('examples')} examples, labels {f['metadata'].get('labels')}, "
            f"{_origin(f)}"
        )
    facts["machine"] = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    facts["files"] = (
        "results.json (all numbers and curves), pareto.png, report.html, in this folder"
    )
    return (
        "<h2>Where it comes from</h2><dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        + "</dl>"
    )
