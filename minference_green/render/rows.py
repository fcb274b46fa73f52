"""What every surface shows: one row per context length and arm, and the facts around them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from statistics import fmean

from minference_green.render.numbers import significant
from minference_green.results import Backends, Decision, Faithfulness, Note, Observation, Run, Skip
from minference_green.stats import (
    Cell,
    Comparison,
    Estimate,
    cells,
    comparisons,
    current_windows,
    density,
    observations,
)
from minference_green.workload import format_length


@dataclass(frozen=True)
class Row:
    """One arm at one context length."""

    cell: Cell
    against_reference: Comparison | None
    """Null for the reference arm itself."""
    density: Estimate
    logits_relative_error: float | None
    """Of the last position, against the reference arm; mean over the observations."""
    top1_agreement: float | None
    sampled_positions: int
    faithfulness: Faithfulness | None
    """What its attention and output lost; of the first observation that tells."""
    faithfulness_reason: str | None
    """Why that is null; null itself for the reference, and where nobody looked."""


def rows(run: Run) -> tuple[Row, ...]:
    """Every (context length, arm) in the order asked for, also those without a measurement."""
    compared = {(c.context_length, c.method): c for c in comparisons(run)}
    return tuple(
        _row(run, cell, compared.get((cell.context_length, cell.method))) for cell in cells(run)
    )


def _row(run: Run, cell: Cell, comparison: Comparison | None) -> Row:
    seen = observations(run, cell.context_length, cell.method)
    errors = [o.logits_relative_error for o in seen if o.logits_relative_error is not None]
    agreements = [o.top1_agreement for o in seen if o.top1_agreement is not None]
    return Row(
        cell=cell,
        against_reference=comparison,
        density=density(run, cell.context_length, cell.method),
        logits_relative_error=fmean(errors) if errors else None,
        top1_agreement=fmean(agreements) if agreements else None,
        sampled_positions=max((o.sampled_positions for o in seen), default=0),
        faithfulness=next((o.faithfulness for o in seen if o.faithfulness), None),
        faithfulness_reason=next(
            (o.faithfulness_reason for o in seen if o.faithfulness_reason), None
        ),
    )


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Machine, model, energy source, carbon factor, workload and plan, as (label, text)."""
    header, print_ = run.header, run.header.fingerprint
    plan, workload = header.plan, header.workload
    drawn = "synthetic facts and text" if print_.model == "embedded" else "synthetic tokens"
    prompt = drawn if workload.prompt_sha256 is None else f"text {workload.prompt} tokens"
    done = len(run.blocks_done)
    planned = run.blocks_planned
    stood = f"{planned} blocks" if run.complete else f"{done} of {planned} blocks finished"
    if planned != plan.blocks:
        stood += f" ({plan.blocks} at first, then extended)"
    quick = ", quick" if plan.quick else ""
    return (
        ("Machine", _machine(run)),
        (
            "Model",
            f"{print_.model} at {print_.model_revision}, {print_.weights}, "
            f"{_count(print_.parameters)} parameters, {print_.dtype}",
        ),
        ("Prompt", f"{prompt}, batch {workload.batch}, seed {workload.seed}"),
        *((("Dense kernel", kernels),) if (kernels := _dense_kernels(run)) else ()),
        *(("Auto", text) for text in _decisions(run)),
        *((("Rest of the model", f"fused: {print_.rest}"),) if print_.rest != "stock" else ()),
        ("Energy", header.energy),
        ("Carbon", _carbon(run)),
        (
            "Plan",
            f"{stood}, windows of {plan.window_seconds:g} s or more, warm-up of at most "
            f"{plan.warmup_seconds:g} s{quick}",
        ),
        ("Run", f"{header.run_id}, {header.created_at}, minference-green {header.version}"),
    )


def _machine(run: Run) -> str:
    print_ = run.header.fingerprint
    names = [
        d.name
        + (f" [{d.mig_profile}]" if d.mig_profile else "")
        + (f", limit {d.power_limit_watts:.0f} W" if d.power_limit_watts else "")
        + (f", driver {d.driver}" if d.driver else "")
        for d in print_.devices
    ]
    versions = [f"{k} {v}" for k, v in print_.software.items() if k in ("torch", "triton", "cuda")]
    # On a CPU run the device is the processor, which then stands here with its cores.
    names = [name for name in names if not print_.cpu.startswith(name)]
    return "; ".join([*names, *([print_.cpu] if print_.cpu else []), *versions])


def _count(parameters: int) -> str:
    unit, divisor = ("G", 1e9) if parameters >= 1e9 else ("M", 1e6)
    return f"{significant(parameters / divisor, 3)} {unit}"


