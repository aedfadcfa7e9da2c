"""Docstrings as Markdown, for mkdocstrings: by docs_pages, which the hooks have imported."""

from __future__ import annotations

from typing import Any

import docs_pages
import griffe

Extension: Any = griffe.Extension  # whose types are read where it is installed alone


class Docstrings(Extension):
    """Turns every docstring of the package into Markdown, as it is read."""

    def on_instance(self, *, obj: Any, **others: Any) -> None:
        """Of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = docs_pages.as_markdown(obj.docstring.value)
