"""The pages of the site that are made: of README, docstrings, parsers, examples, bench/results.

A page is Markdown with links as its source has them on GitHub; `linked` turns those into the
site's. Nothing here imports mkdocs, so that the tests need none.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs_names import ROOT, assigned, docstring, home, names, trainers

README_PAGES = {  # a page of the site: the sections of README that it consists of
    "index.md": ("", "How fast", "Two commands", "What is in it", "Limits"),
    "install.md": ("Install", "Versions"),
    "start.md": ("In your trainer",),
}
WHOLE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FAMILIES = {  # a page of the API: its title, and the modules whose names it has
    "api/kl.md": ("KL", ["fasttax.kl"]),
    "api/fisher.md": ("Fisher", ["fasttax.fisher"]),
    "api/ewc.md": ("EWC", ["fasttax.ewc"]),
    "api/functional.md": ("Functional: ops on plain tensors", ["fasttax.functional"]),
    "api/merge.md": ("Merge", ["fasttax.merge"]),
    "api/tax.md": ("Tax", ["fasttax.tax"]),
    "api/integrations.md": ("Integrations", ["fasttax.integrations", *trainers()]),
}
FIRST = ("token_kl", "estimate_fisher", "EWC", "linear", "TaxReport", "attach")  # of their pages
NAMES = ROOT / "tests" / "tools" / "example_names.py"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:)([^)\s#]*)(#[^)\s]*)?(?=\))")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
INLINE = re.compile(r"(`[^`]*`)")
# Whole elements in which a name stays as it is, or a name in code.
NAME = re.compile(
    r"<(pre|a|h[1-6])\b.*?</\1>|<code>(?:fasttax\.)?(?P<name>[\w.]+)(?:\(\))?</code>", re.DOTALL
)
CODE = re.compile(r"(```.*?\n```|``.+?``|`[^`\n]*`)", flags=re.DOTALL)


@dataclass(frozen=True)
class Page:
    """Markdown, and the file of the repository whose links it has."""

    text: str
    origin: str


# --- links ------------------------------------------------------------------------------------


def slug(title: str) -> str:
    """The anchor of a heading, on GitHub and in Python-Markdown alike."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def target(path: str, anchor: str) -> str | None:
    """Where the site has what README or a page links to, by its path in the repository."""
    if path == "README.md":
        title = anchor.removeprefix("#")
        found = (p for p, titles in README_PAGES.items() if title in map(slug, titles))
        return next(found, None)
    place = Path(path)
    known = {source: page + anchor for page, source in WHOLE.items()}
    known |= {"examples": "examples.md", "bench/results": "numbers.md"}
    known |= {p.relative_to(ROOT).as_posix(): f"examples.md#{slug(p.name)}" for p in SCRIPTS}
    known |= {p.relative_to(ROOT).as_posix(): p.relative_to(ROOT).as_posix() for p in RESULTS}
    if place.parts[:1] == ("docs",) and place.suffix == ".md":
        return path.removeprefix("docs/") + anchor
    if place.parts[:1] == ("examples",) and place.suffix == ".ipynb":
        return f"notebooks/{place.stem}.md{anchor}"
    return known.get(path)


def linked(text: str, origin: str, page: str) -> str:
    """Links to files of the repository, as `origin` has them, made the site's own.

    Raises:
        ValueError: a link to what is not on the site.
    """

    def renewed(match: re.Match[str]) -> str:
        if not match[1] and origin != "README.md":
            return match[0]  # within the page
        path = origin
        if match[1]:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        found = target(path, match[2] or "")
        if found is None:
            raise ValueError(
                f"{origin}: a link to {match[0]}, which is not on the site; link to a file of "
                "docs/, examples/ or bench/results, or name it as code"
            )
        where, _, anchor = found.partition("#")
        path = posixpath.relpath(where, posixpath.dirname(page) or ".")
        return f"{path}#{anchor}" if anchor else path

    parts = CODE.split(text)  # what is code stands at the odd places
    return "".join(
        # GitHub takes a `|` in a table's code for a border, Python-Markdown does not
        part.replace("\\|", "|") if i % 2 else LINK.sub(renewed, part)
        for i, part in enumerate(parts)
    )


