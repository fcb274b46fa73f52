"""A run as plain data: the records of its file, ``run.jsonl``.

The file is a journal (see :mod:`minference_green.journal`). Nothing else is stored; every
figure of a report is a function of these records. Units are in the names; joules are null with
a reason where they could not be measured.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from minference_green.errors import UsageError
from minference_green.journal import Record, Recorded, Seal, read_records
from minference_green.workload import Workload

SCHEMA = "1.0"
"""Major and minor version of the file format; another major is not comparable."""

FILE_NAME = "run.jsonl"

Obtained = Literal["counter", "sampled", "modelled", "replayed", "simulated"]
"""How joules were obtained; the word stands on every surface that shows them. ``simulated``
comes from no device at all."""


Phase = Literal["prefill", "decode", "request"]
"""What a window repeats: the prompt, the tokens generated after it, or both as one request."""


class Reading(Record):
    """Energy of one device over one window."""

    device: str
    """GPU UUID, or ``cpu``."""
    scope: str
    """What the figure covers: ``board``, ``module``, ``package``, ``cpu model``."""
    obtained: Obtained
    source: str
    """In words: which counter, field or model."""
    joules: float | None
    reason: str | None = None
    """Why ``joules`` is null, or what casts doubt on it."""
    uncertainty_joules: float | None = None
    check_joules: float | None = None
    """An independent integral of sampled power over the same window."""
    disputed: bool = False
    """Counter and independent integral disagree beyond the stated tolerance."""
    headline: bool = True
    """False for figures shown beside the headline and never added to it."""
    evidence: dict[str, float] = Field(default_factory=dict)
    """Raw numbers ``joules`` was computed from."""


def headline_joules(readings: Sequence[Reading]) -> float | None:
    """Joules summed over the devices of the headline; null if any device's is null."""
    parts = [r.joules for r in readings if r.headline]
    if not parts or any(p is None for p in parts):
        return None
    return sum(p for p in parts if p is not None)


def headline_obtained(readings: Sequence[Reading]) -> str:
    """How the joules of the headline were obtained, each way once; ``none`` without readings."""
    return "+".join(sorted({r.obtained for r in readings if r.headline})) or "none"


class DeviceState(Record):
    """State of one GPU at a moment; null where the device does not tell."""

    device: str
    temperature_celsius: float | None = None
    memory_temperature_celsius: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_limit_watts: float | None = None
    memory_used_bytes: int | None = None
    throttle_seconds: dict[str, float] = Field(default_factory=dict)
    """Cumulative time by cause: ``power_cap``, ``thermal``, ``power_brake``..."""


class Device(Record):
    """One device of the machine that runs the model or supplies the energy reading."""

    kind: Literal["gpu", "cpu"]
    name: str
    uuid: str | None = None
    memory_bytes: int | None = None
    power_limit_watts: float | None = None
    mig_profile: str | None = None
    capability: str | None = None
    driver: str | None = None


class DoctorMark(Record):
    """What ``green-bench doctor`` last found of a device, before the run."""

    device: str
    created_at: str
    outcome: str
    """``OK``, ``WARN`` or ``FAIL``."""
    failing: tuple[str, ...] = ()
    """Checks that failed; windows read on the device are disputed then."""


class Fingerprint(Record):
    """What a figure depends on. Hard keys make joules incomparable, subject keys are judged."""

    devices: tuple[Device, ...]
    model: str
    model_revision: str
    """Commit or content hash; for built-in models the recipe's version."""
    weights: str
    """``trained`` or ``planted weights``; shown wherever a figure is."""
    parameters: int
    dtype: str
    workload_hash: str
    software: dict[str, str]
    kernel_hash: str
    rest: str = "stock"
    """How everything but attention ran: ``stock``, or which of its steps were fused."""
    code_commit: str | None
    code_dirty: bool | None
    cpu: str = ""
    hostname_hash: str = ""
    doctor: tuple[DoctorMark, ...] = ()
    """Devices that were examined; empty says that none was."""


class EmissionFactor(Record):
    """Grams of CO2e per kWh, with where the number comes from."""

    g_per_kwh: float
    location: str
    year: int | None
    kind: str
    """``average`` for the tables shipped; ``user supplied``."""
    boundary: str
    """``lifecycle`` or ``CO2 only``, or what the source says."""
    source: str
    file: str | None = None
    sha256: str | None = None
    assumed: bool = False
    """No location was given: the world average stands in, marked wherever it is shown."""
    relative_uncertainty: float = 0.10


class CarbonTerms(Record):
    """What turns joules into grams."""

    factor: EmissionFactor
    pue: float = 1.0
    embodied_g_per_second: float = 0.0
    embodied_source: str = ""


class MethodSpec(Record):
    """A prefill method and its parameters, as measured."""

    name: str
    parameters: dict[str, Any]


