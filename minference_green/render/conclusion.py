"""What a run showed, in plain words, built from measured values alone."""

from minference_green.render.numbers import fraction, percent, significant
from minference_green.results import Run
from minference_green.stats import (
    BreakEven,
    Comparison,
    Estimate,
    break_even,
    cells,
    comparisons,
    density,
    method_names,
    observations,
)
from minference_green.workload import format_length


def conclusion(run: Run) -> tuple[str, ...]:
    """One sentence or two per method, on the longest length where it and the reference ran.

    The density stands beside the saving, and how the joules and the weights came about
    behind it.
    """
    reference, *others = method_names(run)
    if not others:
        return (f"{reference} alone was measured; there is nothing to compare it with.",)
    return tuple(_of_method(run, method, reference) for method in others)


def _of_method(run: Run, method: str, reference: str) -> str:
    measured = [
        c for c in comparisons(run) if c.method == method and c.time_saving.value is not None
    ]
    if not measured:
        reasons = [c.time_saving.reason for c in comparisons(run) if c.method == method]
        return f"{method} was not compared with {reference}: {reasons[0]}."
    longest = max(measured, key=lambda c: c.context_length)
    kept = density(run, longest.context_length, method)
    sentence = (
        f"At {format_length(longest.context_length)} tokens {method} {_energy(longest)} "
        f"{_time(longest)}, at density {significant(kept.value, 2)} "
        f"({_provenance(run, longest)})."
    )
    lost = _lost(run, longest.context_length, method)
    return " ".join([sentence, *lost, *_break_even(break_even(run, method))])


def _lost(run: Run, length: int, method: str) -> tuple[str, ...]:
    """The output's loss in one sentence; nothing for a run from before it was observed."""
    found = [o.faithfulness for o in observations(run, length, method) if o.faithfulness]
    if not found:
        return ()
    lost = found[0]
    recall = (
        f"recall {fraction(lost.recall.mean)} mean / {fraction(lost.recall.worst_head)} worst head"
        if lost.recall
        else "recall not known"
    )
    return (
        f"Its output there: top-1 agreement {100 * lost.prompt.top1_agreement:.1f} %, "
        f"KL {significant(lost.prompt.kl_nats, 2)} nats, {recall}.",
    )


def _energy(comparison: Comparison) -> str:
    saving = comparison.energy_saving
    if saving.value is None:
        return f"used energy that is not known ({saving.reason})"
    return _direction("used", saving, "energy", f"than {comparison.reference}")


def _time(comparison: Comparison) -> str:
    than = f" than {comparison.reference}" if comparison.energy_saving.value is None else ""
    return "and " + _direction("took", comparison.time_saving, "time", than.strip())


def _direction(verb: str, saving: Estimate, what: str, than: str) -> str:
    """``used 38 % [36, 40] less energy than dense``; only an interval off zero is a difference."""
    assert saving.value is not None
    tail = f" {than}" if than else ""
    word, shown = ("less", saving) if saving.value >= 0 else ("more", _negated(saving))
    if saving.low is None or saving.high is None:
        return f"{verb} {percent(shown)} {word} {what}{tail} ({saving.reason})"
    if saving.low <= 0 <= saving.high:
        away = tail.replace(" than", " from")
        return f"was not shown to differ{away} in {what} ({percent(saving)} saved)"
    return f"{verb} {percent(shown)} {word} {what}{tail}"


def _negated(estimate: Estimate) -> Estimate:
    def minus(value: float | None) -> float | None:
        return None if value is None else -value

    return Estimate(
        minus(estimate.value),
        minus(estimate.high),
        minus(estimate.low),
        estimate.blocks,
        estimate.reason,
    )


def _provenance(run: Run, comparison: Comparison) -> str:
    obtained = {
        c.obtained
        for c in cells(run)
        if c.context_length == comparison.context_length
        and c.method in (comparison.method, comparison.reference)
    }
    joules = (
        "no energy measured" if obtained == {"none"} else f"{'+'.join(sorted(obtained))} energy"
    )
    return f"{run.header.fingerprint.weights}, {joules}"


def _break_even(found: BreakEven) -> tuple[str, ...]:
    if found.tokens is None and found.high is not None:
        clear = f"its interval is clear of zero from about {_tokens(found.high)} tokens on"
        return (f"It used less energy at every length compared; {clear}.",)
    if found.tokens is None:
        return ()
    low = "below what was measured" if found.low is None else _tokens(found.low)
    high = "beyond what was measured" if found.high is None else _tokens(found.high)
    return (f"It saves energy from about {_tokens(found.tokens)} tokens on [{low}, {high}].",)


def _tokens(value: float) -> str:
    if value < 1024:
        return significant(value, 2)
    return f"{significant(value / 1024, 2)}k"
