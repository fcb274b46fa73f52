"""What an audit shows: its records turned into figures, all statistics from ``retention``.

Every arm is held against dense prefill on the same questions. Facts with two conflicting
statements have no right answer: they enter the preference shift and nothing else.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from minference_green.answers import Answer, Answers, collect
from minference_green.detectable import Detectable
from minference_green.errors import UsageError
from minference_green.groups import GroupTest, Trend, by_depth, by_kind, depth_trend
from minference_green.ledger import (
    NOISE_FLOOR,
    Answered,
    Asked,
    AskedQuestion,
    Audit,
    Computed,
    Spent,
)
from minference_green.results import Skip
from minference_green.retention import (
    Disparity,
    Flips,
    LossVerdict,
    Share,
    Shift,
    detectable,
    disparity,
    flips,
    judge,
    retention,
    shift,
)
from minference_green.validity import SHORT_WINDOW_SECONDS

PLACES = ("inside", "after", "end")
"""Where questions are asked, the hard case first."""

YARDSTICKS = ("oracle", "oracle-keys", "random")
"""Arms that tell how much of a loss the budget explains, and how much the choice."""


@dataclass(frozen=True)
class Item:
    """One question with what dense prefill and an arm answered."""

    haystack: int
    asked: AskedQuestion
    dense: Answered
    arm: Answered
    at: int
    """Which of the haystack's questions it is."""

    @property
    def change(self) -> float:
        """Of the right answer's log-probability, in nats."""
        return self.arm.logprob[self.at] - self.dense.logprob[self.at]

    @property
    def margin_change(self) -> float | None:
        """Of the lead over the nearest wrong value in the text."""
        return _difference(self.arm.margin[self.at], self.dense.margin[self.at])

    @property
    def preference_change(self) -> float | None:
        """Of the log-odds between two conflicting statements."""
        return _difference(self.arm.preference[self.at], self.dense.preference[self.at])

    def answer(self, part: "Part", length: int, change: float | None) -> Answer | None:
        """As the statistics take it; ``None`` where the answer has no such part."""
        dense, arm = _right(self.dense, part, self.at), _right(self.arm, part, self.at)
        if dense is None or arm is None:
            return None
        return Answer(
            haystack=self.haystack,
            kind=self.asked.kind,
            depth=min(1.0, self.asked.depth),
            # A prompt's last row serves its end question as it serves one asked after it.
            place="inside" if self.asked.place == "inside" else "after",
            context_tokens=length,
            dense_right=dense,
            sparse_right=arm,
            log_probability_change=change,
        )


Part = Literal["whole", "first", "rest"]
"""``whole`` answer, its ``first`` token, or the ``rest``."""


@dataclass(frozen=True)
class Place:
    """Retention of the questions of one place."""

    items: int
    dense_right: int
    retention: Share
    first: Share
    """Of the first token: what a row of the prompt itself produced, or the first after it."""
    rest: Share
    verdict: LossVerdict


@dataclass(frozen=True)
class Treated:
    """Facts stated in one way: once, repeatedly, updated, over hops, beside a neighbour."""

    name: str
    dense_right: int
    lost: int
    retention: Share


@dataclass(frozen=True)
class Cost:
    """What an arm's prefills cost, from windows that held nothing else."""

    prompts: int
    tokens: int
    seconds: float
    joules: float | None
    obtained: str
    reason: str | None
    """Why joules are null, or what limits them."""

    @property
    def seconds_per_mtok(self) -> float | None:
        """Seconds per million prompt tokens."""
        return 1e6 * self.seconds / self.tokens if self.tokens else None

    @property
    def joules_per_mtok(self) -> float | None:
        """Joules per million prompt tokens."""
        return None if self.joules is None or not self.tokens else 1e6 * self.joules / self.tokens


