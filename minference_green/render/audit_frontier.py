"""What is kept against what it costs: methods and budgets side by side."""

from dataclasses import dataclass, replace
from html import escape

from minference_green.findings import YARDSTICKS, Arm, Findings
from minference_green.render.document import Sheet
from minference_green.render.numbers import ABSENT, significant
from minference_green.retention import Share, retention
from minference_green.workload import format_length

ENOUGH = 0.99
"""Share of the answers that a budget should keep."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 380, 60, 50, 30, 170

_INKS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a")


@dataclass(frozen=True)
class Point:
    """One method at one budget."""

    method: str
    length: int
    density: float | None
    recall: float | None
    kept: Share
    joules_per_mtok: float | None
    seconds_per_mtok: float | None

    @property
    def base(self) -> str:
        """The method without its budget."""
        return self.method.partition(" x")[0]

    @property
    def budget(self) -> float:
        """Multiple of the method's own."""
        return float(self.method.partition(" x")[2] or 1)


def points(found: Findings, length: int) -> tuple[Point, ...]:
    """Every arm of a length that lost or could lose something; yardsticks have no price."""
    chosen = [
        a
        for a in found.arms
        if a.length == length
        and a.answers is not None
        and (a in found.compared or a.method == found.dense)
        and a.method not in YARDSTICKS
    ]
    placed = (_point(a, is_dense=a.method == found.dense) for a in chosen)
    return tuple(sorted(placed, key=lambda p: (p.base, p.budget)))


def _point(arm: Arm, *, is_dense: bool) -> Point:
    assert arm.answers is not None
    kept = retention(arm.answers)
    if is_dense:  # it keeps its own answers by definition; there is nothing to estimate
        kept = replace(kept, low=None, high=None, how=None)
    return Point(
        method=arm.method,
        length=arm.length,
        density=arm.computed.density if arm.computed else None,
        recall=arm.computed.recall if arm.computed else None,
        kept=kept,
        joules_per_mtok=arm.cost.joules_per_mtok,
        seconds_per_mtok=arm.cost.seconds_per_mtok,
    )


def share_of_answers(share: Share) -> str:
    """``97 % [95, 98]``."""
    if share.value is None:
        return ABSENT
    value = f"{100 * share.value:.1f}".removesuffix(".0")
    if share.low is None or share.high is None:
        return f"{value} %"
    return f"{value} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def frontier_sheet(found: Findings) -> Sheet:
    """Retention, recall and cost of every method at every budget."""

    def saved(point: Point, dense: Point | None) -> str:
        mine, whole = point.joules_per_mtok, None if dense is None else dense.joules_per_mtok
        return ABSENT if mine is None or not whole else f"{100 * (1 - mine / whole):+.0f} %"

    rows = []
    for length in found.audit.header.plan.context_lengths:
        of_length = points(found, length)
        dense = next((p for p in of_length if p.method == found.dense), None)
        rows += [
            (
                format_length(length),
                p.base,
                f"{p.budget:g}",
                significant(p.density, 2),
                significant(p.recall, 3),
                share_of_answers(p.kept),
                significant(p.joules_per_mtok, 3),
                saved(p, dense),
                significant(p.seconds_per_mtok, 3),
            )
            for p in of_length
        ]
    return Sheet(
        "What each budget keeps of all answers dense prefill gave right, with 90 % intervals over "
        "haystacks, and what its prefills cost",
        (
            "Context",
            "Method",
            "Budget",
            "Density",
            "Recall",
            "Kept",
            "J/Mtok",
            "Saved",
            "s/Mtok",
        ),
        tuple(rows),
    )


def cheapest(found: Findings, length: int) -> str:
    """Which method and budget keeps 99 % of the answers at the least energy, in a sentence."""
    at = format_length(length)
    lossy = [p for p in points(found, length) if p.method != found.dense]
    keeping = [p for p in lossy if p.kept.value is not None and p.kept.value >= ENOUGH]
    priced = [p for p in keeping if p.joules_per_mtok is not None]
    by_time = [p for p in keeping if p.seconds_per_mtok is not None]
    if not keeping:
        known = [p for p in lossy if p.kept.value is not None]
        if not known:
            return f"At {at} nothing could be lost, so no budget can be chosen."
        best = max(known, key=lambda p: p.kept.value or 0.0)
        return (
            f"At {at} no method and budget keeps {100 * ENOUGH:g} % of the answers; {best.method} "
            f"comes nearest with {100 * (best.kept.value or 0):.1f} %."
        )
    if not priced and not by_time:
        return f"At {at} no prefill that keeps {100 * ENOUGH:g} % of the answers was measured."
    by_energy = bool(priced)

    def price(point: Point | None) -> float | None:
        if point is None:
            return None
        return point.joules_per_mtok if by_energy else point.seconds_per_mtok

    chosen = min(priced or by_time, key=lambda p: price(p) or 0.0)
    what, unit = ("energy", "J/Mtok") if by_energy else ("time", "s/Mtok")
    told = f"{100 * (chosen.kept.value or 0):.1f} % kept"
    if chosen.kept.low is not None:
        told += f", at least {100 * chosen.kept.low:.1f} % with 95 % confidence"
    told += f", {significant(price(chosen), 3)} {unit}"
    if not by_energy:
        told += " (no energy was measured)"
    saved = None
    if whole := price(next((p for p in points(found, length) if p.method == found.dense), None)):
        saved = 1 - (price(chosen) or 0.0) / whole
        told += f", {abs(100 * saved):.0f} % {'less' if saved >= 0 else 'more'} than dense"
    if unpriced := [p.method for p in keeping if p not in (priced or by_time)]:
        told += f"; what {', '.join(unpriced)} takes was not measured"
    enough = f"keeps {100 * ENOUGH:g} % of the answers"
    if saved is not None and saved < 0:
        return (
            f"At {at} no method and budget that {enough} takes less {what} than dense prefill; "
            f"{chosen.method} comes nearest: {told}."
        )
    return f"At {at} the least {what} that {enough} is {chosen.method}'s: {told}."


