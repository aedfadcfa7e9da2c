"""The site: what it is made of is there, up to date, runs, and what checks it finds faults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import docs_check
import docs_names
import docs_pages
import pytest
import yaml

from fasttax.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def nav() -> list[str]:
    """The pages in mkdocs.yml's navigation."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, tag, node: tag)
    found: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            found.append(entry)
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                walk(inner)

    walk(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, docs_pages.Page]:
    return docs_pages.pages()


# --- pages ----------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation(made: dict[str, docs_pages.Page]) -> None:
    written = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert set(written).isdisjoint(made)
    assert sorted(nav()) == sorted([*written, *made])


def test_links_lead_to_pages(made: dict[str, docs_pages.Page]) -> None:
    """Of all pages, without building them; anchors are `make docs`'s to check."""
    pages = {f"docs/{path.name}": path.read_text() for path in ROOT.glob("docs/*.md")}
    texts = {name.removeprefix("docs/"): (text, name) for name, text in pages.items()}
    texts |= {name: (page.text, page.origin) for name, page in made.items()}
    results = [path.relative_to(ROOT).as_posix() for path in docs_pages.RESULTS]
    count = 0
    for name, (text, origin) in texts.items():
        for link in docs_pages.LINK.finditer(docs_pages.linked(text, origin, name)):
            if link[1]:
                path = (ROOT / "site" / name).parent / link[1]
                found = Path(*path.parts).resolve().relative_to(ROOT / "site").as_posix()
                assert found in [*texts, *results], f"{name}: {link[0]}"
                count += 1
    assert count > 30


def test_every_public_name_has_a_place() -> None:
    anchors = docs_pages.public_anchors()
    for module in docs_names.public():
        for name in docs_names.names(module):
            if f"fasttax.{name}" not in docs_names.public():
                assert docs_pages.shown(module, name) in anchors
    assert anchors["fasttax.token_kl"] == "api/kl.md#fasttax.token_kl"
    assert "fasttax.merge.sweep" in anchors


def test_the_command_line_is_the_parsers_own(made: dict[str, docs_pages.Page]) -> None:
    text = made["cli.md"].text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## fasttax {name}" for name in COMMANDS
    ]
    for words in ("### fasttax kl measure", "### fasttax merge linear", "--batch-size"):
        assert words in text


@pytest.mark.parametrize(
    ("link", "origin", "page", "wanted"),
    [
        ("tax.md#laws", "docs/choosing.md", "choosing.md", "tax.md#laws"),
        ("../README.md#install", "docs/tax.md", "tax.md", "install.md"),
        ("#install", "README.md", "index.md", "install.md"),
        ("#limits", "docs/tax.md", "tax.md", "#limits"),
        ("docs/tax.md", "README.md", "api/kl.md", "../tax.md"),
        ("../docs/tax.md", "examples/a.ipynb", "notebooks/a.md", "../tax.md"),
        ("examples/plain_loop.py", "README.md", "start.md", "examples.md#plain_looppy"),
        ("../bench/results/cpu-kl.json", "docs/a.md", "a.md", "bench/results/cpu-kl.json"),
        ("https://a.org/docs/tax.md", "README.md", "index.md", "https://a.org/docs/tax.md"),
    ],
)
def test_links_of_github_are_the_sites(link: str, origin: str, page: str, wanted: str) -> None:
    assert docs_pages.linked(f"see [a]({link}).", origin, page) == f"see [a]({wanted})."
    assert docs_pages.linked(f"see `[a]({link})`.", origin, page) == f"see `[a]({link})`."


def test_names_in_code_link_to_the_api() -> None:
    link = '<a href="../api/kl/#fasttax.token_kl">{}</a>'
    for name in ("token_kl", "fasttax.token_kl", "token_kl()"):
        code = f"<code>{name}</code>"
        assert docs_pages.named(f"<p>{code}</p>", "tax/index.html") == f"<p>{link.format(code)}</p>"
    for name in ("integrations.trl.FullKL", "FullKL"):
        found = docs_pages.named(f"<code>{name}</code>", "api/kl/index.html")
        assert "../integrations/#fasttax.integrations.trl.FullKL" in found
    code = "<code>token_kl</code>"
    for same in (f"<h2>{code}</h2>", f'<a href="b">{code}</a>', f"<pre>{code}</pre>"):
        assert docs_pages.named(same, "index.html") == same
    for other in ("logits", "attach", "linear", "None"):  # no name, several's, a word
        code = f"<code>{other}</code>"
        assert docs_pages.named(code, "index.html") == code


@pytest.mark.parametrize("link", ["csrc/cpu/kl.cpp", "#no-such-part", "bench/results/none.json"])
def test_a_link_to_what_is_not_on_the_site_is_refused(link: str) -> None:
    with pytest.raises(ValueError, match="not on the site"):
        docs_pages.linked(f"[a]({link})", "README.md", "index.md")


