"""The report of an audit: what is kept, of which kinds, at which depths, at what cost."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from minference_green.detectable import TESTABLE_ITEMS
from minference_green.findings import PLACES, YARDSTICKS, Arm, Findings, Place, findings
from minference_green.groups import GroupTest, Trend
from minference_green.ledger import NOISE_FLOOR, Audit, KindOfText, OfText
from minference_green.render.audit_frontier import cheapest, frontier_sheet, share_of_answers
from minference_green.render.document import Document, Sheet
from minference_green.render.numbers import ABSENT, significant
from minference_green.results import Backends, Note, Skip
from minference_green.retention import Finding, LossVerdict, Share, Shift
from minference_green.workload import format_length

PLACE_WORDS = {"inside": "inside the prompt", "after": "after it", "end": "at its end"}

HEADLINE = (
    "Answers kept of those dense prefill gave right, with 90 % intervals over haystacks: to "
    "questions inside the prompt, asked after it over its cache, and at its very end"
)

NO_PRICE = "a yardstick reads all attention before it leaves some out; what it takes says nothing"


def audit_document(audit: Audit, directory: Path | None = None) -> Document:
    """The report of an audit; ``directory`` is where its file lies, for the resume line."""
    if audit.header.plan.text is not None:
        return text_document(audit, directory)
    found = findings(audit)
    notes = _Footnotes()
    sheets = [_headline(found, notes)]
    right = any(found.dense_right(n)[0] for n in audit.header.plan.context_lengths)
    if found.compared and right:
        sheets += [
            _parts(found, notes),
            *(_groups(arm, "Kind", arm.kinds) for arm in found.compared),
            *(_groups(arm, "Depth", arm.depths) for arm in found.compared),
            _treatments(found, notes),
            _flips(found, notes),
            _shifts(found, notes),
            *_regret(found),
            *([frontier_sheet(found)] if audit.header.plan.budgets else []),
            _verdicts(found, notes),
        ]
    sheets.append(_cost(found, notes))
    return Document(
        facts=_facts(found),
        doubts=tuple(_doubts(found, directory)),
        sheets=tuple(sheet for sheet in sheets if sheet.rows),
        footnotes=notes.texts,
        conclusion=conclusion(found),
    )


def conclusion(found: Findings) -> tuple[str, ...]:
    """One sentence per method, at the longest length where it answered; the plain words first."""
    audit = found.audit
    if not any(found.dense_right(n)[1] for n in audit.header.plan.context_lengths):
        if any(s.method == found.dense for s in audit.of(Skip)):
            return ("Dense prefill could not be asked; there is nothing to hold a method against.",)
        return ("No haystack has been answered yet; there is nothing to judge.",)
    if not any(found.dense_right(n)[0] for n in audit.header.plan.context_lengths):
        return (
            f"{audit.header.fingerprint.model} answers none of the questions even with dense "
            "prefill, so nothing can be lost: audit a model that can read its prompt.",
        )
    methods = dict.fromkeys(arm.method for arm in found.compared)
    if not methods:
        return ("Dense prefill alone was audited; there is nothing to hold against it.",)
    sentences = tuple(
        _sentence(max((a for a in found.compared if a.method == m), key=lambda a: a.length))
        for m in methods
    )
    if not audit.header.plan.budgets:
        return sentences
    return (*(cheapest(found, n) for n in audit.header.plan.context_lengths), *sentences)


def _sentence(arm: Arm) -> str:
    shown = [
        f"{share_of_answers(place.retention)} {PLACE_WORDS[name]}"
        for name, place in arm.places.items()
        if place.dense_right
    ]
    if not shown:
        return f"At {format_length(arm.length)} dense prefill answers nothing right to be kept."
    density = arm.computed.density if arm.computed else None
    at = "" if density is None else f" at density {significant(density, 2)}"
    text = f"At {format_length(arm.length)} tokens {arm.method} keeps of the answers "
    text += f"{_joined(shown)}{at}: "
    text += "; ".join(
        f"{PLACE_WORDS[name]}, {_verdict(place.verdict)}"
        for name, place in arm.places.items()
        if place.dense_right
    )
    named = [
        *(arm.kinds.named if arm.kinds else ()),
        *(f"facts at depth {depth}" for depth in (arm.depths.named if arm.depths else ())),
    ]
    if named:
        text += f". It loses more of {_joined(named)} than of the rest (Holm 5 %)"
    return text + "."


def _verdict(verdict: LossVerdict) -> str:
    points = f"{100 * verdict.margin:g} points"
    match verdict.finding:
        case Finding.LOSS:
            return f"a loss beyond {points} is shown"
        case Finding.NO_LOSS:
            return f"no loss beyond {points} is shown"
    if verdict.reason in ("nothing-to-lose", "no-answers"):
        return "nothing could be lost"
    if verdict.more_haystacks is None:
        return f"undecided, too near {points} for any number of haystacks"
    plural = "" if verdict.more_haystacks == 1 else "s"
    return f"undecided, about {verdict.more_haystacks} more haystack{plural} needed"


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


class _Footnotes:
    """Reasons, numbered as they are first met."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts)

    def mark(self, text: str, reason: str | None) -> str:
        if reason is None:
            return text
        if reason not in self._texts:
            self._texts.append(reason)
        return f"{text} ({self._texts.index(reason) + 1})"


