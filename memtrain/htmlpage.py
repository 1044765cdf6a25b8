"""The bricks of pages that open offline: one file each, nothing loaded, light and dark, wide and narrow."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #1f2328; }
li, p { overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 0.6em 0; }
td, th { padding: 0.2em 0.6em; border-bottom: 1px solid #8884; text-align: right; }
td:first-child, th:first-child { text-align: left; }
pre { background: #8881; padding: 0.8em; overflow-x: auto; font-size: 13px; }
figure, .scroll { margin: 0; overflow-x: auto; }
svg { width: 100%; min-width: 640px; height: auto; display: block; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
"""
LIGHT, DARK = "#ffffff", "#0d1117"
"""What colours must be seen on."""


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text, also the heading.
        body: HTML below the heading.
        style: CSS beside ``STYLE``.
    """
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{name}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in columns; a narrow window scrolls the table, not the page."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def figure(svg: str) -> str:
    """A picture that a narrow window scrolls."""
    return f"<figure>{svg}</figure>"


def bullets(items: Sequence[str]) -> str:
    """Plain text, item by item."""
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Plain text as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def folded(summary: str, content: str, *, open_: bool = False) -> str:
    """HTML behind a line that opens it."""
    state = " open" if open_ else ""
    return f"<details{state}><summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def sections(parts: Sequence[tuple[str, str]]) -> str:
    """HTML under headings; a part without content is left out with its heading."""
    return "\n".join(f"<h2>{html.escape(title)}</h2>\n{content}" for title, content in parts if content)
