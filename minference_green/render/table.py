"""A report for people at a terminal, and as plain lines for logs."""

from collections.abc import Iterator
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minference_green.render.document import Document, Sheet

TEXT_COLUMNS = 2
"""Context and method stand left; figures stand right."""

GAP = 2
"""Blanks between two columns."""

LEAST_WIDTH = 4
"""Of a column: a heading folded to single letters is none."""


def plain(document: Document) -> str:
    """The report as lines of aligned text, without any terminal control."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    width = max(len(label) for label, _ in document.facts)
    for label, text in document.facts:
        yield f"{label:<{width}}  {text}"
    for doubt in document.doubts:
        yield f"! {doubt}"
    for sheet in document.sheets:
        yield ""
        yield sheet.caption
        yield from _aligned(sheet)
    yield ""
    yield from _footnotes(document)
    yield from document.conclusion


def _aligned(sheet: Sheet) -> Iterator[str]:
    lines = (sheet.columns, *sheet.rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(sheet.columns))]
    for line in lines:
        cells = (
            f"{text:<{width}}" if i < TEXT_COLUMNS else f"{text:>{width}}"
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _footnotes(document: Document) -> Iterator[str]:
    for number, reason in enumerate(document.footnotes, 1):
        yield f"({number}) {reason}"


def show(document: Document, console: Console) -> None:
    """The report on a terminal; text of the run is printed as it is, never as markup."""
    for label, text in document.facts:
        console.print(Text.assemble((f"{label}: ", "bold"), text))
    for doubt in document.doubts:
        console.print(Text(f"! {doubt}", style="yellow"))
    for sheet in document.sheets:
        console.print()
        console.print(Text(sheet.caption, style="italic"))
        for part in _fitted(sheet, console.width):
            console.print(part)
    console.print()
    for line in _footnotes(document):
        console.print(Text(line, style="dim"))
    for sentence in document.conclusion:
        console.print(Text(sentence, style="bold"))


def _fitted(sheet: Sheet, width: int) -> Iterator[Table | Text]:
    """A table whose figures are whole: headings are folded, and then rows become blocks."""
    widths = [max(LEAST_WIDTH, *map(len, column)) for column in zip(*sheet.rows, strict=True)]
    spare = width - sum(widths) - GAP * len(widths)
    if spare < 0:
        yield from _blocks(sheet)
        return
    # Room that is left keeps words of headings whole, and then headings.
    for wanted in (
        [max(map(len, heading.split())) for heading in sheet.columns],
        [len(heading) for heading in sheet.columns],
    ):
        for i, least in enumerate(wanted):
            more = min(spare, max(0, least - widths[i]))
            widths[i], spare = widths[i] + more, spare - more
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for i, column in enumerate(sheet.columns):
        justify: Literal["left", "right"] = "left" if i < TEXT_COLUMNS else "right"
        table.add_column(Text(column), justify=justify, width=widths[i], overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(text) for text in row))
    yield table


def _blocks(sheet: Sheet) -> Iterator[Text]:
    for row in sheet.rows:
        yield Text("  ".join(row[:TEXT_COLUMNS]), style="bold")
        for heading, text in zip(sheet.columns[TEXT_COLUMNS:], row[TEXT_COLUMNS:], strict=True):
            if text:
                yield Text(f"  {heading}: {text}")
