"""``green-bench compare``: a run against stored ones."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from minference_green.cli.baseline import DEFAULT_ROOT, Baselines
from minference_green.errors import UsageError


class FailOn(StrEnum):
    """What makes ``compare`` exit with the verdict's own code."""

    NEVER = "never"
    REGRESSION = "regression"


AllowMismatch = Annotated[
    list[str] | None,
    typer.Option(
        help="Compare across this difference of ground, repeatable: device, power_limit, dtype..."
    ),
]
Margin = Annotated[
    str, typer.Option(help="Change of joules per token that counts, such as 5%. Default: 5%.")
]


def compare(
    context: typer.Context,
    stored: Annotated[
        str, typer.Argument(metavar="A", help="Stored: a run, or baseline:NAME for all its runs.")
    ],
    now: Annotated[
        str, typer.Argument(metavar="B", help="Judged: a run, or baseline:NAME for its newest.")
    ],
    margin: Margin = "",
    allow_mismatch: AllowMismatch = None,
    fail_on: Annotated[
        FailOn, typer.Option(help="regression: exit 1 on a proven regression.")
    ] = FailOn.NEVER,
    baselines: Baselines = DEFAULT_ROOT,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Judge run B against run A; exit 0 whatever comes out, unless --fail-on regression."""
    from minference_green import verdict
    from minference_green.baseline import runs_of
    from minference_green.calibration import refuse_too_fine
    from minference_green.render.verdict import as_dict, lines

    then, newest = runs_of(stored, baselines), runs_of(now, baselines)[-1]
    margins = chosen_margins(context, margin)
    warnings = refuse_too_fine(baselines, margins, then, verdict.LOOKS[-1])
    found = verdict.compare(then, newest, margin=margins, allow_mismatch=allow_mismatch or ())
    if json_output:
        typer.echo(json.dumps(as_dict(found), indent=2, allow_nan=False))
    else:
        for line in lines(found):
            typer.echo(line)
    for warning in warnings:
        typer.echo(f"! {warning}", err=True)
    if fail_on is FailOn.REGRESSION and found.outcome is verdict.Outcome.FAIL:
        sys.exit(int(found.exit_code))


def chosen_margins(context: typer.Context, margin: str) -> dict[str, float]:
    """Margins by criterion from the settings file; ``--margin`` wins for those of joules."""
    from minference_green.config import parse_margin
    from minference_green.verdict import check_margins

    criteria: dict[str, float] = dict((context.obj or {}).get("criteria", {}))
    if margin or not criteria:
        joules = check_margins(parse_margin("--margin", margin or "5%"))
        # Of a file's criteria the flag changes margins and adds none but the one it is about.
        criteria |= {n: m for n, m in joules.items() if n in ("energy_ratio", *criteria)}
        if criteria.keys() == {"energy_ratio"}:
            criteria |= {str(n): m for n, m in joules.items()}
    return {str(name): value for name, value in check_margins(criteria).items()}


def write(option: str, path: Path, text: str) -> None:
    """Write a file the user named; raises ``UsageError`` if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written: {error.strerror}") from error