@functools.cache
def public_anchors() -> dict[str, str]:
    """The page with the anchor of every public name, by the name as users write it."""
    return {
        shown(module, name): f"{page}#{shown(module, name)}"
        for page, (_, modules) in FAMILIES.items()
        for module in modules
        for name in names(module)
    }


@functools.cache
def short_names() -> dict[str, str]:
    """Names that are one thing's alone and no word: TaxReport, but neither attach nor linear."""
    last = [path.rpartition(".")[2] for path in public_anchors()]
    return {
        name: path
        for name, path in zip(last, public_anchors(), strict=True)
        if last.count(name) == 1 and ("_" in name or name != name.lower())
    }


def named(html: str, address: str) -> str:
    """A built page whose public names in code link to the API; `address` is the page's file."""

    def link(match: re.Match[str]) -> str:
        path = short_names().get(str(match["name"]), f"fasttax.{match['name']}")
        anchor = public_anchors().get(path)
        if anchor is None:
            return match[0]
        page, _, identifier = anchor.partition("#")
        where = posixpath.relpath(page.removesuffix(".md"), posixpath.dirname(address) or ".")
        return f'<a href="{where}/#{identifier}">{match[0]}</a>'

    return NAME.sub(link, html)


# --- README and whole files -------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """README's parts by their titles; what stands above the first has none."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def of_readme() -> dict[str, Page]:
    """A page for each entry of README_PAGES.

    Raises:
        ValueError: README lacks a section, or has one that is on no page.
    """
    found = sections((ROOT / "README.md").read_text(encoding="utf-8"))
    asked = [title for titles in README_PAGES.values() for title in titles]
    if sorted(asked) != sorted(found):
        raise ValueError(
            f"README_PAGES: expected README's sections {sorted(found)}, got {sorted(asked)}"
        )
    made = {}
    for page, titles in README_PAGES.items():
        text = "\n\n".join(
            found[title] if not title else f"{'##' if i else '#'} {title}\n{found[title]}"
            for i, title in enumerate(titles)
        )
        made[page] = Page(text, "README.md")
    return made


# --- examples ---------------------------------------------------------------------------------


def of_notebook(path: Path) -> Page:
    """A notebook's cells: what is text as text, what is code as code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    origin = path.relative_to(ROOT).as_posix()
    parts.append(f"*This page is `{origin}`, which the test suite executes.*")
    return Page("\n\n".join(parts), origin)


def scripts() -> Page:
    """Every script of examples/, with its docstring above it."""
    parts = [
        "# Notebooks and scripts",
        "Each runs as it stands, in the test suite on a tiny model.",
        *(f"- [{title(path)}]({path.name})" for path in NOTEBOOKS),
    ]
    text = "\n".join(parts[2:])
    parts = [*parts[:2], text]
    for path in SCRIPTS:
        code = path.read_text(encoding="utf-8")
        told = ast.get_docstring(ast.parse(code)) or ""
        first, _, _ = told.partition("\n\npython ")
        body = code.split('"""', 2)[2].strip()
        parts.append(f"## {path.name}\n\n{first}\n\n```python\n{body}\n```")
    return Page("\n\n".join(parts), "examples/README.md")


def title(notebook: Path) -> str:
    """Of its first cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")


# --- the API ----------------------------------------------------------------------------------


def shown(module: str, name: str) -> str:
    """A name as users write it: `fasttax.token_kl` for what is at the top."""
    top = name in (assigned("fasttax", "__all__") or []) and module.count(".") == 1
    return f"fasttax.{name}" if top else f"{module}.{name}"


def of_family(title: str, modules: list[str]) -> str:
    """Each file's docstring, and below it the names that it defines."""
    lines = [f"# {title}", "", docstring(modules[0])]
    for module in modules:
        files: dict[str, list[str]] = {}
        for name in sorted(names(module), key=lambda name: name not in FIRST):
            files.setdefault(home(module, name), []).append(name)
        for file, found in files.items():
            if docstring(file) != docstring(modules[0]):
                first, _, rest = docstring(file).partition("\n")
                lines += ["", f"## {first.rstrip('.')}", "", as_markdown(rest).strip("\n")]
            for name in found:
                # by the file that defines it, as files and functions have the same names
                lines += ["", f"[](){{#{shown(module, name)}}}", "", f"::: {file}.{name}"]
    return "\n".join(lines)


