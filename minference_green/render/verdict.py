"""A verdict in lines of text, each change with the arm that moved."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from minference_green.render.markdown import escaped
from minference_green.render.numbers import ABSENT, percent, significant
from minference_green.verdict import GUARD, Criterion, CriterionName, Outcome, Verdict
from minference_green.workload import format_length

_WORDS: dict[CriterionName, str] = {
    "energy_ratio": "joules per token against {reference}",
    "energy_absolute": "joules per token",
    "latency": "seconds per token against {reference}",
    "memory": "peak device memory",
    "density": "density",
    "output_error": "output error against {reference}",
    "kl": "divergence of next tokens from {reference}",
    "top1": "most likely tokens shared with {reference}",
    "recall": "attention mass kept",
}


def lines(verdict: Verdict) -> tuple[str, ...]:
    """The outcome, every criterion, what changed between the runs, and what to do next."""
    return tuple(_lines(verdict))


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """The verdict for programs: tokens and full precision, beside the lines for people."""
    return asdict(verdict) | {
        "exit_code": int(verdict.exit_code),
        "reasons": sorted({c.reason for c in verdict.criteria if c.judged}),
        "lines": lines(verdict),
    }


def markdown(verdict: Verdict) -> str:
    """The verdict for a pull-request comment or a job summary: the outcome, then the rest."""
    headline, *rest = lines(verdict)
    return "\n".join([f"### {escaped(headline)}", "", *(f"- {escaped(line)}" for line in rest), ""])


def _lines(verdict: Verdict) -> Iterator[str]:
    word = "IMPROVED" if verdict.improved else verdict.outcome.upper()
    stored = f"{verdict.stored_runs} stored run{'s' if verdict.stored_runs > 1 else ''}"
    yield f"{word} at {_margins(verdict)}: {verdict.blocks} blocks against {stored}"
    for criterion in verdict.criteria:
        yield _criterion(criterion)
    for key in verdict.allowed:
        yield f"! The runs differ in {key}, which was allowed; their joules are not comparable."
    for difference in (*verdict.differences.hard, *verdict.differences.subject):
        yield f"Changed: {difference}"
    for difference in verdict.differences.soft:
        yield f"Also differs: {difference}"
    if verdict.outcome is Outcome.INCONCLUSIVE:
        yield from _advice(verdict)


def _margins(verdict: Verdict) -> str:
    if len(set(verdict.margins.values())) == 1:
        return f"a margin of {next(iter(verdict.margins.values())):.1%}"
    return "margins of " + ", ".join(f"{n} {m:.1%}" for n, m in verdict.margins.items())


def title(criterion: Criterion) -> str:
    """What is judged, of which method at which length."""
    what = _WORDS[criterion.name].format(reference=criterion.reference_method)
    return f"{format_length(criterion.context_length)} {criterion.method}, {what}"


def _criterion(criterion: Criterion) -> str:
    outcome = (
        criterion.outcome.upper() if criterion.judged else f"({criterion.outcome}, not judged)"
    )
    return (
        f"{title(criterion)}: changed by {percent(criterion.change)}, "
        f"density {significant(criterion.density_then, 2)} -> "
        f"{significant(criterion.density_now, 2)}: {outcome}, {reason(criterion)}"
    )


def reason(criterion: Criterion) -> str:
    """Why the criterion came out as it did, with the arm that moved."""
    if criterion.change.value is None:
        return criterion.change.reason or "too few blocks"
    if criterion.candidate_change is None:  # observed, not sampled
        inside = criterion.outcome is Outcome.PASS
        return "within the margin" if inside else "worse by more than the margin"
    moved = (
        f"{criterion.method} {_signed(criterion.candidate_change)}, "
        f"{criterion.reference_method} {_signed(criterion.reference_change)}"
    )
    match criterion.reason:
        case "within-margin":
            return "within the margin"
        case "worse":
            return f"worse by more than the margin ({moved})"
        case "margin-in-interval":
            return f"the margin lies inside the deciding interval ({moved})"
        case "both-moved":
            return f"both-moved: both arms left the margin ({moved}); the machine differs"
        case "neither-held":
            near = f"within {GUARD * criterion.margin:.1%} of where it stood"
            return f"neither-held: neither arm is shown to be {near} ({moved})"
        case "reference-moved":
            return f"reference-moved: {criterion.reference_method} got cheaper ({moved})"
        case "few-blocks" | "not-observed":  # have no change, see above
            raise AssertionError(criterion)


def _signed(fraction: float | None) -> str:
    return ABSENT if fraction is None else f"{100 * fraction:+.1f} %"


def _advice(verdict: Verdict) -> Iterator[str]:
    open_ = [c for c in verdict.criteria if c.judged and c.reason == "margin-in-interval"]
    needed = [c.blocks_for_verdict for c in open_ if c.blocks_for_verdict is not None]
    if len(needed) < len(open_):
        yield "So near the margin no number of blocks would decide against runs this noisy."
    elif needed:
        yield (
            f"About {max(needed)} blocks would decide with 90 % power "
            "if the change is what it appears to be."
        )
    if any(c.judged and c.reason == "neither-held" for c in verdict.criteria):
        yield (
            "Noise that both arms share hides whether the machine changed: "
            "calm it, or measure more blocks."
        )
    if verdict.next_look is not None:
        yield f"Next look at {verdict.next_look} blocks: go on with the same run (--resume)."
