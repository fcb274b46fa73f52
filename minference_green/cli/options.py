"""Options that several commands share: what each is called, and what its text means."""

from typing import Annotated

import typer

from minference_green.errors import UsageError

DTYPES = ("auto", "bfloat16", "float16", "float32")

Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32 (float32: CPU only).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Meter = Annotated[str, typer.Option(help="auto, nvml, rapl, modelled, or simulated:FILE.")]
NoEnergy = Annotated[
    bool, typer.Option("--no-energy", help="Go on without joules; they are null then.")
]
AllowShared = Annotated[
    bool, typer.Option("--allow-shared", help="Measure a MIG slice or a shared GPU, marked.")
]
AllowLonger = Annotated[
    bool, typer.Option("--allow-longer", help="Go beyond the model's own context limit.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]


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


def positive(option: str, number: int) -> int:
    """A count of at least one."""
    if number < 1:
        raise UsageError(f"{option} {number} must be 1 or more")
    return number


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
