"""``green-bench check``: run, compare and verdict in one, for CI."""

import json
import os
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from minference_green.cli import options
from minference_green.cli.baseline import DEFAULT_ROOT, Baselines
from minference_green.cli.compare import AllowMismatch, Margin, chosen_margins, write
from minference_green.errors import ExitCode, GreenBenchError

if TYPE_CHECKING:
    from minference_green.check import Checked


class OnInconclusive(StrEnum):
    """What an open verdict means for the exit code."""

    FAIL = "fail"
    WARN = "warn"
    PASS = "pass"  # noqa: S105 - not a password


class _CheckInterruptedError(GreenBenchError):
    exit_code = ExitCode.INTERRUPTED


def check(
    context: typer.Context,
    baseline: Annotated[str, typer.Option(help="Baseline to hold the code to.")] = "main",
    margin: Margin = "",
    max_blocks: Annotated[
        int, typer.Option(help="Last look: 6, 10 or 16 blocks; looks before it come first.")
    ] = 16,
    on_inconclusive: Annotated[
        OnInconclusive, typer.Option(help="fail: exit 3; warn: exit 0 and say so; pass: exit 0.")
    ] = OnInconclusive.FAIL,
    method_option: Annotated[
        list[str] | None, typer.Option(help="METHOD.KEY=VALUE, repeatable, as in run.")
    ] = None,
    allow_mismatch: AllowMismatch = None,
    baselines: Baselines = DEFAULT_ROOT,
    output: Annotated[
        Path, typer.Option(help="Folder of the ledgers; those of a baseline lie in its name.")
    ] = Path("green-bench-runs/checks"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Append to the newest ledger, if there is one.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the verdict as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the verdict as Markdown.")] = None,
    openmetrics: Annotated[
        Path | None, typer.Option(help="Write the verdict as OpenMetrics text.")
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit 0 on any verdict; errors keep their code.")
    ] = False,
    verify_without_gpu: Annotated[
        bool,
        typer.Option(
            "--verify-without-gpu",
            help="Where the baseline's GPU is missing, recompute the baseline instead.",
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what a baseline measured and judge: the gate for CI.

    Looks at 6, 10 and 16 blocks and stops at the first that decides.
    """
    from minference_green.bench import InterruptedRunError
    from minference_green.render.junit import junit_of_error

    if verify_without_gpu and _gpu_is_missing(baseline, baselines):
        _verify_instead(baseline, baselines)
    try:
        checked, warnings = _measure(
            context,
            baseline,
            baselines,
            margin,
            max_blocks,
            method_option or [],
            allow_mismatch or [],
            output,
            resume,
            quiet,
        )
    except InterruptedRunError as stop:
        raise _CheckInterruptedError(
            "interrupted; finished windows are kept. Go on with: "
            f"green-bench check --baseline {baseline} --resume "
            f"--output {quote(str(output))}"
        ) from stop
    except GreenBenchError as error:
        if junit:
            write("--junit", junit, junit_of_error(type(error).__name__, str(error)))
        _annotate_error(error)
        raise
    _tell(checked, warnings, json_output)
    _write_files(checked, baseline, on_inconclusive, junit, markdown, openmetrics)
    sys.exit(int(_exit_code(checked, on_inconclusive, exit_zero)))


def _gpu_is_missing(name: str, root: Path) -> bool:
    from minference_green import baseline
    from minference_green.meters.nvml import gpu_present

    devices = baseline.read(root, name).runs[-1].header.fingerprint.devices
    return any(device.kind == "gpu" for device in devices) and not gpu_present()


def _verify_instead(baseline: str, root: Path) -> NoReturn:
    """Recompute the stored runs, and leave no doubt that nothing was measured."""
    from minference_green.cli.verify import exit_code, lines, verifications
    from minference_green.render.annotations import annotation

    found = list(verifications(f"baseline:{baseline}", root))
    said = (
        f"No GPU here: nothing was measured and there is no verdict. Baseline {baseline} was "
        "recomputed from its raw windows instead."
    )
    typer.echo(said)
    for one in found:
        for line in lines(one):
            typer.echo(line)
    if _on_github():
        typer.echo(annotation("warning", "green-bench", said), err=True)
    sys.exit(int(exit_code(found)))


def _measure(
    context: typer.Context,
    name: str,
    root: Path,
    margin: str,
    max_blocks: int,
    method_option: list[str],
    allow_mismatch: list[str],
    output: Path,
    resume: bool,
    quiet: bool,
) -> tuple["Checked", tuple[str, ...]]:
    from minference_green import baseline
    from minference_green.calibration import refuse_too_fine
    from minference_green.check import check as run_check
    from minference_green.cli.progress import open_progress

    margins = chosen_margins(context, margin)
    stored = baseline.read(root, name)
    warnings = (
        *baseline.warnings(stored, datetime.now(UTC)),
        *refuse_too_fine(root, margins, stored.runs, max_blocks),
    )
    with open_progress(quiet) as progress:
        checked = run_check(
            stored,
            output,
            progress,
            margins=margins,
            max_blocks=max_blocks,
            allow_mismatch=allow_mismatch,
            options=options.parse_options(method_option),
            resume=resume,
            command=sys.argv[1:],
        )
    return checked, warnings


def _tell(checked: "Checked", warnings: tuple[str, ...], json_output: bool) -> None:
    from minference_green.render.annotations import annotations
    from minference_green.render.verdict import as_dict, lines
    from minference_green.results import run_file

    if json_output:
        told = as_dict(checked.verdict) | {
            "run_file": str(run_file(checked.directory)),
            "warnings": warnings,
        }
        typer.echo(json.dumps(told, indent=2, allow_nan=False))
    else:
        for line in lines(checked.verdict):
            typer.echo(line)
    for warning in warnings:
        typer.echo(f"! {warning}", err=True)
    typer.echo(f"Run file: {run_file(checked.directory)}", err=True)
    if _on_github():
        # On stderr, which GitHub reads too: stdout may be JSON.
        for line in annotations(checked.verdict, warnings):
            typer.echo(line, err=True)


def _write_files(
    checked: "Checked",
    baseline: str,
    on_inconclusive: OnInconclusive,
    junit: Path | None,
    markdown: Path | None,
    openmetrics: Path | None,
) -> None:
    from minference_green.render import junit as junit_xml
    from minference_green.render import openmetrics as metrics
    from minference_green.render.document import document
    from minference_green.render.markdown import markdown as report
    from minference_green.render.verdict import markdown as verdict_markdown

    if junit:
        open_is_error = on_inconclusive is OnInconclusive.FAIL
        write("--junit", junit, junit_xml.junit(checked.verdict, open_is_error=open_is_error))
    if markdown:
        text = verdict_markdown(checked.verdict) + "\n" + report(document(checked.run))
        write("--markdown", markdown, text)
    if openmetrics:
        write("--openmetrics", openmetrics, metrics.of_verdict(checked.verdict, baseline))


def _exit_code(checked: "Checked", on_inconclusive: OnInconclusive, exit_zero: bool) -> ExitCode:
    code = checked.verdict.exit_code
    accepted = code is ExitCode.INCONCLUSIVE and on_inconclusive is not OnInconclusive.FAIL
    if accepted and on_inconclusive is OnInconclusive.WARN:
        typer.echo("! The verdict is open and was let through (--on-inconclusive warn).", err=True)
    return ExitCode.PASS if exit_zero or accepted else code


def _annotate_error(error: GreenBenchError) -> None:
    from minference_green.render.annotations import annotation

    if _on_github():
        typer.echo(annotation("error", "green-bench", str(error)), err=True)


def _on_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
