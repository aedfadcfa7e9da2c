"""Self-contained HTML pages, by templates that show every text as it is."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def _templates() -> Any:
    import jinja2  # torch's own, on use

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """The page that a template of the package makes, as "tax/page.html", of these values."""
    page: str = _templates().get_template(template).render(values)
    return page + "\n"


def picture(png: bytes) -> str:
    """An image as an address that lies in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
