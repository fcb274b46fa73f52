"""``green-bench carbon``: the factors there are, one of them in full, a year's projection."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference_green.errors import UsageError

if TYPE_CHECKING:
    from minference_green.projection import Projection
    from minference_green.results import EmissionFactor, Run
    from minference_green.stats import Estimate

app = typer.Typer(
    help="Emission factors and what follows from them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]


@app.command("list")
def list_(
    cloud: Annotated[
        bool, typer.Option("--cloud", help="List cloud regions instead of countries.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Every place with a factor of its own, in grams of CO2e per kWh; nothing is downloaded."""
    from minference_green.carbon import places

    found = places(cloud=cloud)
    if json_output:
        typer.echo(json.dumps([f.model_dump(mode="json") for f in found], indent=1))
        return
    for factor in found:
        typer.echo(f"{factor.g_per_kwh:10.3f}  {factor.year or '-':>4}  {factor.location}")


@app.command("show")
def show(
    country: Annotated[str, typer.Argument(help="ISO code such as FRA; none: world average.")] = "",
    region: Annotated[str, typer.Option(help="Region of the country, such as california.")] = "",
    cloud: Annotated[str, typer.Option(help="provider:region, such as gcp:us-central1.")] = "",
    json_output: Json = False,
) -> None:
    """One factor with its year, kind, boundary, file and digest."""
    from minference_green.carbon import factor

    found = factor(country=country or None, region=region or None, cloud=cloud or None)
    if json_output:
        typer.echo(found.model_dump_json(indent=1))
        return
    for label, text in _facts(found):
        typer.echo(f"{label:<12} {text}")


def _facts(factor: "EmissionFactor") -> list[tuple[str, str]]:
    return [
        ("Location", factor.location + (" (assumed: none was given)" if factor.assumed else "")),
        ("Factor", f"{factor.g_per_kwh:.3f} g CO2e per kWh, +-{factor.relative_uncertainty:.0%}"),
        ("Year", str(factor.year or "not stated")),
        ("Kind", factor.kind),
        ("Boundary", factor.boundary),
        ("Source", factor.source),
        ("SHA-256", factor.sha256 or "none"),
    ]


@app.command("project")
def project(
    run: Annotated[Path, typer.Argument(help="A run: its directory or its run.jsonl.")],
    prompts_per_day: Annotated[float, typer.Option(help="Prompts a day.")],
    prompt_tokens: Annotated[str, typer.Option(help="Tokens a prompt, a length of the run: 32k.")],
    json_output: Json = False,
) -> None:
    """Energy in kWh and kg CO2e per year of a workload, from what a run measured at that length."""
    from minference_green.projection import project as projected
    from minference_green.results import load
    from minference_green.workload import parse_length

    loaded = load(run)
    if prompt_tokens.startswith("-"):
        raise UsageError(f"--prompt-tokens {prompt_tokens} must be more than 0")
    found = projected(loaded, prompts_per_day, parse_length(prompt_tokens))
    if json_output:
        typer.echo(json.dumps([asdict(p) for p in found], indent=1))
        return
    for line in _lines(loaded, found, prompts_per_day):
        typer.echo(line)


def _lines(run: "Run", found: tuple["Projection", ...], prompts_per_day: float) -> list[str]:
    from minference_green.workload import format_length

    terms = run.header.carbon
    factor = terms.factor
    length = format_length(found[0].context_length)
    lines = [
        f"{prompts_per_day:g} prompts of {length} tokens a day, 365 days, at the cost measured in "
        f"{run.header.run_id}; 90 % intervals, those of kg with +-"
        f"{factor.relative_uncertainty:.0%} for the factor",
        f"{factor.g_per_kwh:g} g CO2e/kWh ({factor.location}"
        f"{', assumed: no location given' if factor.assumed else ''}), PUE {terms.pue:g}",
    ]
    return lines + [
        f"  {arm.method}: {_with_interval(arm.kwh)} kWh, "
        f"{_with_interval(arm.operational_kg)} kg CO2e operational, "
        f"{_with_interval(arm.embodied_kg)} kg embodied ({arm.obtained} energy)"
        for arm in found
    ]


def _with_interval(estimate: "Estimate") -> str:
    from minference_green.render.numbers import figure, significant

    if estimate.value is None:
        return f"n/a ({estimate.reason})"
    if estimate.low is None:
        return f"{significant(estimate.value, 3)} ({estimate.reason})"
    ends = f"[{significant(estimate.low, 3)}, {significant(estimate.high, 3)}]"
    return f"{figure(estimate)} {ends}"
