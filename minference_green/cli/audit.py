"""``green-bench audit``: what sparse prefill loses, and of which kinds of information."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from minference_green.cli import options
from minference_green.errors import MeasurementError, UsageError

METHODS_HELP = (
    "Comma-separated; dense is added as the reference. minference, spread, probe, "
    "vertical-slash, a-shape, block-sparse, the yardsticks oracle, oracle-keys and random, or "
    "package.module:NAME of your own."
)


def audit(
    context_of_command: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="embedded, a local directory, or a hub id (safetensors)."
        ),
    ] = "embedded",
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = "dense,minference",
    method_option: Annotated[
        list[str] | None,
        typer.Option(help="METHOD.KEY=VALUE, repeatable, as for green-bench run."),
    ] = None,
    context: Annotated[
        str, typer.Option(help="Context lengths in tokens, such as 16k,64k. Default: by device.")
    ] = "",
    haystacks: Annotated[
        int | None, typer.Option(help="Texts to ask about. Default: 120 on a GPU, 6 if quick.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Kinds of information to ask about, such as hex,date. Default: all.")
    ] = "",
    filler: Annotated[
        str, typer.Option(help="Text between the facts: prose, records, code, or a UTF-8 file.")
    ] = "prose",
    quick: Annotated[
        bool, typer.Option("--quick", help="A first answer within a minute; the default on a CPU.")
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="600 haystacks, which can show small losses.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A document of your own (UTF-8) to read instead: what each kind of information in "
            "it loses. Nothing is asked, no labels are needed."
        ),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Also run each sparse method at 1/4, 1/2 and 2 times its budgets, and say which "
            "keeps 99 % of the answers at the least energy.",
        ),
    ] = False,
    margin: Annotated[
        float, typer.Option(help="Percentage points of answers whose loss would matter.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of texts and facts.")] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    meter: options.Meter = "auto",
    no_energy: options.NoEnergy = False,
    allow_shared: options.AllowShared = False,
    allow_longer: options.AllowLonger = False,
    output: Annotated[
        Path, typer.Option(help="Directory for audits; each gets one of its own inside.")
    ] = Path("green-bench-runs"),
    resume: Annotated[
        Path | None, typer.Option(help="Directory of an interrupted audit to go on with.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the audit as JSON instead of tables.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask a model about known facts after dense and after sparse prefill: what is lost, of what."""
    from minference_green.auditing import audit as job
    from minference_green.auditing.plan import AuditRequest, known_kinds, read_text
    from minference_green.cli.progress import open_audit_progress

    if resume is not None:
        options.refuse_beside_resume(context_of_command)
        directory = resume
        with open_audit_progress(quiet) as progress:
            _finish(lambda: job.resume(directory, progress), json_output)
        return
    filler_name, filler_sha256 = _filler(filler)
    if text is not None:
        _refuse_beside_text(context_of_command)
    request = AuditRequest(
        model=model,
        methods=options.parse_methods(methods),
        options=options.parse_options(method_option or []),
        context_lengths=options.parse_contexts(context),
        haystacks=haystacks,
        kinds=known_kinds([k.strip() for k in kinds.split(",")]) if kinds else (),
        filler=filler_name,
        filler_sha256=filler_sha256,
        text=None if text is None else str(text.resolve()),
        text_sha256=None if text is None else _sha256(read_text(text, "--text")),
        quick=quick,
        thorough=thorough,
        frontier=frontier,
        margin_points=margin,
        seed=seed,
        dtype=options.parse_dtype(dtype),
        device=device,
        meter="none" if no_energy else meter,
        allow_shared=allow_shared,
        allow_longer=allow_longer,
        command=tuple(sys.argv[1:]),
    )
    with open_audit_progress(quiet) as progress:
        _finish(lambda: job.audit(request, output, progress), json_output)


def _refuse_beside_text(context: typer.Context) -> None:
    """A text of the user's own has no haystacks; what is said of them would be ignored."""
    for name in ("haystacks", "kinds", "filler", "quick", "thorough", "margin"):
        given = context.get_parameter_source(name)
        if given and given.name == "COMMANDLINE":
            raise UsageError(f"--{name} is about haystacks and --text reads none; leave one out")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _filler(name: str) -> tuple[str, str | None]:
    """A filler and its hash; a file is read now and its content pinned."""
    from minference_green.auditing.plan import LEAST_FILLER_BYTES, read_text
    from minference_green.corpus.filler import FILLERS

    if name in FILLERS:
        return name, None
    path = Path(name)
    if not path.exists() and path.suffix == "":
        raise UsageError(
            f"--filler {name!r} is neither a file nor one of {', '.join(FILLERS)}; "
            "name a UTF-8 text file or one of these"
        )
    text = read_text(path, "--filler")
    if len(text.encode()) < LEAST_FILLER_BYTES:
        raise UsageError(
            f"--filler {path} holds {len(text.encode())} bytes, at least {LEAST_FILLER_BYTES} are "
            "needed: a shorter text repeats itself all over the prompt"
        )
    return str(path.resolve()), _sha256(text)


def _finish(ask: Callable[[], Path], json_output: bool) -> None:
    """Audit, then show what is on disk; also what an interrupted audit had answered."""
    from minference_green.auditing.audit import InterruptedAuditError
    from minference_green.cli.report import Format, report
    from minference_green.ledger import audit_file, load_audit
    from minference_green.results import Skip

    form = Format.JSON if json_output else Format.TABLE
    try:
        directory = ask()
    except InterruptedAuditError as stop:
        if stop.has_answers:
            report(stop.directory, form)
        raise
    report(directory, form)
    page = directory / "report.html"
    report(directory, Format.HTML, page)
    typer.echo(f"Audit file: {audit_file(directory)}", err=True)
    typer.echo(f"Page: {page}", err=True)
    skips = list(load_audit(directory).of(Skip))
    if skips:
        raise MeasurementError(
            f"{len(skips)} arm{'' if len(skips) == 1 else 's'} could not be audited, the first "
            f"being {skips[0].method}: {skips[0].reason}"
        )