class Plan(Record):
    """The experiment's shape."""

    blocks: int
    window_seconds: float
    warmup_seconds: float
    quick: bool
    decode_tokens: int = 0
    """Tokens generated per sequence in decode and request windows; 0 for prefill alone."""


class Header(Record):
    """First line of a run file."""

    event: Literal["header"] = "header"
    schema_version: str = SCHEMA
    run_id: str
    created_at: str
    version: str
    command: tuple[str, ...]
    fingerprint: Fingerprint
    workload: Workload
    methods: tuple[MethodSpec, ...]
    """In the order asked for; the first is the reference."""
    plan: Plan
    carbon: CarbonTerms
    energy: str
    """In words: how energy is obtained on this machine."""
    request: dict[str, Any]
    """What the run was asked to do, as needed to resume it."""


class Setup(Record):
    """Cost of getting a block ready: loading, compiling, warming up; outside every window."""

    event: Literal["setup"] = "setup"
    block: int
    load_seconds: float
    warmup_seconds: float
    readings: tuple[Reading, ...]


class Backends(Record):
    """Every dense SDPA backend timed on the run's own shapes; the fastest is the baseline."""

    event: Literal["backends"] = "backends"
    block: int
    context_length: int
    dtype: str
    seconds: dict[str, float | None]
    """Median seconds per call; null where the backend refuses the shape."""
    reasons: dict[str, str] = Field(default_factory=dict)
    chosen: str


class Divergence(Record):
    """How far next-token distributions are from the reference arm's; means over positions."""

    positions: int
    kl_nats: float
    """Kullback-Leibler divergence of the arm from the reference."""
    js_nats: float
    """Jensen-Shannon divergence, at most log 2."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    nll_change_nats: float | None
    """Of the prompt's own next token, arm less reference; null where none follows."""


class Recall(Record):
    """Share of its dense attention mass that an arm kept; means over sampled rows."""

    by_head: tuple[tuple[float, ...], ...]
    """Per served layer and query head."""
    by_decile: tuple[tuple[float | None, ...], ...]
    """Per served layer and tenth of the prompt, over heads; null where no row was sampled."""

    @property
    def mean(self) -> float:
        """Over all heads."""
        return fmean(value for layer in self.by_head for value in layer)

    @property
    def worst_head(self) -> float:
        """The head that kept least."""
        return min(value for layer in self.by_head for value in layer)


class Faithfulness(Record):
    """What an arm's attention and output lost against the reference arm on the same prompt."""

    prompt: Divergence
    """At positions spread over the whole prompt."""
    last_rows: Divergence
    """At the last 64 positions, which the estimators of some methods look at."""
    beyond_whole_rows: Divergence | None = None
    """Of the positions spread over the prompt, those at ``whole_rows`` and later."""
    whole_rows: int | None = None
    """Leading rows that see all their keys in every head of every served layer; null if the
    method does not tell its pairs."""
    kl_nats_by_decile: tuple[float | None, ...]
    """Per tenth of the prompt."""
    layers: tuple[int, ...]
    """The layers that the method serves, in the order of every list per layer."""
    rows: int
    """Sampled per layer and head for recall, error and drift."""
    recall: Recall | None = None
    """On the queries and keys of the reference arm's run: what the choice of pairs costs."""
    recall_in_situ: Recall | None = None
    """On the arm's own queries and keys, which earlier layers have changed."""
    recall_reason: str | None = None
    output_error: tuple[float, ...]
    """Relative RMS error of a layer's attention output on the reference arm's inputs."""
    residual_cosine: tuple[float, ...]
    """Between the two arms' residual streams after a layer; mean over rows."""


class LayerChoice(Record):
    """What was predicted for one layer, and what it runs."""

    layer: int
    density: float
    """Mean over heads of visible over causal pairs, as seen in the warm-up."""
    dense_seconds: float
    sparse_seconds: float
    doubt_seconds: float
    """Standard error of their difference; sparse runs where it wins by more."""
    runs: Literal["dense", "sparse"]


class Decision(Record):
    """Where an arm that chooses between dense and sparse runs which, decided before measuring."""

    event: Literal["decision"] = "decision"
    block: int
    context_length: int
    method: str
    law: str
    """Which law of attention times predicted."""
    layers: tuple[LayerChoice, ...]


class Observation(Record):
    """What an arm computed and lost at one length; taken outside energy windows."""

    event: Literal["observation"] = "observation"
    block: int
    context_length: int
    method: str
    density: float | None
    """Mean over layers and heads of visible over causal pairs."""
    density_by_layer: tuple[tuple[float, ...], ...] = ()
    density_reason: str | None = None
    logits_relative_error: float | None = None
    """Norm of the last position's logit difference to the reference arm over its norm."""
    top1_agreement: float | None = None
    """Share of sampled prompt positions whose most likely next token is the reference's."""
    sampled_positions: int = 0
    faithfulness: Faithfulness | None = None
    faithfulness_reason: str | None = None
    """Why there is none; null in runs from before it was observed."""
    estimate_seconds: float | None = None
    index_seconds: float | None = None
    attend_seconds: float | None = None
    notes: tuple[str, ...] = ()


