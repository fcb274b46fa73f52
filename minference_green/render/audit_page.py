"""An audit as one HTML page: no script, no request to anywhere, pictures as inline SVG."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from minference_green.findings import PLACES, Findings, findings
from minference_green.ledger import Audit
from minference_green.render.audit import PLACE_WORDS, audit_document
from minference_green.render.audit_frontier import picture
from minference_green.render.document import Sheet
from minference_green.render.table import TEXT_COLUMNS
from minference_green.workload import format_length

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #3d444d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.conclusion { font-weight: 600; } .doubt { border-left: 4px solid #d29922; padding-left: .75rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
caption { text-align: left; font-style: italic; padding-bottom: .25rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th.text, td.text { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, sans-serif; }
svg .label { fill: var(--ink); }
"""

_CELL_WIDTH, _CELL_HEIGHT, _LABEL_WIDTH, _HEAD_HEIGHT = 104, 24, 90, 46

_LETTER_WIDTH = 7
"""Of a method's name above its column, in the page's 12 px."""

_WORST, _BEST = (178, 24, 43), (33, 102, 172)
"""Red to blue through white: told apart also by those who do not see green."""


def audit_page(audit: Audit, directory: Path | None = None) -> str:
    """The whole report as one page."""
    document, found = audit_document(audit, directory), findings(audit)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Audit {escape(audit.header.audit_id)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>What sparse prefill loses</h1>",
        *(f'<p class="conclusion">{escape(s)}</p>' for s in document.conclusion),
        *(f'<p class="doubt">{escape(s)}</p>' for s in document.doubts),
        *(heat_map(found, length) for length in audit.header.plan.context_lengths),
        *(
            f'<div class="wide">{picture(found, length)}</div>'
            for length in audit.header.plan.context_lengths
            if audit.header.plan.budgets
        ),
        *(_table(sheet) for sheet in document.sheets),
        *(f"<p>({i}) {escape(text)}</p>" for i, text in enumerate(document.footnotes, 1)),
        '<h2>Provenance</h2><table class="facts">',
        *(
            f'<tr><th class="text">{escape(label)}</th><td class="text">{escape(text)}</td></tr>'
            for label, text in document.facts
        ),
        "</table></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def heat_map(found: Findings, length: int) -> str:
    """Retention by kind, a column per method and place, as SVG; empty without a comparison.

    Every cell holds its own count, so that colour alone says nothing.
    """
    arms = [arm for arm in found.compared if arm.length == length]
    columns = [(arm, place) for arm in arms for place in PLACES if place in arm.places]
    if not columns:
        return ""
    kinds = found.audit.header.plan.kinds
    cell = max(_CELL_WIDTH, *(_LETTER_WIDTH * len(arm.method) + 8 for arm, _ in columns))
    width = _LABEL_WIDTH + cell * len(columns)
    height = _HEAD_HEIGHT + _CELL_HEIGHT * len(kinds)
    title = f"Answers kept by kind at {format_length(length)} tokens"
    words = "Rows are kinds of information, columns methods and places of questions; a cell says "
    words += "how many of the answers that dense prefill gave right were kept."
    parts = [
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc>",
    ]
    for i, (arm, place) in enumerate(columns):
        x = _LABEL_WIDTH + cell * i + cell / 2
        for line, text in enumerate((arm.method, PLACE_WORDS[place])):
            parts.append(_text(x, 18 + 18 * line, text, "label"))
    for row, kind in enumerate(kinds):
        y = _HEAD_HEIGHT + _CELL_HEIGHT * row
        parts.append(_text(_LABEL_WIDTH - 8, y + 16, kind, "label", anchor="end"))
        for i, (arm, place) in enumerate(columns):
            parts += _cell(_LABEL_WIDTH + cell * i, y, cell, *arm.kept(kind, place))
    parts.append("</svg>")
    return f'<h2>{escape(title)}</h2><div class="wide">{"".join(parts)}</div>'


def _cell(x: float, y: float, width: float, kept: int, of: int) -> Iterator[str]:
    share = kept / of if of else None
    fill = "none" if share is None else _colour(share)
    yield (
        f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2:g}" height="{_CELL_HEIGHT - 2}" '
        f'fill="{fill}"/>'
    )
    dark = share is not None and (share < DARK_BELOW or share > DARK_ABOVE)
    shown = "none right" if share is None else f"{kept}/{of}"
    style = "label" if share is None else ""
    ink = "#fff" if dark else "#000"
    yield _text(x + width / 2, y + 16, shown, style, fill=None if share is None else ink)


DARK_BELOW, DARK_ABOVE = 0.2, 0.9
"""Cells beyond these are dark enough for white letters."""


def _colour(share: float) -> str:
    """White at three quarters kept, so that a small loss already shows."""
    middle = 0.75
    end = _BEST if share >= middle else _WORST
    reach = (share - middle) / (1 - middle) if share >= middle else (middle - share) / middle
    return "#" + "".join(f"{round(255 + (c - 255) * reach):02x}" for c in end)


def _text(
    x: float, y: float, text: str, style: str, *, anchor: str = "middle", fill: str | None = None
) -> str:
    colour = "" if fill is None else f' fill="{fill}"'
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{style}"{colour}>'
        f"{escape(text)}</text>"
    )


def _table(sheet: Sheet) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(
            f'<{tag}{" class=text" if i < TEXT_COLUMNS else ""}>{escape(text)}</{tag}>'
            for i, text in enumerate(cells)
        ) + "</tr>"  # fmt: skip

    body = "".join(row(cells, "td") for cells in sheet.rows)
    return (
        f'<div class="wide"><table><caption>{escape(sheet.caption)}</caption>'
        f"<thead>{row(sheet.columns, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )
