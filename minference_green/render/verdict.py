"""A verdict in lines of text, each change with the arm that moved."""

from collections.abc import Iterator

from minference_green.render.numbers import ABSENT, percent, significant
from minference_green.verdict import Criterion, Outcome, Verdict
from minference_green.workload import format_length


def lines(verdict: Verdict) -> tuple[str, ...]:
    """The outcome, every criterion, what changed between the runs, and what to do next."""
    return tuple(_lines(verdict))


def _lines(verdict: Verdict) -> Iterator[str]:
    word = "IMPROVED" if verdict.improved else verdict.outcome.upper()
    stored = f"{verdict.stored_runs} stored run{'s' if verdict.stored_runs > 1 else ''}"
    yield f"{word} at a margin of {verdict.margin:.1%}: {verdict.blocks} blocks against {stored}"
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


def _criterion(criterion: Criterion) -> str:
    against = f" against {criterion.reference_method}" if criterion.kind == "ratio" else ""
    outcome = (
        criterion.outcome.upper() if criterion.judged else f"({criterion.outcome}, not judged)"
    )
    return (
        f"{format_length(criterion.context_length)} {criterion.method}, "
        f"{criterion.quantity} per token{against}: changed by {percent(criterion.change)}, "
        f"density {significant(criterion.density_then, 2)} -> "
        f"{significant(criterion.density_now, 2)}: {outcome}, {_reason(criterion)}"
    )


def _reason(criterion: Criterion) -> str:
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
        case "reference-moved":
            return f"reference-moved: {criterion.reference_method} got cheaper ({moved})"
        case "few-blocks":
            return criterion.change.reason or "too few blocks"


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
    if verdict.next_look is not None:
        yield f"Next look at {verdict.next_look} blocks: go on with the same run (--resume)."
