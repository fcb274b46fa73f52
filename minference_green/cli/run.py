"""``green-bench run``: measure dense against sparse prefill."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from minference_green.cli import grid
from minference_green.errors import MeasurementError, UsageError

DTYPES = ("auto", "bfloat16", "float16", "float32")


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
    dtype: Annotated[
        str, typer.Option(help="auto, bfloat16, float16 or float32 (float32: CPU only).")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of prompt and planted weights.")] = 0,
    prompt: Annotated[
        Path | None, typer.Option(help="Text file to use as the prompt instead of tokens.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    meter: Annotated[
        str,
        typer.Option(help="auto, nvml, rapl, modelled, or simulated:FILE."),
    ] = "auto",
    no_energy: Annotated[
        bool, typer.Option("--no-energy", help="Go on without joules; they are null then.")
    ] = False,
    allow_shared: Annotated[
        bool, typer.Option("--allow-shared", help="Measure a MIG slice or a shared GPU, marked.")
    ] = False,
    allow_longer: Annotated[
        bool, typer.Option("--allow-longer", help="Go beyond the model's own context limit.")
    ] = False,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Measure arms, interleaved; no arguments: the embedded model, dense against minference."""
    from minference_green import bench
    from minference_green.cli.progress import open_progress

    if resume:
        refuse_beside_resume(context_of_command)
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
        methods=parse_methods(methods),
        options=parse_options(method_option or []),
        context_lengths=parse_contexts(context),
        batch=positive("--batch", batch),
        dtype=parse_dtype(dtype),
        seed=seed,
        **prompt_fields(prompt),
        blocks=None if blocks is None else positive("--blocks", blocks),
        window_seconds=parse_seconds("--window", window),
        warmup_seconds=parse_seconds("--warmup", warmup),
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


def refuse_beside_resume(context: typer.Context) -> None:
    """A resumed run takes its experiment from its file; another request would be ignored."""
    allowed = {"resume", "output", "json_output", "quiet"}
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if given and given.name == "COMMANDLINE" and parameter.name not in allowed:
            raise UsageError(
                f"{parameter.opts[0]} cannot be given with --resume, which repeats the request "
                "stored in the run; leave it out, or start a new run"
            )


def parse_methods(text: str) -> tuple[str, ...]:
    """Method names from a comma-separated list; each may stand once."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UsageError(f"--methods {text!r} names no method; write for example dense,minference")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--methods names {name} twice; an arm is known by its name")
    return names


def parse_options(texts: list[str]) -> dict[str, dict[str, str]]:
    """``METHOD.KEY=VALUE`` items as method to key to value."""
    options: dict[str, dict[str, str]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        # A method of the user's own has dots in its name; the key is what follows the last.
        method, dot, key = target.rpartition(".")
        if not (equals and dot and method and key):
            raise UsageError(
                f"--method-option {text!r} is not METHOD.KEY=VALUE; "
                "write for example vertical-slash.slash_size=800"
            )
        if key in options.setdefault(method, {}):
            raise UsageError(f"--method-option {target} is given twice; give it once")
        options[method][key] = value
    return options


def parse_contexts(text: str) -> tuple[int, ...]:
    """Context lengths from a comma-separated list; empty means the device's default."""
    from minference_green.workload import parse_length

    return tuple(parse_length(part.strip()) for part in text.split(",") if part.strip())


def parse_dtype(text: str) -> str:
    """One of the dtypes a model can run in."""
    if text not in DTYPES:
        raise UsageError(f"--dtype {text!r} is not known; use one of {', '.join(DTYPES)}")
    return text


def parse_rest(text: str) -> Literal["stock", "fused"]:
    """How everything but attention runs."""
    match text:
        case "stock" | "fused":
            return text
    raise UsageError(f"--rest {text!r} is not known; use stock or fused")


def positive(option: str, number: int) -> int:
    """A count of at least one."""
    if number < 1:
        raise UsageError(f"{option} {number} must be 1 or more")
    return number


def parse_decode(tokens: int) -> int:
    """Tokens to generate: none, or two or more, since prefill produces the first."""
    if tokens == 0 or tokens >= 2:
        return tokens
    raise UsageError(f"--decode {tokens} must be 2 or more tokens; prefill produces the first")


def parse_seconds(option: str, text: str) -> float | None:
    """Seconds from ``10`` or ``10s``; ``None`` from an empty string."""
    if not text:
        return None
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a time; write seconds, such as 10s") from error
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{option} {text!r} must be more than 0 seconds")
    return seconds


def prompt_fields(path: Path | None) -> dict[str, str]:
    """The request's fields for a prompt file, its content pinned by hash."""
    if path is None:
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--prompt {path}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    return {"prompt": str(path.resolve()), "prompt_sha256": digest}