def picture(found: Findings, length: int) -> str:
    """Retention against joules as SVG, a line per method through its budgets.

    Without joules the seconds stand in, and the axis says so. Empty with fewer than two points.
    """
    of_length = [p for p in points(found, length) if p.kept.value is not None]
    energy = all(p.joules_per_mtok is not None for p in of_length)
    priced = [(p, p.joules_per_mtok if energy else p.seconds_per_mtok) for p in of_length]
    placed = [(p, x) for p, x in priced if x is not None]
    if len(placed) < 2:
        return ""
    most = 1.05 * max(x for _, x in placed)
    lowest = (p.kept.value if p.kept.low is None else p.kept.low for p, _ in placed)
    least = min(0.9, min(low or 0.0 for low in lowest) - 0.02)
    least = max(0.0, least)

    def x_of(cost: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * cost / most

    def y_of(share: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share) / (1 - least)

    axis = "joules" if energy else "seconds"
    title = f"Answers kept against {axis} per million tokens at {format_length(length)}"
    read = f"bars are 90 % intervals, the dashed line {100 * ENOUGH:g} %"
    parts = [
        f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title><desc>The table of budgets holds the same figures; {read}."
        "</desc>",
        f'<text class="label" x="{_LEFT}" y="{_TOP - 14}">Answers kept at {format_length(length)}; '
        f"{read}</text>",
        f'<path d="M{_LEFT},{_TOP} V{_HEIGHT - _BOTTOM} H{_WIDTH - _RIGHT}" fill="none" '
        'stroke="currentColor"/>',
        f'<path d="M{_LEFT},{y_of(ENOUGH):.1f} H{_WIDTH - _RIGHT}" stroke="currentColor" '
        'stroke-dasharray="4 4" opacity=".5"/>',
    ]
    parts += [
        f'<text class="label" x="{_LEFT - 6}" y="{y_of(share) + 4:.1f}" '
        f'text-anchor="end">{100 * share:.0f} %</text>'
        for share in (1.0, least)
    ]
    parts += [
        f'<text class="label" x="{x_of(cost):.1f}" y="{_HEIGHT - _BOTTOM + 18}" '
        f'text-anchor="middle">{significant(cost, 2)}</text>'
        for cost in (0.0, most / 2, most)
    ]
    parts.append(
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 10}" '
        f'text-anchor="middle">{axis} per million tokens</text>'
    )
    bases = list(dict.fromkeys(p.base for p, _ in placed))
    for number, base in enumerate(bases):
        ink = _INKS[number % len(_INKS)]
        own = sorted(((p, x) for p, x in placed if p.base == base), key=lambda pair: pair[1])
        line = " ".join(f"{x_of(x):.1f},{y_of(p.kept.value or 0):.1f}" for p, x in own)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-width="2"/>')
        for p, x in own:
            low = p.kept.value if p.kept.low is None else p.kept.low
            high = p.kept.value if p.kept.high is None else p.kept.high
            parts.append(
                f'<path d="M{x_of(x):.1f},{y_of(low or 0):.1f} V{y_of(high or 0):.1f}" '
                f'stroke="{ink}" opacity=".6"/>'
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(p.kept.value or 0):.1f}" r="4" '
                f'fill="{ink}"><title>{escape(p.method)}</title></circle>'
            )
        parts.append(
            f'<text class="label" x="{_WIDTH - _RIGHT + 24}" y="{_TOP + 20 * number + 4}">'
            f"{escape(base)}</text>"
            f'<circle cx="{_WIDTH - _RIGHT + 12}" cy="{_TOP + 20 * number}" r="4" fill="{ink}"/>'
        )
    return "".join(parts) + "</svg>"
