"""What `mkdocs build` calls: pages that are made, links as on GitHub, names that link."""

from __future__ import annotations

from typing import Any

import docs_names
import docs_pages
from mkdocs.structure.files import File

MADE: dict[str, docs_pages.Page] = {}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made, and the files of bench/results that pages link to."""
    MADE.update(docs_pages.pages())
    for path, page in MADE.items():
        files.append(File.generated(config, path, content=page.text))
    for result in docs_pages.RESULTS:
        path = result.relative_to(docs_names.ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(result)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links the site's."""
    path = page.file.src_uri
    origin = MADE[path].origin if path in MADE else f"docs/{path}"
    return docs_pages.linked(markdown, origin, path)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Links names in code to the API."""
    return docs_pages.named(html, page.file.dest_uri)
