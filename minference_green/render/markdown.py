"""A report as Markdown: a pull-request comment, a job summary, evidence in a README."""

from collections.abc import Iterator

from minference_green.render.document import Document, Sheet
from minference_green.render.table import TEXT_COLUMNS


def markdown(document: Document) -> str:
    """The report with the conclusion first and the provenance last."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    for sentence in document.conclusion:
        yield f"**{escaped(sentence)}**"
        yield ""
    for sheet in document.sheets:
        yield escaped(sheet.caption)
        yield ""
        yield from _table(sheet)
        yield ""
    for number, reason in enumerate(document.footnotes, 1):
        yield f"({number}) {escaped(reason)}  "
    if document.footnotes:
        yield ""
    for doubt in document.doubts:
        yield f"> {escaped(doubt)}  "
    if document.doubts:
        yield ""
    for label, text in document.facts:
        yield f"- {label}: {escaped(text)}"


def _table(sheet: Sheet) -> Iterator[str]:
    rules = (":--" if i < TEXT_COLUMNS else "--:" for i in range(len(sheet.columns)))
    yield _row(sheet.columns)
    yield f"| {' | '.join(rules)} |"
    yield from (_row(row) for row in sheet.rows)


def _row(texts: tuple[str, ...]) -> str:
    return f"| {' | '.join(escaped(text) for text in texts)} |"


def escaped(text: str) -> str:
    """Names come from users: none may end a cell, start markup or become HTML."""
    for character in "\\`*_<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.replace("](", "]\\(").split())