_WHY_NULL = {
    "nothing-to-lose": "dense prefill gave no such answer right, so none could be lost",
    "nothing-to-gain": "dense prefill gave every such answer right",
    "no-answers": "no such question was asked",
    "not-taken": "no question measures this",
    "one-haystack": "one haystack has no interval",
}


def _told(share: Share, notes: _Footnotes) -> str:
    reason = None if share.reason is None else _WHY_NULL.get(share.reason, share.reason)
    return notes.mark(share_of_answers(share), reason)


def _places(found: Findings) -> tuple[str, ...]:
    return tuple(p for p in PLACES if any(p in arm.places for arm in found.arms))


def _key(arm: Arm) -> tuple[str, str]:
    return format_length(arm.length), arm.method


SPOKEN_TOKENS = 20
"""A kind with fewer tokens in a text stands in its table and not in its sentence."""


def text_document(audit: Audit, directory: Path | None) -> Document:
    """The report of an audit of the user's own text."""
    told = [t for t in audit.of(OfText) if t.method != audit.header.methods[0].name]
    sentences = []
    for of in told:
        known = [k for k in of.kinds if k.recall is not None and k.tokens >= SPOKEN_TOKENS]
        if of.method == NOISE_FLOOR or not known:
            continue
        worst, best = min(known, key=_recall), max(known, key=_recall)
        least, most = (f"{100 * _recall(kind):.1f} %" for kind in (worst, best))
        sentence = (
            f"Of the attention that {_read(of)} {format_length(of.tokens)} tokens of your text "
            f"get, {of.method} keeps "
        )
        if len(known) == 1:
            sentence += f"{least} of that to {worst.kind}, the only kind"
            sentence += f" with {SPOKEN_TOKENS} tokens or more"
        elif least == most:
            sentence += f"{least} of that to each kind"
        else:
            sentence += f"least of that to {worst.kind} ({least}) and "
            sentence += f"most of that to {best.kind} ({most})"
        sentences.append(f"{sentence}; one text has no interval.")
    return Document(
        facts=_facts(findings(audit)),
        doubts=tuple(_doubts(findings(audit), directory)),
        sheets=tuple(_of_text(of) for of in told),
        footnotes=(),
        conclusion=tuple(sentences)
        or ("No method's index was seen on your text: nothing is told of attention.",),
    )


def _read(of: OfText) -> str:
    """Whether a text was read to its end: one that is longer than was asked for is not."""
    return "all" if of.tokens < of.context_length else "the first"


def _recall(kind: KindOfText) -> float:
    assert kind.recall is not None
    return kind.recall


def _of_text(of: OfText) -> Sheet:
    def percent(share: float | None) -> str:
        return ABSENT if share is None else f"{100 * share:.1f} %"

    kinds = sorted(of.kinds, key=lambda k: (k.recall is None, k.recall or 0, -(k.kl_nats or 0)))
    return Sheet(
        f"{of.method} on {_read(of)} {of.tokens} tokens of the text: attention kept by kind of the "
        "token looked at (dense queries and keys), and predictions of such tokens against dense "
        "ones",
        (
            "Method",
            "Kind",
            "Tokens",
            "Attention to it",
            "Kept",
            "Predicted",
            "KL nats",
            "Top-1 same",
            "NLL change",
        ),
        tuple(
            (
                of.method,
                k.kind,
                str(k.tokens),
                percent(k.attention),
                percent(k.recall),
                str(k.positions),
                significant(k.kl_nats, 2),
                percent(k.top1_agreement),
                ABSENT if k.nll_change_nats is None else f"{k.nll_change_nats:+.4f}",
            )
            for k in kinds
        ),
    )


def _headline(found: Findings, notes: _Footnotes) -> Sheet:
    places = _places(found)

    def kept(arm: Arm, name: str) -> str:
        place = arm.places.get(name)
        if place is None:
            return ABSENT
        if arm.method == found.dense:
            return f"{place.dense_right} of {place.items} right"
        return _told(place.retention, notes)

    def cost(arm: Arm) -> tuple[str, str]:
        if arm.method in YARDSTICKS:
            return (notes.mark(ABSENT, NO_PRICE), notes.mark(ABSENT, NO_PRICE))
        unknown = arm.cost.reason if arm.cost.joules is None else None
        joules = notes.mark(significant(arm.cost.joules_per_mtok, 3), unknown)
        return joules, significant(arm.cost.seconds_per_mtok, 3)

    return Sheet(
        HEADLINE,
        (
            "Context",
            "Method",
            *(f"Kept {PLACE_WORDS[p]}" for p in places),
            "Density",
            "Recall",
            "J/Mtok",
            "s/Mtok",
        ),
        tuple(
            (
                *_key(arm),
                *(kept(arm, p) for p in places),
                significant(arm.computed.density if arm.computed else None, 2),
                significant(arm.computed.recall if arm.computed else None, 3),
                *cost(arm),
            )
            for arm in found.arms
        ),
    )


def _parts(found: Findings, notes: _Footnotes) -> Sheet:
    places = _places(found)
    none = Share(None, None, None, 0, 0, None, "no-answers")

    def part(place: Place | None, name: str) -> str:
        return _told(none if place is None else getattr(place, name), notes)

    return Sheet(
        "First token and continuation apart: only the first token of an answer is foretold by "
        "nothing but the fact",
        (
            "Context",
            "Method",
            *(f"{word}, {PLACE_WORDS[p]}" for p in places for word in ("First", "Rest")),
        ),
        tuple(
            (
                *_key(arm),
                *(part(arm.places.get(p), name) for p in places for name in ("first", "rest")),
            )
            for arm in found.compared
        ),
    )


def _groups(arm: Arm, what: str, test: GroupTest | None) -> Sheet:
    groups = () if test is None else test.groups
    tested = sum(g.p_adjusted is not None for g in groups)
    p = "" if test is None or test.p is None else f"; that any loses more: {_p(test.p)}"
    places = [p for p in PLACES if p in arm.places] if what == "Kind" else []

    def counts(kind: str, place: str) -> str:
        kept, of = arm.kept(kind, place)
        return f"{kept}/{of}"

    words = {
        "few-right": f"not tested: under {TESTABLE_ITEMS} right",
        "never-beside-another": "not tested: no rest",
    }
    how = f"each against the rest, Holm over {tested}{p}" if tested else "none tested"
    return Sheet(
        f"{arm.method} at {format_length(arm.length)} by {what.lower()}, {how}",
        (
            "Context",
            what,
            *(f"Kept {PLACE_WORDS[p]}" for p in places),
            "Dense right",
            "Lost",
            "Gained",
            "Retention",
            "Odds ratio",
            "p (Holm)",
            "Finding",
        ),
        tuple(
            (
                format_length(arm.length),
                g.name,
                *(counts(g.name, p) for p in places),
                str(g.dense_right),
                str(g.lost),
                str(g.gained),
                ABSENT if g.retention is None else f"{100 * g.retention:.1f} %",
                significant(g.odds_ratio, 2),
                ABSENT if g.p_adjusted is None else _p(g.p_adjusted),
                words[g.untestable] if g.untestable else "loses more" if g.named else "",
            )
            for g in sorted(groups, key=lambda g: (g.retention is None, g.retention or 0.0))
        ),
    )


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _trend(trend: Trend | None) -> str:
    """``-14 points, p = 0.038``: less is lost at the end than at the start."""
    if trend is None or trend.slope is None or trend.p is None:
        return ABSENT
    points = round(100 * trend.slope) + 0  # never -0
    return f"{points:+d} points, {_p(trend.p)}"


def _treatments(found: Findings, notes: _Footnotes) -> Sheet:
    return Sheet(
        "By how a fact is stated: mentions, updates, legends, hops by alias, neighbours",
        ("Context", "Method", "Stated", "Dense right", "Lost", "Retention"),
        tuple(
            (
                *_key(arm),
                t.name,
                str(t.dense_right),
                str(t.lost),
                _told(t.retention, notes),
            )
            for arm in found.compared
            for t in arm.treatments
        ),
    )


def _flips(found: Findings, notes: _Footnotes) -> Sheet:
    rows = []
    for arm in found.arms:
        if arm.method == found.dense or arm.flips is None:
            continue
        floor = found.arm(arm.length, NOISE_FLOOR)
        noise = None if floor is None or floor.flips is None else floor.flips.lost_share.value
        lost = arm.flips.lost_share.value
        beyond = None if noise is None or lost is None else max(0.0, lost - noise)
        of = 0 if arm.answers is None else len(arm.answers)
        fewer = None
        if floor is not None and len(floor.items) < len(arm.items):
            fewer = f"the noise floor was asked {len(floor.items)} of {len(arm.items)} questions"
        rows.append(
            (
                *_key(arm),
                str(of),
                str(arm.flips.lost),
                str(arm.flips.gained),
                _told(arm.flips.lost_share, notes),
                _told(arm.flips.gained_share, notes),
                ABSENT
                if beyond is None or arm.method == NOISE_FLOOR
                else notes.mark(f"{100 * beyond:.1f} points", fewer),
                _p(arm.flips.p_haystacks),
            )
        )
    return Sheet(
        "Answers that changed, both ways: lost of those dense gave right, gained of those it "
        "gave wrong, and the loss beyond the noise floor's",
        (
            "Context",
            "Method",
            "Questions",
            "Lost",
            "Gained",
            "Of right",
            "Of wrong",
            "Beyond noise",
            "Balance",
        ),
        tuple(rows),
    )


def _shifts(found: Findings, notes: _Footnotes) -> Sheet:
    def told(shift: Shift | None) -> str:
        if shift is None or shift.mean is None:
            return notes.mark(ABSENT, _WHY_NULL["not-taken"])
        text = f"{shift.mean:+.3f}"
        if shift.low is None or shift.high is None:
            return notes.mark(text, _WHY_NULL.get(shift.reason or ""))
        return f"{text} [{shift.low:+.3f}, {shift.high:+.3f}]"

    return Sheet(
        "Drift in nats, arm less dense: log-probability of the right answer, its lead over the "
        "nearest wrong value where the two first differ, and log-odds of the first of two "
        "conflicting statements against the last",
        ("Context", "Method", "Answer", "Lead", "First statement", "Conflicts"),
        tuple(
            (
                *_key(arm),
                told(arm.logprob_shift),
                told(arm.margin_shift),
                told(arm.preference_shift),
                str(0 if arm.preference_shift is None else arm.preference_shift.items),
            )
            for arm in found.arms
            if arm.method != found.dense
        ),
    )


def _regret(found: Findings) -> list[Sheet]:
    """Retention beside that of the best and of a blind choice."""
    rows = []
    for arm in found.compared:
        if arm.method in YARDSTICKS or arm.answers is None:
            continue
        for name in YARDSTICKS:
            other = found.arm(arm.length, name)
            for place in PLACES:
                ours = arm.places.get(place)
                theirs = None if other is None else other.places.get(place)
                if ours is None or theirs is None:
                    continue
                mine, best = ours.retention.value, theirs.retention.value
                if mine is None or best is None or other is None or other.computed is None:
                    continue
                rows.append(
                    (
                        *_key(arm),
                        name,
                        PLACE_WORDS[place],
                        significant(arm.computed.density if arm.computed else None, 2),
                        significant(other.computed.density, 2),
                        f"{100 * mine:.1f} %",
                        f"{100 * best:.1f} %",
                        f"{100 * (best - mine):+.1f} points",
                    )
                )
    if not rows:
        return []
    return [
        Sheet(
            "Regret: what an oracle index keeps, and what a random one does; the oracle's lead is "
            "the choice's fault, the rest of the loss the budget's",
            (
                "Context",
                "Method",
                "Yardstick",
                "Questions",
                "Density",
                "Its density",
                "Kept",
                "It keeps",
                "Difference",
            ),
            tuple(rows),
        )
    ]


def _verdicts(found: Findings, notes: _Footnotes) -> Sheet:
    rows = []
    for arm in found.compared:
        if arm.verdict is None:
            continue
        least, even = arm.detectable, arm.disparity
        kinds = [v for v in least.one_kind.values() if v is not None] if least else []
        rows.append(
            (
                *_key(arm),
                _told(arm.verdict.loss, notes),
                _verdict(arm.verdict),
                ABSENT if least is None or least.loss is None else f"{100 * least.loss:.1f} points",
                f"{100 * max(kinds):.0f} points" if kinds else ABSENT,
                ABSENT
                if even is None or even.ratio is None
                else f"{even.ratio:.2f} ({even.worst} / {even.best})",
                ABSENT if even is None else f"{even.by_chance:.2f}",
                _trend(arm.trend),
            )
        )
    return Sheet(
        "Verdict over all questions, on lost less gained; the least loss, overall and of one kind, "
        "that this audit would find in 80 % of cases; worst kind over best, and what that falls "
        "to by chance; how much more is lost at the end of the context than at its start, by a "
        "straight line",
        (
            "Context",
            "Method",
            "Net loss",
            "Verdict",
            "Detectable",
            "Of one kind",
            "Disparity",
            "By chance",
            "Start to end",
        ),
        tuple(rows),
    )