class Window(Record):
    """One measured interval: the same prefill repeated, edge to edge."""

    event: Literal["window"] = "window"
    block: int
    order: int
    """Position in the block's sequence of windows for this length."""
    context_length: int
    method: str
    phase: Phase = "prefill"
    repeats: int
    tokens: int
    """Unpadded prompt tokens computed in the window; for decode the tokens generated, less one
    per sequence, which prefill produced; for whole requests both."""
    start_seconds: float
    """Monotonic clock, as ``end_seconds``."""
    end_seconds: float
    device_seconds: float | None = None
    """The same interval by device events."""
    started_at: str
    readings: tuple[Reading, ...]
    before: tuple[DeviceState, ...] = ()
    after: tuple[DeviceState, ...] = ()
    peak_memory_bytes: int | None = None
    """Most device memory allocated during the window, weights included; null on a CPU."""
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


class Idle(Record):
    """Power with the model resident and nothing running."""

    event: Literal["idle"] = "idle"
    block: int
    when: Literal["before", "after"]
    seconds: float
    readings: tuple[Reading, ...]


class Replay(Record):
    """One part of a prefill repeated alone, in a window of its own."""

    event: Literal["replay"] = "replay"
    block: int
    context_length: int
    method: str
    part: str
    """``estimate``, ``index`` or ``attention`` of the layers named, or ``rest``: a whole prefill
    whose attention returns its queries."""
    layers: tuple[int, ...]
    """Layers whose captured queries, keys and values were replayed; empty for ``rest``."""
    layers_in_all: int
    """Layers of the model that the method serves."""
    repeats: int
    start_seconds: float
    end_seconds: float
    readings: tuple[Reading, ...]
    valid: bool = True
    reasons: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of a whole prefill's such part that one repeat is."""
        return len(self.layers) / self.layers_in_all if self.layers else 1.0


class Skip(Record):
    """A cell of the matrix that was not measured, with the reason."""

    event: Literal["skip"] = "skip"
    block: int
    context_length: int
    method: str
    reason: str


class Note(Record):
    """A doubt or a hint that belongs to the run."""

    event: Literal["note"] = "note"
    message: str


class BlockDone(Record):
    """The block's worker finished; a resumed run goes on with the next block."""

    event: Literal["block_done"] = "block_done"
    block: int


class Extension(Record):
    """The run was given more blocks after it had begun, and why."""

    event: Literal["extension"] = "extension"
    blocks: int
    """Planned from here on, those already measured included."""
    created_at: str
    reason: str


Event = Annotated[
    Header
    | Setup
    | Backends
    | Decision
    | Observation
    | Window
    | Idle
    | Replay
    | Skip
    | Note
    | BlockDone
    | Extension
    | Seal,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Run(Recorded[Header, Event]):
    """A run file in memory."""

    @property
    def windows(self) -> tuple[Window, ...]:
        """Every window, valid or not."""
        return tuple(self.of(Window))

    @property
    def blocks_done(self) -> frozenset[int]:
        """Blocks whose worker finished."""
        return frozenset(e.block for e in self.of(BlockDone))

    @property
    def blocks_planned(self) -> int:
        """Blocks planned at the start, or by the last extension."""
        return next(
            (e.blocks for e in reversed(self.events) if isinstance(e, Extension)),
            self.header.plan.blocks,
        )

    @property
    def complete(self) -> bool:
        """Whether every planned block finished."""
        return len(self.blocks_done) >= self.blocks_planned


def run_file(path: Path) -> Path:
    """The run file that ``path`` means: itself, or the ``run.jsonl`` inside a directory."""
    return path / FILE_NAME if path.is_dir() else path


def load(path: Path) -> Run:
    """Read a run from its file or directory; raises as :func:`journal.read_records` does."""
    file = run_file(path)
    if path.is_dir() and not file.exists():
        raise UsageError(f"{path} holds no {FILE_NAME}: {_meant(path)}")
    header, events, cut = read_records(file, "run", SCHEMA, EVENT, Header)
    return Run(header=header, events=events, cut=cut)


def _meant(folder: Path) -> str:
    """What may have been meant by a folder without a run."""
    if (folder / "audit.jsonl").exists():
        return "it is an audit, and a run is asked for; give what green-bench run wrote"
    inside = sorted(f.parent for f in (*folder.glob("*/run.jsonl"), *folder.glob("*/audit.jsonl")))
    if inside:
        return f"it is a folder of {len(inside)} others; name one of them, such as {inside[-1]}"
    return "give the directory of a run or an audit"
