"""An audit as plain data: what was asked, what each method answered, what it cost.

An audit is one file, ``audit.jsonl``, a journal (see :mod:`minference_green.journal`). Nothing
else is stored; every figure of a report is a function of these records.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from minference_green.journal import Record, Recorded, Seal, read_records
from minference_green.results import (
    Backends,
    DeviceState,
    Fingerprint,
    MethodSpec,
    Note,
    Reading,
    Skip,
    headline_joules,
    headline_obtained,
)

SCHEMA = "1.0"
"""Major and minor version of the file format."""

FILE_NAME = "audit.jsonl"

NOISE_FLOOR = "noise-floor"
"""The arm that computes every pair, through the sparse methods' kernels: what it flips is
rounding."""


class AuditPlan(Record):
    """What an audit asks of every arm."""

    context_lengths: tuple[int, ...]
    """Tokens of a prompt, the model's first token among them; with an end question those of the
    text and that question."""
    haystacks: int
    noise_haystacks: int
    """Of them, those that the noise floor is asked about."""
    inside: int
    after: int
    end: int
    """Questions of a haystack by their place, and with ``competitors`` the unasked facts of each
    kind."""
    competitors: int
    kinds: tuple[str, ...]
    filler: str
    """``prose``, ``records``, ``code`` or the path of a text file."""
    filler_sha256: str | None = None
    seed: int
    dtype: str
    margin_points: float
    """A loss of this many percentage points is the least that matters."""
    quick: bool
    text: str | None = None
    """The user's own text, which is prefilled in place of haystacks; nothing is asked about it."""
    text_sha256: str | None = None
    budgets: tuple[float, ...] = ()
    """Multiples of each sparse method's budgets that are arms of their own; empty: as given."""

    def haystacks_of(self, method: str) -> int:
        """Haystacks that an arm is asked about; the user's own text is one."""
        if self.text is not None:
            return 1
        return self.noise_haystacks if method == NOISE_FLOOR else self.haystacks


class AuditHeader(Record):
    """First line of an audit file."""

    event: Literal["header"] = "header"
    schema_version: str = SCHEMA
    audit_id: str
    created_at: str
    version: str
    command: tuple[str, ...]
    fingerprint: Fingerprint
    methods: tuple[MethodSpec, ...]
    """In the order asked for; the first is dense, the reference of every comparison."""
    plan: AuditPlan
    energy: str
    """In words: how energy is obtained on this machine."""
    request: dict[str, Any]
    """What the audit was asked to do, as needed to resume it."""


class AskedQuestion(Record):
    """One question and what may explain how it fares."""

    question: int
    fact: int
    kind: str
    place: str
    """``inside`` the prompt, at its ``end``, or ``after`` it, over its cache."""
    depth: float
    """Where the fact stands, as a share of the text."""
    regime: str
    neighbour: str
    hops: int
    mentions: int
    answer_bytes: int
    answer_tokens: int


class Asked(Record):
    """One haystack at one length: every question that each arm answers."""

    event: Literal["asked"] = "asked"
    context_length: int
    haystack: int
    tokens: int
    text_sha256: str
    questions: tuple[AskedQuestion, ...]