def _cost(found: Findings, notes: _Footnotes) -> Sheet:
    return Sheet(
        "What the audit measured of each arm's prefills",
        ("Context", "Method", "Prompts", "Tokens", "Joules", "By", "Seconds"),
        tuple(
            (
                *_key(arm),
                str(arm.cost.prompts),
                str(arm.cost.tokens),
                notes.mark(significant(arm.cost.joules, 3), arm.cost.reason),
                arm.cost.obtained,
                significant(arm.cost.seconds, 3),
            )
            for arm in found.arms
        ),
    )


def _facts(found: Findings) -> tuple[tuple[str, str], ...]:
    header = found.audit.header
    print_, plan = header.fingerprint, header.plan
    devices = "; ".join([d.name for d in print_.devices if not print_.cpu.startswith(d.name)])
    versions = [f"{k} {v}" for k, v in print_.software.items() if k in ("torch", "triton", "cuda")]
    each = plan.inside + plan.after + plan.end
    right = ", ".join(
        f"{found.dense_right(n)[0]} of {found.dense_right(n)[1]} at {format_length(n)}"
        for n in plan.context_lengths
    )
    joules = found.joules
    kernels = {b.context_length: b.chosen for b in found.audit.of(Backends)}
    asked = (
        f"{plan.haystacks} haystacks of {each} questions ({plan.inside} inside, {plan.after} "
        f"after, {plan.end} at the end) on {len(plan.kinds)} kinds, in {Path(plan.filler).name}, "
        f"seed {plan.seed}{', quick' if plan.quick else ''}"
    )
    if plan.text is not None:
        # The name alone: a report is shown to others, and where a file lay is nobody's business.
        read = f"{Path(plan.text).name} was read, sha256 {str(plan.text_sha256)[:16]}"
        asked = f"nothing; {read}"
    return (
        ("Machine", "; ".join([*([devices] if devices else []), print_.cpu, *versions])),
        (
            "Model",
            f"{print_.model} at {print_.model_revision}, {print_.weights}, "
            f"{significant(print_.parameters / 1e6, 3)} M parameters, {print_.dtype}",
        ),
        ("Asked", asked),
        *((("Dense right", right),) if plan.text is None else ()),
        *(
            (("Dense kernel", ", ".join(f"{k} at {format_length(n)}" for n, k in kernels.items())),)
            if kernels
            else ()
        ),
        ("Energy", header.energy),
        *(
            (
                (
                    "This audit",
                    f"{significant(joules, 3)} J in {significant(found.seconds, 3)} s of set-up, "
                    "prefills and questions",
                ),
            )
            if plan.text is None
            else ()
        ),
        ("Audit", f"{header.audit_id}, {header.created_at}, minference-green {header.version}"),
    )


def _doubts(found: Findings, directory: Path | None) -> Iterator[str]:
    audit, plan = found.audit, found.audit.header.plan
    if audit.cut:
        yield "The last line of the audit file was cut short and is left out."
    if not audit.complete:
        yield (
            f"Incomplete: {audit.answers_done} of {audit.answers_planned} answers. Go on with: "
            f"green-bench audit --resume {quote(str(directory or audit.header.audit_id))}"
        )
    if plan.quick and plan.text is None:
        yield "Quick audit: few haystacks, which can show only a large loss."
    if audit.header.fingerprint.weights != "trained":
        yield "The weights are invented: the model knows no text, its answers mean nothing."
    for arm in found.arms:
        density = arm.computed.density if arm.computed else None
        if arm in found.compared and density is not None and density > WHOLE:
            yield (
                f"{arm.method} computes {density:.0%} at {format_length(arm.length)}: these "
                "budgets leave almost nothing out, so almost nothing can be lost; ask longer "
                "prompts or give smaller budgets"
            )
    for skip in {(s.context_length, s.method): s for s in audit.of(Skip)}.values():
        yield f"Skipped {skip.method} at {format_length(skip.context_length)}: {skip.reason}"
    yield from dict.fromkeys(n.message for n in audit.of(Note))
    if any(
        r.obtained == "simulated"
        for s in audit.events
        if hasattr(s, "readings")
        for r in s.readings
    ):
        yield "Joules are simulated: no device was read, they prove nothing about one."


WHOLE = 0.8
"""From this density on there is little left out."""
