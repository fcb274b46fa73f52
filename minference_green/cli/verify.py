"""``green-bench verify``: every figure again from the raw numbers, without a GPU."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.cli.baseline import DEFAULT_ROOT, Baselines
from minference_green.errors import ExitCode

if TYPE_CHECKING:
    from minference_green.verify import Verification


def verify(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Runs or audits, or baseline:NAME for all its runs."),
    ],
    baselines: Baselines = DEFAULT_ROOT,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Recompute runs and audits from their raw numbers: 0 as on file, 5 not, 3 not yet sealed.

    A file changed after it was sealed is refused as a whole.
    """
    found = [one for target in targets for one in verifications(target, baselines)]
    if json_output:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        for one in found:
            for line in lines(one):
                typer.echo(line)
    sys.exit(int(exit_code(found)))


def verifications(target: str, root: Path) -> Iterator["Verification"]:
    """What one argument names, recomputed."""
    from minference_green.baseline import PREFIX, runs_of
    from minference_green.ledger import FILE_NAME, audit_file, load_audit
    from minference_green.results import run_file
    from minference_green.verify import verify as recompute
    from minference_green.verify import verify_audit

    file = audit_file(Path(target))
    if file.name == FILE_NAME and file.is_file():
        return iter((verify_audit(load_audit(file), file.parent),))
    directory = None if target.startswith(PREFIX) else run_file(Path(target)).parent
    return (recompute(run, directory) for run in runs_of(target, root))


def lines(one: "Verification") -> Iterator[str]:
    """A verification in words."""
    seal = "sealed and unchanged" if one.sealed else "not sealed, for it is not finished"
    beside = f", {', '.join(one.reports)} as made from it" if one.reports else ""
    word = "WRONG" if one.problems else "OK" if one.sealed else "OPEN"
    counted = (
        f"{one.windows} windows"
        if one.answers is None
        else f"{one.answers} answers, {one.windows} stretches"
    )
    yield (
        f"{word} {one.run_id}: {seal}; {counted}, {one.readings} readings "
        f"recomputed{beside if not one.problems else ''}"
    )
    for problem in one.problems:
        yield f"  {problem}"


def exit_code(found: list["Verification"]) -> ExitCode:
    """5 if anything is not as on file, 3 if a run has no seal yet, else 0."""
    if any(one.problems for one in found):
        return ExitCode.INVALID_MEASUREMENT
    return ExitCode.PASS if all(one.sealed for one in found) else ExitCode.INCONCLUSIVE