def test_docstrings_are_markdown() -> None:
    text = "Is <D, G D> of a * b * c, `a < b`.\n\n    a <- b * c\n\nArgs:\n    x: < 1 * 2.\n"
    wanted = (
        "Is &lt;D, G D> of a \\* b \\* c, `a < b`.\n\n    a <- b * c\n\n"
        "Args:\n    x: &lt; 1 \\* 2.\n"
    )
    assert docs_pages.as_markdown(f"{text}\nExample:\n    >>> a < b * c") == (
        f"{wanted}\nExamples:\n    >>> a < b * c"
    )


# --- numbers --------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results() -> None:
    from bench import evidence

    for name, text in evidence.tables().items():
        page = (ROOT / evidence.TABLES[name]).read_text(encoding="utf-8")
        within = page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
        assert within.strip() == text, "run `python -m bench.evidence`"


def test_readmes_cases_are_measured() -> None:
    from bench import evidence

    assert set(evidence.FIRST) <= set(evidence.headlines())


def test_figures_of_the_advice_are_measured() -> None:
    """Each decimal and time of docs/choosing.md stands in what a command wrote.

    Of the results only in the files that it names: another machine's time is another number.
    """
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- (\w+):begin -->.*<!-- \1:end -->", "", page, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    written = [
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("speed.md", "tax.md")
    ]
    written += re.findall(r"<!-- \w+:begin -->.*?:end -->", page, flags=re.DOTALL)
    named = [path for path in docs_pages.RESULTS if f"results/{path.name})" in page]
    written += [path.read_text(encoding="utf-8") for path in named]
    figures = re.findall(r"\d+\.\d+ ± \d+\.\d+|\d+ ms|\d+\.\d+|\d{4,}", prose)
    assert len(figures) > 30
    for figure in figures:
        found = re.compile(rf"(?<![\d.]){re.escape(figure)}(?![\d.])")
        assert any(map(found.search, written)), f"{figure}: no source says it any more"


# --- notebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", docs_pages.NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert cells[0]["source"][0].startswith("# ")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for i, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {i}", "exec"), names)


# --- the check of what was built ------------------------------------------------------------------

PAGE = '<html><body><h1 id="top">A</h1>{}</body></html>'
RIGHT = (
    '<a href="b/">b</a> <a href="b/#there">b</a> <a href="#top">up</a> <a href="b/data.json">d</a>'
    '<a href="https://example.org/a?b=c#d">e</a> <pre><code>&gt;&gt;&gt; a &lt; b</code></pre>'
    '<span class="doc-section-title">Raises:</span> a &lt; b'
)
WRONG = {
    '<a href="c/">c</a>': "c/ leads nowhere",
    '<a href="../../etc/">c</a>': "leads nowhere",
    '<a href="b/#gone">b</a>': "no such anchor",
    '<a href="#gone">b</a>': "no such anchor",
    '<a href="https://example/a b">b</a>': "no address",
    '<a href="htp://example.org">b</a>': "the scheme 'htp'",
    "<p>&gt;&gt;&gt; token_kl()</p>": "left as it was written",
    "<p>Args:\n x: a number</p>": "left as it was written",
    "<p>see [docs](docs/a.md)</p>": "left as it was written",
    "<p>two things:\n- one</p>": "left as it was written",
    "<p>a table\n| a | b |</p>": "left as it was written",
    "<p>::: fasttax.kl</p>": "left as it was written",
    "<p>of <D, G D> the</p>": "no tag of HTML",
    '<details class="raisess"><p>a</p></details>': "'raisess' is no section",
    "<h1>B</h1>": "2 headings of level 1",
}


def site(folder: Path, body: str) -> list[str]:
    (folder / "b").mkdir()
    (folder / "index.html").write_text(PAGE.format(body))
    (folder / "b" / "index.html").write_text(PAGE.format('<p id="there"><a href="../">up</a></p>'))
    (folder / "b" / "data.json").write_text("{}")
    return docs_check.faults(folder)


def test_a_right_site_has_no_faults(tmp_path: Path) -> None:
    assert site(tmp_path, RIGHT) == []


@pytest.mark.parametrize("body", WRONG)
def test_a_fault_is_found(body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = site(tmp_path, RIGHT + body)
    assert len(found) == 1
    assert found[0].startswith("index.html: ")
    assert WRONG[body] in found[0]
    assert docs_check.main([str(tmp_path)]) == 1
    assert found[0] in capsys.readouterr().err


def test_no_site_is_a_fault(tmp_path: Path) -> None:
    assert docs_check.main([str(tmp_path)]) == 1
