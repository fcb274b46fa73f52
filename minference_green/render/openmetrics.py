"""Figures as OpenMetrics text, for Prometheus and what reads its format."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from minference_green.render.export import Value, records
from minference_green.results import Run
from minference_green.verdict import Outcome, Verdict

_RUN_GAUGES = {
    "joules_per_mtok": "Joules per million prefill tokens.",
    "operational_g_per_mtok": "Operational grams of CO2e per million prefill tokens.",
    "seconds_per_mtok": "Seconds per million prefill tokens.",
    "energy_saving": "One minus joules over those of the reference arm.",
    "density": "Computed over causal query-key pairs.",
}

_RUN_LABELS = (
    "run_id",
    "devices",
    "model",
    "dtype",
    "context_length_tokens",
    "method",
    "energy_obtained",
)


@dataclass(frozen=True)
class _Sample:
    labels: Mapping[str, Value]
    value: float
    seconds: float | None = None
    """Time of the measurement since the epoch."""


def of_runs(runs: Sequence[Run]) -> str:
    """Gauges of every cell of every run, each with the time of its run; null ones left out."""
    return _exposition((f"green_bench_{n}", h, _of_runs(runs, n)) for n, h in _RUN_GAUGES.items())


def _of_runs(runs: Sequence[Run], name: str) -> Iterator[_Sample]:
    for run in runs:
        seconds = datetime.fromisoformat(run.header.created_at).timestamp()
        for record in records(run):
            value = record[name]
            if value is not None:
                labels = {label: record[label] for label in _RUN_LABELS}
                yield _Sample(labels, float(value), seconds)


def of_verdict(verdict: Verdict, baseline: str) -> str:
    """The outcome as one of three states, and the change of every judged criterion."""
    states = (
        _Sample({"baseline": baseline, "outcome": o.value}, float(o is verdict.outcome))
        for o in Outcome
    )
    changes = (
        _Sample(
            {
                "baseline": baseline,
                "criterion": c.name,
                "context_length_tokens": c.context_length,
                "method": c.method,
            },
            c.change.value,
        )
        for c in verdict.criteria
        if c.judged and c.change.value is not None
    )
    blocks = [_Sample({"baseline": baseline}, float(verdict.blocks))]
    return _exposition(
        (
            ("green_bench_check_outcome", "1 for the outcome of the last check.", states),
            ("green_bench_check_change", "Now over the baseline, minus 1.", changes),
            ("green_bench_check_blocks", "Blocks the last check is based on.", blocks),
        )
    )


def _exposition(families: Iterable[tuple[str, str, Iterable[_Sample]]]) -> str:
    return "".join(f"{line}\n" for line in _lines(families))


def _lines(families: Iterable[tuple[str, str, Iterable[_Sample]]]) -> Iterator[str]:
    for name, help_, samples in families:
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {help_}"
        for sample in samples:
            labels = ",".join(f'{key}="{_escaped(v)}"' for key, v in sample.labels.items())
            when = "" if sample.seconds is None else f" {sample.seconds:.3f}"
            yield f"{name}{{{labels}}} {sample.value!r}{when}"
    yield "# EOF"


def _escaped(value: Value) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