def taken_for_granted() -> Page:
    """The names in the examples, from the docstrings of what makes them in the suite."""
    body = ast.parse(NAMES.read_text(encoding="utf-8")).body
    made = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == "Names")
    rows = [
        f"| `{node.name}` | {(ast.get_docstring(node) or '').rstrip('.')} |"
        for node in made.body
        if isinstance(node, ast.FunctionDef)
    ]
    text = (
        "# Names in the examples\n\nAn example in the API takes `torch` and `fasttax` for imported "
        "and these for there. All examples run in the test suite, where they are tiny.\n\n"
        "| name | what it is |\n|---|---|\n"
    )
    return Page(text + "\n".join(rows) + "\n", "README.md")


# --- docstrings -------------------------------------------------------------------------------


def as_markdown(text: str) -> str:
    """A docstring's text: `Example:` is a section, and outside of code nothing is HTML."""
    lines, inside = [], False
    for line in text.split("\n"):
        if line and not line.startswith(" "):
            inside = SECTION.match(line) is not None
        code = line.startswith("    ") and not inside  # a formula, or an example
        lines.append(line if code else escaped(line))
    return re.sub(r"^Example:$", "Examples:", "\n".join(lines), flags=re.MULTILINE)


def escaped(line: str) -> str:
    """A line in which `<` and `*` are characters, as docstrings have no tags and no emphasis."""
    parts = INLINE.split(line)  # what is code stands at the odd places
    return "".join(
        part if i % 2 else part.replace("<", "&lt;").replace("*", "\\*")
        for i, part in enumerate(parts)
    )


# --- the command line -------------------------------------------------------------------------


def commands() -> Page:
    """What `fasttax help COMMAND` prints, of every command and tool."""
    import importlib

    os.environ["COLUMNS"] = "96"
    from fasttax.cli.commands import COMMANDS
    from fasttax.cli.main import usage

    parts = ["# Command line", f"```text\n{usage()}\n```"]
    for name, summary in COMMANDS.items():
        parser: Any = importlib.import_module(f"fasttax.cli.{name}").parser()
        parts.append(f"## fasttax {name}\n\n{summary[0].upper()}{summary[1:]}.")
        parts.append(f"```text\n{parser.format_help().strip()}\n```")
        for tool, inner in tools(parser).items():
            parts.append(f"### fasttax {name} {tool}")
            parts.append(f"```text\n{inner.format_help().strip()}\n```")
    return Page("\n\n".join(parts), "README.md")


def tools(parser: Any) -> dict[str, Any]:
    """The parsers of a command that has several, by name; argparse has no public list of them."""
    return {
        name: inner
        for action in parser._actions
        if isinstance(getattr(action, "choices", None), dict)
        for name, inner in action.choices.items()
    }


# --- all of it --------------------------------------------------------------------------------


def pages() -> dict[str, Page]:
    """The pages that are made, by their paths on the site."""
    made = of_readme()
    for page, source in WHOLE.items():
        made[page] = Page((ROOT / source).read_text(encoding="utf-8"), source)
    for page, (heading, modules) in FAMILIES.items():
        made[page] = Page(of_family(heading, modules), "README.md")
    made["api/examples.md"] = taken_for_granted()
    made["examples.md"] = scripts()
    made |= {f"notebooks/{path.stem}.md": of_notebook(path) for path in NOTEBOOKS}
    made["cli.md"] = commands()
    return made
