"""Checks a built site: `python tools/docs_check.py build/site`.

Every link leads to a page, a file or an anchor that is there; addresses elsewhere are ones by their
syntax (nothing is fetched); no docstring or Markdown is left as it was written.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
CODE = {"code", "pre", "script", "style", "title", "textarea", "svg"}
# What a reader would see of an example, a section or a link that was not understood.
RAW = re.compile(
    r">>>|^\s*(Args|Raises|Returns|Yields|Attributes|Examples?):\s*$|\]\(|^\s*:::|^#+ "
    r"|^- |^\d+\. |^\||\*\*|``|\\\|"
)
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}(?::\d+)?")
# Tags that a page of the theme or of Markdown has; another is a `<` that was meant as a character.
TAGS = frozenset(
    re.findall(
        r"\w+",
        "a abbr article aside b base blockquote body br button code details dd del div dl dt em "
        "figure figcaption footer form g h1 h2 h3 h4 h5 h6 head header hr html img input ins "
        "label li link main meta nav noscript ol p path pre script section small span strong "
        "style sub summary sup svg table tbody td th thead title tr ul ",
    )
)


@dataclass
class Page(HTMLParser):
    """Ids, links and what is wrong of one page."""

    text: str
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    titles: int = 0

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []  # what text stands in: of a section's title "title"
        self.ends: list[str] = []  # the same by tags
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in TAGS and "svg" not in self.open:
            self.faults.append(f"<{tag}> is no tag of HTML: a `<` that is not escaped")
        if tag == "details" and found.get("class"):
            kind = found["class"]
            self.faults.append(f"{kind!r} is no section of a docstring in Google's style")
        self.titles += tag == "h1"
        if found.get("id"):
            self.ids.add(str(found["id"]))
        for name in ("href", "src"):
            if found.get(name) is not None:
                self.links.append(str(found[name]))
        if tag not in VOID:
            title = "doc-section-title" in (found.get("class") or "")
            self.open.append("title" if title else tag)
            self.ends.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.ends:
            self.open.pop()
            if self.ends.pop() == tag:
                break

    def handle_data(self, data: str) -> None:
        if CODE.isdisjoint(self.open):
            self.faults += [
                f"{line.strip()[:80]!r} is left as it was written"
                for line in data.split("\n")
                if RAW.search(line)
            ]


def elsewhere(link: str) -> str:
    """Why an address of another site is none, or nothing."""
    parts = urlsplit(link)
    if parts.scheme in ("mailto", "data"):
        return ""
    if parts.scheme not in ("http", "https"):
        return f"{link}: the scheme {parts.scheme!r}"
    if not HOST.fullmatch(parts.netloc) or re.search(r"[\s<>\"{}|\\^`]", link):
        return f"{link}: no address"
    return ""


def where(site: Path, page: Path, link: str) -> tuple[Path, str]:
    """The file that a link leads to, and the anchor in it."""
    parts = urlsplit(link)
    path = unquote(parts.path)
    file = site / path.lstrip("/") if path.startswith("/") else page.parent / path
    if not path:
        file = page
    if file.is_dir():
        file /= "index.html"
    return file.resolve(), unquote(parts.fragment)


def faults(site: Path) -> list[str]:
    """What is wrong with the site, a line each."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: no page"]
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: {fault}" for fault in page.faults]
        if page.titles != 1:
            found.append(f"{name}: {page.titles} headings of level 1")
        for link in dict.fromkeys(page.links):
            if urlsplit(link).scheme or link.startswith("//"):
                reason = elsewhere(link)
                found += [f"{name}: {reason}"] if reason else []
                continue
            file, anchor = where(site, path, link)
            if not file.is_relative_to(site) or not file.is_file():
                found.append(f"{name}: {link} leads nowhere")
            elif anchor and file in pages and anchor not in pages[file].ids | {"__"}:
                found.append(f"{name}: {link}: no such anchor")
    return found


def main(arguments: list[str]) -> int:
    site = Path(arguments[0])
    found = faults(site)
    for line in found:
        print(line, file=sys.stderr)
    count = len(list(site.rglob("*.html")))
    print(f"{count} pages, {len(found)} faults")
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