def _dense_kernels(run: Run) -> str:
    """The fastest dense kernel of this machine at each length, which is the baseline."""
    chosen = {b.context_length: b.chosen for b in run.of(Backends)}
    if len(set(chosen.values())) == 1:
        return f"{next(iter(chosen.values()))}, the fastest here at every length"
    return ", ".join(f"{backend} at {format_length(n)}" for n, backend in sorted(chosen.items()))


def _decisions(run: Run) -> tuple[str, ...]:
    """Where an arm that chooses runs dense and where sparse, and what predicted it."""
    made = {(d.method, d.context_length): d for d in run.of(Decision)}
    if not made:
        return ()
    parts = []
    for (_, length), decision in sorted(made.items()):
        sparse = sum(one.runs == "sparse" for one in decision.layers)
        of = len(decision.layers)
        runs = {0: "dense", of: "sparse"}.get(
            sparse, f"sparse in {sparse} of {of} layers, else dense"
        )
        parts.append(f"{format_length(length)} {runs}")
    laws = dict.fromkeys(d.law for d in made.values())
    return (f"{'; '.join(parts)}; predicted by {' and '.join(laws)}",)


def _carbon(run: Run) -> str:
    terms, factor = run.header.carbon, run.header.carbon.factor
    text = (
        f"{factor.g_per_kwh:g} gCO2e/kWh for {factor.location}"
        f"{' (assumed: no location given)' if factor.assumed else ''}, "
        f"{factor.year or 'year not stated'}, {factor.kind}, {factor.boundary}, {factor.source}, "
        f"+-{factor.relative_uncertainty:.0%} not part of any interval; PUE {terms.pue:g}"
    )
    if terms.embodied_g_per_second:
        text += f"; embodied {terms.embodied_g_per_second:g} g/s ({terms.embodied_source})"
    return text


def doubts(run: Run, directory: Path | None = None) -> tuple[str, ...]:
    """Everything that limits what the run shows, each said once; empty for a clean run.

    ``directory`` is where the run file lies; an unfinished run names it in its resume line.
    """
    found: list[str] = []
    factor, plan = run.header.carbon.factor, run.header.plan
    if run.cut:
        found.append("The last line of the run file was cut short and is left out.")
    if not run.complete:
        if directory is None:
            directory = Path("DIR") / run.header.run_id
        elif not directory.name:  # as in "." the name is not written out
            directory = directory.resolve()
        place, name = directory.parent, directory.name
        found.append(
            f"Incomplete: {len(run.blocks_done)} of {run.blocks_planned} blocks finished. "
            f"Go on with: green-bench run --resume {quote(name)} --output {quote(str(place))}"
        )
    if plan.quick:
        found.append("Quick run: short windows and few blocks, for a first impression.")
    if factor.assumed:
        found.append(
            f"Grams assume {factor.location} ({factor.g_per_kwh:g} gCO2e/kWh): no location was "
            "given. Name yours with --country."
        )
    if any(r.obtained == "simulated" for w in run.windows for r in w.readings):
        found.append("Joules are simulated: no device was read, they prove nothing about one.")
    found += _window_doubts(run)
    found += _skips(run)
    found += dict.fromkeys(note for o in run.of(Observation) for note in o.notes)
    found += dict.fromkeys(n.message for n in run.of(Note))
    return tuple(found)


def _window_doubts(run: Run) -> list[str]:
    """Invalid windows, marks of valid ones and doubts of their readings, alike ones together."""
    windows = current_windows(run)
    invalid = [text for w in windows if not w.valid for text in w.reasons]
    marked = [text for w in windows if w.valid for text in w.reasons]
    marked += [
        f"{r.obtained} joules of {r.device}: {r.reason}"
        for w in windows
        for r in w.readings
        if w.valid and r.reason and r.joules is not None
    ]
    of = f"of {len(windows)} windows"
    found = [f"Left out as invalid, {n} {of}: {text}" for text, n in _alike(invalid)]
    found += [f"{n} {of}: {text}" for text, n in _alike(marked)]
    replaced = len(run.windows) - len(windows)
    if replaced:
        found.append(f"{replaced} windows of interrupted blocks were measured anew and not used.")
    return found


def _alike(texts: Iterable[str]) -> Iterable[tuple[str, int]]:
    """The first of each group of texts that differ in numbers only, and how many there are."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(re.sub(r"[\d.]+", "#", text), []).append(text)
    return ((group[0], len(group)) for group in groups.values())


def _skips(run: Run) -> list[str]:
    skips = {(s.context_length, s.method): s.reason for s in run.of(Skip)}
    return [
        f"Skipped {method} at {format_length(length)}: {reason}"
        for (length, method), reason in skips.items()
    ]
