"""Self-contained HTML pages: one style, tables, pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Sequence

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1040px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0} h2{font-size:1.1rem;margin:1.6rem 0 .4rem} p.sub{color:#666;margin:.2rem 0 1rem} li{margin:.3rem 0} img{width:100%}
p.note{font-size:13px;color:#555} .partial{background:#fff3cd;padding:.6rem 1rem;border-left:4px solid #d39e00}
table{border-collapse:collapse;width:100%;font-size:13px} th,td{padding:.3rem .5rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left} td small{color:#777} tr.chosen td{font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:13px} dt{color:#666} dd{margin:0;overflow-wrap:anywhere}
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], chosen: Collection[int] = ()
) -> str:
    """Rows of HTML, headings of text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join(
        f"<tr{' class=chosen' if i in chosen else ''}>{''.join(f'<td>{c}</td>' for c in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def picture(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, body: str) -> str:
    head = f'<meta charset=utf-8><meta name=viewport content="width=device-width"><title>{escape(title)}</title><style>{CSS}</style>'
    return f"<!doctype html><html lang=en>{head}{body}</html>\n"
