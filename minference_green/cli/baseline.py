"""``green-bench baseline``: save, list, show and promote the runs that others are compared to."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from minference_green.baseline import Baseline

BASELINES_HELP = "Folder of the baselines."
Baselines = Annotated[Path, typer.Option("--baselines", help=BASELINES_HELP)]
DEFAULT_ROOT = Path("reports/baselines")

app = typer.Typer(
    help="Named sets of stored runs that later runs are compared to.", no_args_is_help=True
)


@app.command()
def save(
    name: Annotated[str, typer.Argument(help="Name of the baseline, such as main.")],
    run: Annotated[Path, typer.Argument(help="A finished run: its directory or its run.jsonl.")],
    baselines: Baselines = DEFAULT_ROOT,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop the runs the baseline holds now.")
    ] = False,
) -> None:
    """Begin a baseline with a run; its file is copied and known by its hash."""
    from minference_green import baseline

    saved = baseline.save(baselines, name, run, replace=replace)
    typer.echo(f"Saved {saved.runs[-1].header.run_id} as baseline {name} in {saved.directory}")
    _warn(saved)


@app.command("list")
def list_(
    baselines: Baselines = DEFAULT_ROOT,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Every baseline, with its runs, device and model."""
    from minference_green import baseline

    found = [baseline.read(baselines, name) for name in baseline.names(baselines)]
    if json_output:
        typer.echo(json.dumps([_as_dict(one) for one in found], indent=2))
        return
    if not found:
        typer.echo(f"no baselines in {baselines}; make one with: green-bench baseline save")
    for one in found:
        print_ = one.runs[-1].header.fingerprint
        devices = " + ".join(d.name for d in print_.devices)
        typer.echo(
            f"{one.name}: {len(one.runs)} run(s), newest {one.runs[-1].header.created_at}, "
            f"{print_.model} on {devices}"
        )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the baseline.")],
    baselines: Baselines = DEFAULT_ROOT,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """The runs of a baseline, what limits it, and the report of its newest run."""
    from minference_green import baseline
    from minference_green.render.document import document
    from minference_green.render.table import plain

    found = baseline.read(baselines, name)
    if json_output:
        typer.echo(json.dumps(_as_dict(found), indent=2))
        return
    for stored in found.stored:
        commit = f"at commit {stored.commit[:12]}" if stored.commit else "outside a repository"
        typer.echo(f"{stored.run_id}  added {stored.added_at} {commit}  sha256 {stored.sha256}")
    _warn(found)
    typer.echo("")
    typer.echo(plain(document(found.runs[-1])), nl=False)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Name of the baseline.")],
    run: Annotated[Path, typer.Argument(help="A finished run: its directory or its run.jsonl.")],
    baselines: Baselines = DEFAULT_ROOT,
) -> None:
    """Append a run to a baseline and print how it differs from those it held."""
    from minference_green import baseline
    from minference_green.render.verdict import lines
    from minference_green.results import load
    from minference_green.verdict import compare

    verdict = compare(baseline.read(baselines, name).runs, load(run))
    promoted = baseline.promote(baselines, name, run)
    typer.echo(f"Baseline {name} now holds {len(promoted.runs)} runs. The new one against them:")
    for line in lines(verdict):
        typer.echo(line)
    _warn(promoted)


def _warn(found: "Baseline") -> None:
    from minference_green import baseline

    for warning in baseline.warnings(found, datetime.now(UTC)):
        typer.echo(f"! {warning}", err=True)


def _as_dict(found: "Baseline") -> dict[str, object]:
    from minference_green import baseline

    return {
        "name": found.name,
        "runs": [stored.model_dump(mode="json") for stored in found.stored],
        "warnings": baseline.warnings(found, datetime.now(UTC)),
    }
