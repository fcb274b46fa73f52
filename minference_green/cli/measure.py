"""``green-bench measure -- CMD``: what one run of any command costs on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.cli import grid, options
from minference_green.errors import MeasurementError, UsageError

if TYPE_CHECKING:
    from minference_green.command import CommandCost


def measure(
    command: Annotated[list[str], typer.Argument(help="The command, after -- .")],
    meter: options.Meter = "auto",
    allow_shared: options.AllowShared = False,
    country: grid.Country = "",
    region: grid.Region = "",
    cloud: grid.Cloud = "",
    intensity: grid.Intensity = None,
    intensity_source: grid.IntensitySource = "",
    pue: grid.Pue = 1.0,
    embodied: grid.Embodied = None,
    embodied_source: grid.EmbodiedSource = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write the record to as JSON.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON instead of lines.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing of our own.")] = False,
) -> None:
    """Joules per device, grams, peak power and seconds of any command; its exit code is ours.

    Standard output is the command's; what we say goes to standard error.
    """
    from minference_green.carbon import terms
    from minference_green.command import measure_command
    from minference_green.meters.choose import open_meters

    place = grid.located(
        country=country,
        region=region,
        cloud=cloud,
        intensity=intensity,
        intensity_source=intensity_source,
        pue=pue,
        embodied=embodied,
        embodied_source=embodied_source,
    )
    if output is not None:
        _write(output, "")
    meters = open_meters(meter, gpu_uuids=None, allow_shared=allow_shared)
    try:
        gpus = sum(d.kind == "gpu" for m in meters for d in m.devices)
        carbon = terms(**place.model_dump(), gpus=gpus)
        cost = measure_command(command, meters, carbon)
    finally:
        for source in meters:
            source.close()
    record = json.dumps(_record(cost), indent=1) + "\n"
    if output is not None:
        _write(output, record)
    if not quiet:
        typer.echo(record if json_output else _lines(cost), nl=False, err=True)
    if cost.exit_code == 0 and not cost.valid:
        raise MeasurementError(f"the command ran, its energy is not known: {cost.doubts[0]}")
    raise typer.Exit(cost.exit_code)


def _record(cost: "CommandCost") -> dict[str, object]:
    return {
        **cost.model_dump(mode="json"),
        "joules": cost.joules,
        "operational_grams": cost.operational_grams,
        "embodied_grams": cost.embodied_grams,
    }


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write the record to {file}: {error.strerror}; choose another --output"
        ) from error


def _lines(cost: "CommandCost") -> str:
    from minference_green.command import peak_watts
    from minference_green.render.numbers import significant

    ended = "" if cost.exit_code == 0 else f", exit code {cost.exit_code}"
    lines = [f"green-bench: {cost.seconds:.2f} s{ended}"]
    for reading in cost.readings:
        peak = peak_watts(reading)
        lines.append(
            f"  {reading.device} ({reading.scope}): {significant(reading.joules, 4)} J "
            f"by {reading.obtained} ({reading.source})"
            + (f", peak {peak:.0f} W" if peak is not None else "")
            + ("" if reading.headline else ", beside the headline")
            + (f"; {reading.reason}" if reading.reason else "")
        )
    factor = cost.carbon.factor
    assumed = ", assumed: no location given" if factor.assumed else ""
    lines.append(
        f"  {significant(cost.operational_grams, 3)} g CO2e operational at "
        f"{factor.g_per_kwh:g} g/kWh ({factor.location}{assumed}), PUE {cost.carbon.pue:g}; "
        f"{significant(cost.embodied_grams, 3)} g embodied ({cost.carbon.embodied_source})"
    )
    lines += [f"  ! {doubt}" for doubt in cost.doubts]
    return "\n".join(lines) + "\n"
