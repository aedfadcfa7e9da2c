"""What `mkdocs build` calls: pages that are made, links as on GitHub, names that link."""

from __future__ import annotations

import posixpath
import re
from typing import Any

import docs_names
import docs_pages
from mkdocs.structure.files import File

MADE: dict[str, docs_pages.Page] = {}
ANCHORS: dict[str, str] = {}
# Whole elements in which a name stays as it is, or a name in code.
NAME = re.compile(
    r"<(pre|a|h[1-6])\b.*?</\1>|<code>(?:fasttax\.)?(?P<name>[\w.]+)(?:\(\))?</code>",
    re.DOTALL,
)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made, and the files of bench/results that pages link to."""
    MADE.update(docs_pages.pages())
    ANCHORS.update(docs_pages.public_anchors())
    for path, page in MADE.items():
        files.append(File.generated(config, path, content=page.text))
    for result in docs_pages.RESULTS:
        path = result.relative_to(docs_names.ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(result)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links the site's, and names of docstrings' code readable as Markdown."""
    path = page.file.src_uri
    origin = MADE[path].origin if path in MADE else f"docs/{path}"
    return docs_pages.linked(markdown, origin, path)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Links every public name in code to its place in the API."""
    here = posixpath.dirname(page.file.dest_uri)

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        anchor = None if name is None else ANCHORS.get(f"fasttax.{name}")
        if anchor is None:
            return match[0]
        where, _, identifier = anchor.partition("#")
        address = posixpath.relpath(where.removesuffix(".md"), here or ".")
        return f'<a href="{address}/#{identifier}">{match[0]}</a>'

    return NAME.sub(link, html)
