"""``green-bench report``: a run or an audit as a table, Markdown, CSV, JSON or a page."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.errors import UsageError

if TYPE_CHECKING:
    from minference_green.ledger import Audit
    from minference_green.render.document import Document
    from minference_green.results import Run


class Format(StrEnum):
    """What a report is written as."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"
    HTML = "html"


def report(
    run: Annotated[
        Path, typer.Argument(help="A run or an audit: its directory, run.jsonl or audit.jsonl.")
    ],
    form: Annotated[
        Format, typer.Option("--format", "-f", help="What to write the report as.")
    ] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write to instead of stdout.")
    ] = None,
) -> None:
    """Recompute every figure of a run or an audit from its file and print them; needs no GPU.

    Raises ``UsageError`` for a file that cannot be read or an output that cannot be written.
    """
    from minference_green.ledger import FILE_NAME, audit_file, load_audit
    from minference_green.results import load, run_file

    loaded: Run | Audit
    if audit_file(run).name == FILE_NAME and audit_file(run).is_file():
        loaded, directory = load_audit(run), audit_file(run).parent
    else:
        loaded, directory = load(run), run_file(run).parent
    if form == Format.TABLE and output is None and sys.stdout.isatty():
        from rich.console import Console

        from minference_green.render.table import show

        show(_document(loaded, directory), Console())
        return
    text = _text(loaded, directory, form)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        _write(output, text)
    except OSError as error:
        raise UsageError(
            f"cannot write the report to {output}: {error.strerror}; choose another --output"
        ) from error


def _write(output: Path, text: str) -> None:
    with output.open("w", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            if output.is_file():
                output.unlink()  # half a report reads like a whole one
            raise


def _document(loaded: "Run | Audit", directory: Path) -> "Document":
    from minference_green.render.audit import audit_document
    from minference_green.render.document import document
    from minference_green.results import Run

    if isinstance(loaded, Run):
        return document(loaded, directory)
    return audit_document(loaded, directory)


def _text(loaded: "Run | Audit", directory: Path, form: Format) -> str:
    from minference_green.render import audit_export, export
    from minference_green.render.audit_page import audit_page
    from minference_green.render.markdown import markdown
    from minference_green.render.table import plain
    from minference_green.results import Run

    match form:
        case Format.TABLE:
            return plain(_document(loaded, directory))
        case Format.MARKDOWN:
            return markdown(_document(loaded, directory))
        case Format.CSV:
            return (
                export.as_csv(loaded) if isinstance(loaded, Run) else audit_export.audit_csv(loaded)
            )
        case Format.JSON:
            if isinstance(loaded, Run):
                return export.as_json(loaded, directory)
            return audit_export.audit_json(loaded, directory)
        case Format.HTML:
            if isinstance(loaded, Run):
                raise UsageError(
                    "a run has no page, only an audit has; use --format table or markdown"
                )
            return audit_page(loaded, directory)