@dataclass(frozen=True)
class Arm:
    """One method at one length, against dense prefill of the same haystacks."""

    length: int
    method: str
    items: tuple[Item, ...]
    margin: float
    """Least loss that matters, as a share."""
    cost: Cost
    computed: Computed | None

    @cached_property
    def answers(self) -> Answers | None:
        """All questions with a right answer; ``None`` without any."""
        return self._answers("whole", lambda item: item.change)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """By where questions were asked; only places with questions."""
        return {place: found for place in PLACES if (found := self._place(place))}

    @cached_property
    def flips(self) -> Flips | None:
        """Answers that changed, in both directions."""
        return None if self.answers is None else flips(self.answers)

    @cached_property
    def verdict(self) -> LossVerdict | None:
        """Over all questions: lost less gained, so that rounding both ways is no loss."""
        return None if self.answers is None else judge(self.answers, self.margin, "net")

    @cached_property
    def kinds(self) -> GroupTest | None:
        """Which kinds of information lose more than the rest, by Holm at 5 %."""
        return None if self.answers is None else by_kind(self.answers, "net")

    @cached_property
    def depths(self) -> GroupTest | None:
        """Which depths lose more than the rest."""
        return None if self.answers is None else by_depth(self.answers, "net")

    @cached_property
    def trend(self) -> Trend | None:
        """How the loss changes from the start of the context to its end."""
        return None if self.answers is None else depth_trend(self.answers, "net")

    @cached_property
    def disparity(self) -> Disparity | None:
        """Worst kind over best."""
        return None if self.answers is None else disparity(self.answers)

    @cached_property
    def detectable(self) -> Detectable | None:
        """Least effects that this audit would find in 80 % of cases."""
        return None if self.answers is None else detectable(self.answers, self.margin, "net")

    @cached_property
    def logprob_shift(self) -> Shift | None:
        """Of the right answers' log-probability, in nats."""
        return None if self.answers is None else shift(self.answers)

    @cached_property
    def margin_shift(self) -> Shift | None:
        """Of the lead over the nearest wrong value of the text, in nats."""
        found = self._answers("whole", lambda item: item.margin_change)
        return None if found is None else shift(found)

    @cached_property
    def preference_shift(self) -> Shift | None:
        """Between conflicting statements, towards the first stated, in nats of log-odds."""
        conflicting = [i for i in self.items if i.preference_change is not None]
        found = _collected(conflicting, "whole", self.length, lambda i: i.preference_change)
        return None if found is None else shift(found)

    @cached_property
    def treatments(self) -> tuple[Treated, ...]:
        """Retention by how a fact is stated, what stands beside it, and hops to it."""
        groups: dict[str, list[Item]] = {}
        for item in self.items:
            if item.asked.regime != "conflicting":
                groups.setdefault(treatment(item.asked), []).append(item)
        found = []
        for name in sorted(groups, key=_treatment_order):
            answers = _collected(groups[name], "whole", self.length, lambda item: item.change)
            assert answers is not None
            lost = int((answers.dense_right & ~answers.sparse_right).sum())
            right = int(answers.dense_right.sum())
            found.append(Treated(name, right, lost, retention(answers)))
        return tuple(found)

    def kept(self, kind: str, place: str) -> tuple[int, int]:
        """Answers kept, and those dense gave right, of a kind at a place."""
        chosen = [
            i
            for i in self.items
            if i.asked.kind == kind
            and i.asked.place == place
            and i.asked.regime != "conflicting"
            and i.dense.right[i.at]
        ]
        return sum(i.arm.right[i.at] for i in chosen), len(chosen)

    def _answers(
        self,
        part: Part,
        change: Callable[[Item], float | None],
        place: str | None = None,
    ) -> Answers | None:
        chosen = [
            item
            for item in self.items
            if item.asked.regime != "conflicting" and place in (None, item.asked.place)
        ]
        return _collected(chosen, part, self.length, change)

    def _place(self, place: str) -> Place | None:
        whole = self._answers("whole", lambda item: item.change, place)
        if whole is None:
            return None
        first, rest = (
            self._answers(part, lambda item: item.change, place) for part in ("first", "rest")
        )
        none = Share(None, None, None, 0, 0, None, "no-answers")
        return Place(
            items=len(whole),
            dense_right=int(whole.dense_right.sum()),
            retention=retention(whole),
            first=none if first is None else retention(first),
            rest=none if rest is None else retention(rest),
            verdict=judge(whole, self.margin, "net"),
        )


@dataclass(frozen=True)
class Findings:
    """Everything an audit shows, arm by arm in the order asked for."""

    audit: Audit
    arms: tuple[Arm, ...]
    """Every arm at every length but those that never answered; dense is among them."""

    def arm(self, length: int, method: str) -> Arm | None:
        """The arm of this name at this length, if it answered anything."""
        found = (a for a in self.arms if a.length == length and a.method == method)
        return next(found, None)

    @property
    def compared(self) -> tuple[Arm, ...]:
        """The arms that are held against dense: not itself, and not the noise floor."""
        own = (self.dense, NOISE_FLOOR)
        return tuple(a for a in self.arms if a.method not in own)

    @property
    def dense(self) -> str:
        """Name of the arm all others are held against."""
        return self.audit.header.methods[0].name

    def dense_right(self, length: int) -> tuple[int, int]:
        """Questions that dense prefill answers right at a length, and all."""
        arm = self.arm(length, self.dense)
        if arm is None or arm.answers is None:
            return 0, 0
        return int(arm.answers.dense_right.sum()), len(arm.answers)

    @property
    def joules(self) -> float | None:
        """Of the whole audit: set-up, prefills and questions; null if any is unknown."""
        parts = [s.joules for s in self.audit.of(Spent)]
        if not parts or any(p is None for p in parts):
            return None
        return math.fsum(p for p in parts if p is not None)

    @property
    def seconds(self) -> float:
        """Of the same stretches."""
        return math.fsum(s.seconds for s in self.audit.of(Spent))


