"""
The frame, tables and figures of an HTML page that loads nothing; text from outside is escaped here.

The page's Content-Security-Policy forbids it to load anything, and to run any script but `page.js`: markup in the name of
a tile could not run even if it was not escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files


def page(title: str, body: str, *, script: bool = False) -> str:
    """A whole page around `body`, which is HTML; `script` adds `page.js`, which browses tiles."""
    style, code = (
        files("kdpipe.pipeline.reports.html").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}"
        f"{'<script>' + code + '</script>' if script else ''}</body></html>\n"
    )


def heading(level: int, text: str, anchor: str | None = None) -> str:
    """A heading of `level` 1 to 6; links within the page lead to its `anchor`."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, with the CSS class `kind`."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text whose first row is the head; a wide table scrolls within itself."""
    head, *body = rows
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return framed_table(caption, cells, lines)


def framed_table(caption: str, head: str, body: str, kind: str = "") -> str:
    """A table around HTML: the cells of its `head` and the rows of its `body`."""
    name = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table{_class(kind)}><caption>{name}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar_cell(share: float | None, text: str) -> str:
    """A cell with a text and, to the right of it, a bar of `share`, 0..1."""
    bar = "" if share is None else f'<i style="--share:{share:.4f}"></i>'
    return f'<td class="bar"><span>{escape(text)}</span>{bar}</td>'


def figures(found: Mapping[str, tuple[str, str]]) -> str:
    """Large numbers in a row: `{name: (value, remark)}`."""
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(remark)}</small>' if remark else ''}</dd></div>"
        for name, (value, remark) in found.items()
    )
    return f'<dl class="figures">{tiles}</dl>'


def contents(links: Mapping[str, str]) -> str:
    """Links to the headings of the page: `{anchor: text}`."""
    items = "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a></li>' for anchor, text in links.items())
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def folded(summary: str, body: str) -> str:
    """HTML that a click on `summary` unfolds."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def data_url(content: bytes, kind: str) -> str:
    """The content of an image, of MIME type `kind`, as a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
