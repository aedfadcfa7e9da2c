"""Pages show every text that they are given as text, whatever it holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest

from fasttax import cli
from fasttax._base import page as pages
from fasttax.demo import report as demo_report
from fasttax.demo.settings import parse
from fasttax.tax import TaxReport
from tests.tools import tiny_lm

BAD = '"><script>alert(1)</script><img src=x onerror="alert(2)">&amp;'
TAGS = {"!doctype", "html", "meta", "title", "style", "h1", "h2", "p", "img", "table", "tr", "th"}
TAGS |= {"td", "br", "small", "dl", "dt", "dd", "ul", "li", "div", "span"}


class Reader(HTMLParser):
    """What a browser makes of a page: its tags, its attributes, its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str, *said: str) -> None:
    read = Reader(page)
    assert read.tags <= TAGS
    assert not {name for name in read.attributes if name.startswith("on")}
    for text in said:
        assert text in read.text
    assert "http" not in page


def test_of_the_tax(tmp_path: Path) -> None:
    bad = TaxReport({f"c{BAD}": 0.6, "d": 0.5}, {f"a{BAD}": 0.2}, title=f"title {BAD}")
    for k in range(3):
        score = {f"c{BAD}": 0.6 - 0.1 * k, "d": 0.5}
        options: dict[str, Any] = {"run": f"run {BAD}", "stage": f"stage {BAD}", "step": k}
        bad.add(f"{k} {BAD}", score, {f"a{BAD}": 0.2 + 0.1 * k}, kl=0.1 * k, **options)
    page = bad.html(tmp_path / "r.html").read_text()
    check(page, f"title {BAD}", f"1 {BAD}", f"a{BAD}", f"stage {BAD}")


def test_of_a_measured_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_lm.save(tmp_path / "m<b>0")
    other = tiny_lm.save(tmp_path / "m1", seed=1)
    text = tmp_path / "d<i>.txt"
    text.write_text(f"{BAD} & <b>bold</b>\n  two  spaces" * 3)
    line = ["kl", "measure", model, other, str(text), "--html", str(tmp_path / "kl.html")]
    assert cli.main(line) == 0
    page = (tmp_path / "kl.html").read_text()
    # pre-wrapped rows: nothing between a token and the next one
    check(page, "KL of m<b>0 to m1", "d<i>", f"{BAD} & <b>bold</b>\n  two  spaces")


def test_of_an_interrupted_demo() -> None:
    results = {
        "status": "interrupted",
        "started": "2026",
        "seconds": 1.0,
        "verdicts": [f"verdict {BAD}"],
        "points": [],
        "fishers": {},
        "settings": parse(["--tiny"]).as_json(),
        "machine": {"cpu": f"cpu {BAD}"},
        "versions": {},
    }
    check(demo_report.page_of(results, None), f"verdict {BAD}", f"cpu {BAD}", "Partial: the demo")


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="title"):
        pages.render("_base/page.html")
