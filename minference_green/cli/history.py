"""``green-bench history``: stored runs over time."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.cli.baseline import DEFAULT_ROOT, Baselines
from minference_green.cli.compare import write
from minference_green.errors import UsageError

if TYPE_CHECKING:
    from minference_green.results import Run


class Format(StrEnum):
    """What a history is written as."""

    TABLE = "table"
    CSV = "csv"
    OPENMETRICS = "openmetrics"


def history(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Runs, folders of runs, or baseline:NAME. Default: all baselines."),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", "-f", help="What to write the history as.")
    ] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write to instead of stdout.")
    ] = None,
    baselines: Baselines = DEFAULT_ROOT,
) -> None:
    """The trend over stored runs, oldest first."""
    from minference_green import baseline
    from minference_green.render.export import as_csv
    from minference_green.render.history import document
    from minference_green.render.openmetrics import of_runs
    from minference_green.render.table import plain

    named = sources or [f"{baseline.PREFIX}{name}" for name in baseline.names(baselines)]
    # A run in two baselines, or in a folder and a baseline, is one run.
    known = {run.header.run_id: run for source in named for run in _runs(source, baselines)}
    runs = sorted(known.values(), key=lambda run: run.header.created_at)
    if not runs:
        raise UsageError(
            f"no stored runs: no baseline in {baselines}; name runs, or a folder that holds some"
        )
    match form:
        case Format.TABLE:
            text = plain(document(runs))
        case Format.CSV:
            text = as_csv(*runs)
        case Format.OPENMETRICS:
            text = of_runs(runs)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write("--output", output, text)


def _runs(source: str, root: Path) -> Iterator["Run"]:
    from minference_green.baseline import runs_of
    from minference_green.results import FILE_NAME, load

    path = Path(source)
    if path.is_dir() and not (path / FILE_NAME).exists():
        return (load(file) for file in sorted(path.rglob(FILE_NAME)))
    return iter(runs_of(source, root))
