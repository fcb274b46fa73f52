"""``green-bench calibrate``: the noise floor, from dense against dense."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minference_green.cli import options
from minference_green.cli.baseline import DEFAULT_ROOT, Baselines


def calibrate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="As in run; the model the gate is for is best.")
    ] = "embedded",
    context: Annotated[
        str, typer.Option(help="Context lengths in tokens, such as 8k. Default: by device.")
    ] = "",
    blocks: Annotated[int, typer.Option(help="Process starts; the floor is their spread.")] = 10,
    window: Annotated[str, typer.Option(help="Seconds each window lasts at least.")] = "",
    warmup: Annotated[str, typer.Option(help="Most seconds to warm up each block.")] = "",
    device: options.Device = "auto",
    meter: options.Meter = "auto",
    baselines: Baselines = DEFAULT_ROOT,
    output: Annotated[Path, typer.Option(help="Directory for runs.")] = Path("green-bench-runs"),
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure dense against dense and store what that shows as the baseline `calibration`.

    From then on compare and check refuse a margin below what this machine can detect.
    """
    from minference_green import baseline, bench, calibration
    from minference_green.cli.progress import open_progress
    from minference_green.results import load
    from minference_green.verdict import LOOKS

    request = bench.Request(
        model=model,
        methods=("dense", "dense-again"),
        context_lengths=options.parse_contexts(context),
        blocks=options.positive("--blocks", blocks),
        window_seconds=options.parse_seconds("--window", window),
        warmup_seconds=options.parse_seconds("--warmup", warmup),
        device=device,
        meter=meter,
        command=tuple(sys.argv[1:]),
    )
    with open_progress(quiet) as progress:
        directory = bench.run(request, output, progress)
    saved = baseline.save(baselines, calibration.NAME, directory, replace=True)
    floor = calibration.noise_floor(load(directory))
    if json_output:
        detectable = {
            quantity: {look: floor.detectable(quantity, look, look) for look in LOOKS}
            for quantity in ("joules", "seconds")
        }
        typer.echo(json.dumps(asdict(floor) | {"detectable": detectable}, indent=2))
    else:
        for line in calibration.lines(floor):
            typer.echo(line)
    typer.echo(f"Stored as {saved.directory}", err=True)
