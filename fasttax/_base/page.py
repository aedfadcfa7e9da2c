"""Self-contained HTML pages: one style, tables, pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Sequence

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1040px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}
h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
p.sub{color:#666;margin:.2rem 0 1rem}
p.note{font-size:13px;color:#555}
li{margin:.3rem 0}
img{width:100%}
.partial{background:#fff3cd;padding:.6rem 1rem;border-left:4px solid #d39e00}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{padding:.3rem .5rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
td small{color:#777}
tr.chosen td{font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:13px}
dt{color:#666}
dd{margin:0;overflow-wrap:anywhere}
"""


def escape(text: object) -> str:
    """Text that is shown as it is, in an element or in a quoted attribute."""
    return html.escape(str(text))


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], chosen: Collection[int] = ()
) -> str:
    """A table of rows whose cells are HTML, under headings of text; `chosen` rows are bold."""
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in headings) + "</tr>"]
    for i, row in enumerate(rows):
        opening = "<tr class=chosen>" if i in chosen else "<tr>"
        lines.append(opening + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def picture(png: bytes, alt: str) -> str:
    """An image that lies in the page itself."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def page(title: str, body: str) -> str:
    """The whole document; `title` is text, `body` HTML."""
    head = (
        '<meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{CSS}</style>"
    )
    return f"<!doctype html><html lang=en>{head}{body}</html>\n"