class Answered(Record):
    """What one arm answered to the questions of one haystack, in their order.

    An answer is right when each of its tokens is the most likely one after those before it,
    which is what greedy decoding would write. Log-probabilities are in nats.
    """

    event: Literal["answered"] = "answered"
    context_length: int
    haystack: int
    method: str
    first_right: tuple[bool, ...]
    """Of the first token alone: the one that a prompt's row, not a decoded one, produces."""
    rest_right: tuple[bool | None, ...]
    """Of all tokens after the first, given the right first; null for an answer of one token."""
    logprob: tuple[float, ...]
    """Of the whole answer."""
    first_logprob: tuple[float, ...]
    margin: tuple[float | None, ...]
    """Log-probability of the answer's token less that of a wrong value from the text, where the
    two first differ; the least over those values. Null where there is none."""
    fresh_margin: tuple[float | None, ...]
    """The same over values that stand nowhere in the text."""
    preference: tuple[float | None, ...]
    """Of two conflicting statements: log-odds of the first against the last, where they first
    differ; null for other facts."""

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each whole answer is right."""
        return tuple(
            first and rest is not False
            for first, rest in zip(self.first_right, self.rest_right, strict=True)
        )


class Computed(Record):
    """How much of dense attention an arm computes and keeps; on the first haystack, unmetered."""

    event: Literal["computed"] = "computed"
    context_length: int
    method: str
    density: float | None
    """Mean over layers and heads of visible over causal pairs; null if the method does not tell."""
    density_by_layer: tuple[tuple[float, ...], ...] = ()
    """Per served layer and query head."""
    recall: float | None = None
    """Share of dense attention mass kept: mean over layers, heads and sampled rows; null if the
    method does not tell."""
    recall_worst_head: float | None = None


class KindOfText(Record):
    """What a method's prefill of the user's own text lost of one kind of information."""

    kind: str
    tokens: int
    """Of this kind in the prompt."""
    attention: float | None
    """Share of all dense attention mass on them; null where recall is."""
    recall: float | None
    """Of that mass, the share kept; null if the method does not show its index."""
    positions: int
    """Rows before such tokens whose predictions were compared."""
    kl_nats: float | None
    """Of the arm's prediction from dense prefill's, mean over them; null without any."""
    top1_agreement: float | None
    nll_change_nats: float | None
    """Of the text's own token, arm less dense."""


class OfText(Record):
    """One method on the user's own text at one length, kind by kind."""

    event: Literal["of_text"] = "of_text"
    context_length: int
    method: str
    tokens: int
    kinds: tuple[KindOfText, ...]


class Spent(Record):
    """Energy and time of one stretch of the audit."""

    event: Literal["spent"] = "spent"
    what: Literal["setup", "prefill", "questions"]
    """Loading and warming up; prefills of some haystacks and nothing else; the questions asked
    over their caches, with the scoring."""
    context_length: int | None = None
    method: str | None = None
    prompts: int = 0
    tokens: int = 0
    """Prompt tokens prefilled; 0 for other stretches."""
    start_seconds: float
    """Monotonic clock, as ``end_seconds``."""
    end_seconds: float
    readings: tuple[Reading, ...]
    before: tuple[DeviceState, ...] = ()
    after: tuple[DeviceState, ...] = ()
    valid: bool = True
    reasons: tuple[str, ...] = ()
    """Why it is invalid, or marked."""

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.end_seconds - self.start_seconds

    @property
    def joules(self) -> float | None:
        """Headline joules summed over devices; null if any device's is null."""
        return headline_joules(self.readings)

    @property
    def obtained(self) -> str:
        """How the headline joules were obtained."""
        return headline_obtained(self.readings)


Event = Annotated[
    AuditHeader | Asked | Answered | Spent | Backends | Computed | OfText | Skip | Note | Seal,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Audit(Recorded[AuditHeader, Event]):
    """An audit file in memory."""

    @property
    def answers_planned(self) -> int:
        """Haystacks of every arm at every length, less what could not be run."""
        plan, skipped = self.header.plan, self._skipped
        return sum(
            plan.haystacks_of(method.name)
            for length in plan.context_lengths
            for method in self.header.methods
            if (length, method.name) not in skipped
        )

    @property
    def answers_done(self) -> int:
        """Answers on file, of arms that were not given up."""
        skipped = self._skipped
        if self.header.plan.text is not None:
            return sum((o.context_length, o.method) not in skipped for o in self.of(OfText))
        return sum((a.context_length, a.method) not in skipped for a in self.of(Answered))

    @property
    def _skipped(self) -> set[tuple[int, str]]:
        return {(s.context_length, s.method) for s in self.of(Skip)}

    @property
    def complete(self) -> bool:
        """Whether every arm that could run has answered every haystack."""
        return self.answers_done >= self.answers_planned


def audit_file(path: Path) -> Path:
    """The audit file that ``path`` means: itself, or the ``audit.jsonl`` inside a directory."""
    return path / FILE_NAME if path.is_dir() else path


def load_audit(path: Path) -> Audit:
    """Read an audit from its file or directory; raises as :func:`journal.read_records` does."""
    file = audit_file(path)
    header, events, cut = read_records(file, "audit", SCHEMA, EVENT, AuditHeader)
    return Audit(header=header, events=events, cut=cut)
