"""``green-bench report``: a run file as a table, Markdown, CSV or JSON."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.errors import UsageError

if TYPE_CHECKING:
    from minference_green.results import Run


class Format(StrEnum):
    """What a report is written as."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"


def report(
    run: Annotated[Path, typer.Argument(help="A run: its directory or its run.jsonl.")],
    form: Annotated[
        Format, typer.Option("--format", "-f", help="What to write the report as.")
    ] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write to instead of stdout.")
    ] = None,
) -> None:
    """Recompute every figure of a run from its file and print them; needs no GPU.

    Raises ``UsageError`` for a run that cannot be read or an output that cannot be written.
    """
    from minference_green.results import load, run_file

    loaded, directory = load(run), run_file(run).parent
    if form == Format.TABLE and output is None and sys.stdout.isatty():
        from rich.console import Console

        from minference_green.render.document import document
        from minference_green.render.table import show

        show(document(loaded, directory), Console())
        return
    text = _text(loaded, directory, form)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write the report to {output}: {error.strerror}; choose another --output"
        ) from error


def _text(run: "Run", directory: Path, form: Format) -> str:
    from minference_green.render import export
    from minference_green.render.document import document
    from minference_green.render.markdown import markdown
    from minference_green.render.table import plain

    match form:
        case Format.TABLE:
            return plain(document(run, directory))
        case Format.MARKDOWN:
            return markdown(document(run, directory))
        case Format.CSV:
            return export.as_csv(run)
        case Format.JSON:
            return export.as_json(run, directory)
