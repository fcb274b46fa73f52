"""``green-bench doctor``: whether this machine can measure."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.cli import options
from minference_green.errors import MeasurementError, UsageError

if TYPE_CHECKING:
    from minference_green.diagnosis import Diagnosis


def doctor(
    full: Annotated[
        bool,
        typer.Option("--full", help="Add repeatability and observer effect; some 4 minutes a GPU."),
    ] = False,
    meter: Annotated[
        str, typer.Option(help="auto, or simulated:FILE to examine a simulated GPU.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write the findings to as JSON.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON instead of lines.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Look at energy counter, power, clocks and room on this machine, with a load of its own.

    A check that fails marks later runs on that GPU as disputed. Exit code 5 if one does.
    """
    from minference_green import doctor as doctor_
    from minference_green.diagnosis import cache_directory, store

    if meter != "auto" and not meter.startswith("simulated:"):
        raise UsageError(f"--meter {meter} cannot be examined; choose auto or simulated:FILE")

    def say(what: str) -> None:
        if not quiet:
            typer.echo(f"looking at {what}", err=True)

    found = [doctor_.examine_machine(Path("green-bench-runs"))]
    with doctor_.patients(meter, _uuids(meter)) as patients:
        for patient in patients:
            say(f"{patient.gpu.info.name} {patient.gpu.info.uuid}")
            diagnosis = doctor_.examine(patient, full=full, say=say)
            found.append(diagnosis)
            # A device that does not exist must not cast doubt on a later one of its name.
            if not patient.gpu.info.simulated:
                store(diagnosis, cache_directory(os.environ))
    text = json.dumps([_as_json(d) for d in found], indent=1) + "\n"
    if output is not None:
        _write(output, text)
    typer.echo(text if json_output else _lines(found), nl=False)
    if failing := [f"{d.device}: {', '.join(d.failing)}" for d in found if d.failing]:
        raise MeasurementError(f"checks failed on {'; '.join(failing)}; see the advice above")


def _uuids(meter: str) -> list[str]:
    from minference_green.meters.nvml import gpu_present, visible_gpus

    return visible_gpus(os.environ) if meter == "auto" and gpu_present() else []


def _as_json(diagnosis: "Diagnosis") -> dict[str, object]:
    return {**diagnosis.model_dump(mode="json"), "outcome": diagnosis.outcome}


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write the findings to {file}: {error.strerror}; choose another --output"
        ) from error


def _lines(found: list["Diagnosis"]) -> str:
    lines = []
    for diagnosis in found:
        lines.append(f"{diagnosis.name} ({diagnosis.device}): {diagnosis.outcome}")
        for check in diagnosis.checks:
            lines.append(f"  {check.outcome:<4}  {check.name}: {check.finding}")
            if check.advice:
                lines.append(f"        -> {check.advice}")
    if len(found) == 1:
        lines.append(
            "No GPU here: joules of a run are the host's own, "
            "and only times, densities and losses carry over to a GPU."
        )
    return "\n".join(lines) + "\n"
