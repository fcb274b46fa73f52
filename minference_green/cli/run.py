"""``green-bench run``: measure dense against sparse prefill."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from minference_green.cli import grid, options
from minference_green.errors import MeasurementError, UsageError


def run(
    context_of_command: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="embedded, planted:SHAPE, a local directory, or a hub id (safetensors).",
        ),
    ] = "embedded",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; the first is the reference. dense, minference, auto, "
            "spread, probe, vertical-slash, a-shape, block-sparse, or package.module:NAME of "
            "your own."
        ),
    ] = "dense,minference",
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD.KEY=VALUE, repeatable: vertical-slash.vertical_size, .slash_size; "
            "a-shape.n_init, .n_local; block-sparse.top_k; probe.top_k, .rows; "
            "minference.pattern_file; dense.backend."
        ),
    ] = None,
    context: Annotated[
        str, typer.Option(help="Context lengths in tokens, such as 1k,8k,32k. Default: by device.")
    ] = "",
    blocks: Annotated[
        int | None, typer.Option(help="Process starts; the unit of the intervals.")
    ] = None,
    window: Annotated[
        str, typer.Option(help="Seconds each window lasts at least, such as 2s or 10s.")
    ] = "",
    warmup: Annotated[
        str, typer.Option(help="Most seconds to warm up each block, such as 20s.")
    ] = "",
    decode: Annotated[
        int,
        typer.Option(
            help="Also generate so many tokens per prompt, measured in windows of their own."
        ),
    ] = 0,
    breakdown: Annotated[
        bool,
        typer.Option(
            "--breakdown",
            help="Also replay estimate, index, attention and rest alone, in the first block.",
        ),
    ] = False,
    batch: Annotated[int, typer.Option(help="Prompts per prefill.")] = 1,
    dtype: options.Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Seed of prompt and planted weights.")] = 0,
    prompt: Annotated[
        Path | None, typer.Option(help="Text file to use as the prompt instead of tokens.")
    ] = None,
    device: options.Device = "auto",
    meter: options.Meter = "auto",
    no_energy: options.NoEnergy = False,
    allow_shared: options.AllowShared = False,
    allow_longer: options.AllowLonger = False,
    rest: Annotated[
        str,
        typer.Option(
            help="Everything but attention, in every arm: stock, or fused (CUDA; norms, rotary "
            "embedding and MLP gates in one pass each)."
        ),
    ] = "stock",
    country: grid.Country = "",
    region: grid.Region = "",
    cloud: grid.Cloud = "",
    intensity: grid.Intensity = None,
    intensity_source: grid.IntensitySource = "",
    pue: grid.Pue = 1.0,
    embodied: grid.Embodied = None,
    embodied_source: grid.EmbodiedSource = "",
    output: Annotated[
        Path, typer.Option(help="Directory for runs; each gets one of its own inside.")
    ] = Path("green-bench-runs"),
    resume: Annotated[
        str, typer.Option(help="ID of an interrupted run under --output to go on with.")
    ] = "",
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the run as JSON instead of a table.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure arms, interleaved; no arguments: the embedded model, dense against minference."""
    from minference_green import bench
    from minference_green.cli.progress import open_progress

    if resume:
        options.refuse_beside_resume(context_of_command)
        with open_progress(quiet) as progress:
            finish(lambda: bench.resume(output / resume, progress), json_output)
        return
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
    request = bench.Request(
        model=model,
        methods=options.parse_methods(methods),
        options=options.parse_options(method_option or []),
        context_lengths=options.parse_contexts(context),
        batch=options.positive("--batch", batch),
        dtype=options.parse_dtype(dtype),
        seed=seed,
        **prompt_fields(prompt),
        blocks=None if blocks is None else options.positive("--blocks", blocks),
        window_seconds=options.parse_seconds("--window", window),
        warmup_seconds=options.parse_seconds("--warmup", warmup),
        decode_tokens=parse_decode(decode),
        breakdown=breakdown,
        grid=place,
        device=device,
        meter="none" if no_energy else meter,
        allow_shared=allow_shared,
        allow_longer=allow_longer,
        rest=parse_rest(rest),
        command=tuple(sys.argv[1:]),
    )
    with open_progress(quiet) as progress:
        finish(lambda: bench.run(request, output, progress), json_output)


def finish(measure: Callable[[], Path], json_output: bool) -> None:
    """Measure, then show what is on disk; also what an interrupted run had finished."""
    from minference_green.bench import InterruptedRunError
    from minference_green.cli.report import Format, report
    from minference_green.results import load, run_file
    from minference_green.stats import invalid_share
    from minference_green.validity import MAX_INVALID_SHARE

    form = Format.JSON if json_output else Format.TABLE
    try:
        directory = measure()
    except InterruptedRunError as stop:
        if stop.has_windows:
            report(stop.directory, form)
        raise
    report(directory, form)
    typer.echo(f"Run file: {run_file(directory)}", err=True)
    invalid = invalid_share(load(directory))
    if invalid > MAX_INVALID_SHARE:
        raise MeasurementError(
            f"{invalid:.0%} of the windows are invalid (see the reasons above), more than "
            f"{MAX_INVALID_SHARE:.0%}; the figures cannot be trusted"
        )


def parse_rest(text: str) -> Literal["stock", "fused"]:
    """How everything but attention runs."""
    match text:
        case "stock" | "fused":
            return text
    raise UsageError(f"--rest {text!r} is not known; use stock or fused")


def parse_decode(tokens: int) -> int:
    """Tokens to generate: none, or two or more, since prefill produces the first."""
    if tokens == 0 or tokens >= 2:
        return tokens
    raise UsageError(f"--decode {tokens} must be 2 or more tokens; prefill produces the first")


def prompt_fields(path: Path | None) -> dict[str, str]:
    """The request's fields for a prompt file, its content pinned by hash.

    Raises as :func:`minference_green.auditing.plan.read_text` does.
    """
    if path is None:
        return {}
    from minference_green.auditing.plan import read_text

    digest = hashlib.sha256(read_text(path, "--prompt").encode()).hexdigest()
    return {"prompt": str(path.resolve()), "prompt_sha256": digest}