def findings(audit: Audit) -> Findings:
    """The figures of an audit; each is computed when it is first asked for."""
    asked = {(a.context_length, a.haystack): a for a in audit.of(Asked)}
    answered: dict[tuple[int, str], dict[int, Answered]] = {}
    for a in audit.of(Answered):
        answered.setdefault((a.context_length, a.method), {})[a.haystack] = a
    skipped = {(s.context_length, s.method) for s in audit.of(Skip)}
    computed = {(c.context_length, c.method): c for c in audit.of(Computed)}
    dense = audit.header.methods[0].name
    arms = []
    for length in audit.header.plan.context_lengths:
        reference = answered.get((length, dense), {})
        for method in (m.name for m in audit.header.methods):
            found = answered.get((length, method), {})
            if not found or (length, method) in skipped:
                continue
            arms.append(
                Arm(
                    length=length,
                    method=method,
                    items=tuple(_items(asked, length, reference, found)),
                    margin=audit.header.plan.margin_points / 100,
                    cost=cost(audit, length, method),
                    computed=computed.get((length, method)),
                )
            )
    return Findings(audit, tuple(arms))


def cost(audit: Audit, length: int, method: str) -> Cost:
    """What the valid prefill windows of an arm add up to."""
    windows = [
        s
        for s in audit.of(Spent)
        if (s.what, s.context_length, s.method) == ("prefill", length, method)
    ]
    valid = [w for w in windows if w.valid]
    joules = [w.joules for w in valid]
    known = bool(joules) and all(j is not None for j in joules)
    reasons = [r for w in windows for r in w.reasons]
    shortest = min((w.seconds for w in windows), default=0.0)
    if not known:
        reasons = [*reasons, "no energy was measured"]
    elif shortest < SHORT_WINDOW_SECONDS:
        reasons.append(
            f"windows below {SHORT_WINDOW_SECONDS:g} s, too short for a meter to tell well; "
            "green-bench run measures energy"
        )
    return Cost(
        prompts=sum(w.prompts for w in valid),
        tokens=sum(w.tokens for w in valid),
        seconds=math.fsum(w.seconds for w in valid),
        joules=math.fsum(j for j in joules if j is not None) if known else None,
        obtained="+".join(sorted({w.obtained for w in valid})) or "none",
        reason=reasons[0] if reasons else None,
    )


def treatment(asked: AskedQuestion) -> str:
    """How a fact is put, in one word or two."""
    if asked.regime == "repeated":
        return f"{asked.mentions} mentions"
    if asked.regime != "single":
        return asked.regime
    if asked.hops > 1:
        return f"{asked.hops} hops"
    if asked.neighbour != "none":
        return f"beside {asked.neighbour}"
    return "plain"


def _treatment_order(name: str) -> tuple[bool, str]:
    return name != "plain", name


def _items(
    asked: Mapping[tuple[int, int], Asked],
    length: int,
    reference: Mapping[int, Answered],
    found: Mapping[int, Answered],
) -> Iterable[Item]:
    for haystack in sorted(reference.keys() & found.keys()):
        questions = asked[length, haystack].questions if (length, haystack) in asked else ()
        if not len(questions) == len(reference[haystack].logprob) == len(found[haystack].logprob):
            raise UsageError(
                f"haystack {haystack} at {length} tokens asks {len(questions)} questions, "
                "its answers are to others; the file was damaged or edited: restore it"
            )
        for at, question in enumerate(questions):
            yield Item(haystack, question, reference[haystack], found[haystack], at)


def _collected(
    items: Sequence[Item],
    part: Part,
    length: int,
    change: Callable[[Item], float | None],
) -> Answers | None:
    rows = [a for item in items if (a := item.answer(part, length, change(item)))]
    return collect(rows) if rows else None


def _right(answered: Answered, part: Part, at: int) -> bool | None:
    match part:
        case "first":
            return answered.first_right[at]
        case "rest":
            return answered.rest_right[at]
    return answered.right[at]


def _difference(arm: float | None, dense: float | None) -> float | None:
    return None if arm is None or dense is None else arm - dense
