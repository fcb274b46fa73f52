"""The ``green-bench`` command. Verbs import what they need when they run."""

import os
import sys
import traceback
from typing import Annotated

import typer

import minference_green
from minference_green.cli import (
    audit,
    baseline,
    calibrate,
    carbon,
    check,
    compare,
    doctor,
    history,
    init,
    measure,
    report,
    run,
    settings,
    verify,
)
from minference_green.errors import ExitCode, GreenBenchError

EXIT_CODES = """\
Exit codes: 0 pass or improved; 1 proven regression; 2 usage or configuration; 3 inconclusive;
4 not comparable, or a required baseline is missing; 5 measurement invalid; 130 interrupted;
141 whoever read the output has stopped.

Add --debug to any command to see the traceback of an error.
"""

app = typer.Typer(
    name="green-bench",
    help="Dense versus sparse prefill in joules, gCO2e and seconds per million tokens.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("audit")(audit.audit)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("measure", context_settings={"allow_interspersed_args": False})(measure.measure)
app.command("compare")(compare.compare)
app.command("check")(check.check)
app.command("calibrate")(calibrate.calibrate)
app.command("history")(history.history)
app.command("verify")(verify.verify)
app.command("init")(init.init)
app.add_typer(baseline.app, name="baseline")
app.add_typer(carbon.app, name="carbon")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"green-bench {minference_green.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Dense versus sparse prefill in joules, gCO2e and seconds per million tokens."""
    settings.apply(context)


def main() -> None:
    """Run one command; every error ends as one sentence and an exit code."""
    arguments, debug = _take_debug(sys.argv[1:])
    try:
        app(args=arguments, prog_name="green-bench")
    except GreenBenchError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"green-bench: {error}", err=True)
        sys.exit(int(error.exit_code))
    except SystemExit as stop:
        # Typer ends a command whose reader has gone with 1, which would be a regression.
        if isinstance(stop.__context__, BrokenPipeError):
            sys.exit(int(ExitCode.UNREAD))
        raise
    except OSError as error:
        if debug or error.filename is not None:  # a file's error has its own sentence
            raise
        # What is still in the buffer would be refused again, and give another exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"green-bench: cannot write the output: {error.strerror}", err=True)
        sys.exit(int(ExitCode.USAGE))


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Split ``--debug`` off our own arguments; those after ``--`` are another program's."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [a for a in arguments[:end] if a != "--debug"]
    return ours + arguments[end:], len(ours) < end


if __name__ == "__main__":
    main()
