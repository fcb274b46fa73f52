"""What an audit is asked to do, and what that means on a device."""

import stat
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from shlex import quote

from pydantic import Field

from minference_green.corpus.kinds import KINDS
from minference_green.errors import UsageError
from minference_green.journal import Record
from minference_green.ledger import AuditPlan

DENSE = "dense"

HAYSTACKS = 120
"""240 paired items of each kind and length with the default 28 questions."""

THOROUGH_HAYSTACKS = 600

QUICK_HAYSTACKS = 6
"""On two cores these and the start take about 40 s, with a second sparse method a minute."""

CPU_NOISE_HAYSTACKS = 1
"""A CPU computes in fp32, where rounding flips next to nothing, and all pairs cost it minutes."""

LEAST_TEXT_TOKENS = 1024
"""A shorter text gives a sparse method nothing to leave out."""

LEAST_FILLER_BYTES = 2000
"""A text of the user's own must have some: a line repeated a thousand times is no document."""

MOST_FILE_BYTES = 64 * 2**20
"""Of a file of the user's own: more than any prompt holds, and less than fills a memory."""

FULL_RECIPE_TOKENS = 8 * 1024
"""From here on a prompt has room for 28 questions even where a token is a byte; shorter ones
are asked 14, among fewer other facts."""

FRONTIER_BUDGETS = (0.25, 0.5, 1.0, 2.0)


class AuditRequest(Record):
    """Everything an audit was asked to do; stored in its header so that it can be resumed.

    What is ``None``, ``auto`` or empty is decided by :func:`resolve` once the device is known.
    """

    model: str = "embedded"
    methods: tuple[str, ...] = (DENSE, "minference")
    options: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Method name to option name to value, as typed."""
    context_lengths: tuple[int, ...] = ()
    haystacks: int | None = None
    kinds: tuple[str, ...] = ()
    """Kinds to ask about; empty: all."""
    filler: str = "prose"
    filler_sha256: str | None = None
    text: str | None = None
    text_sha256: str | None = None
    quick: bool = False
    thorough: bool = False
    frontier: bool = False
    margin_points: float = 2.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    meter: str = "auto"
    allow_shared: bool = False
    allow_longer: bool = False
    command: tuple[str, ...] = ()


def resolve(request: AuditRequest, device_kind: str) -> AuditPlan:
    """What a request means on a ``gpu`` or a ``cpu``.

    A quick audit gives a first answer within a minute on a small CPU, can show only a large loss
    and asks no question at a prompt's end, which would take a second prefill. Raises
    ``UsageError`` for settings that contradict each other or name nothing.
    """
    gpu = device_kind == "gpu"
    quick = request.quick or not (gpu or request.thorough)
    if request.quick and request.thorough:
        raise UsageError("--quick and --thorough contradict each other; give one")
    if request.haystacks is not None and request.thorough:
        raise UsageError("--haystacks and --thorough both say how many; give one")
    usual = THOROUGH_HAYSTACKS if request.thorough else QUICK_HAYSTACKS if quick else HAYSTACKS
    haystacks = usual if request.haystacks is None else request.haystacks
    if haystacks < 1:
        raise UsageError(f"--haystacks {haystacks} must be 1 or more")
    if not 0 < request.margin_points < 100:
        raise UsageError(
            f"--margin {request.margin_points:g} must be more than 0 and less than 100 points"
        )
    lengths = request.context_lengths or ((64 * 1024,) if gpu and not quick else (4 * 1024,))
    short = min(lengths) < FULL_RECIPE_TOKENS
    return AuditPlan(
        context_lengths=tuple(sorted(set(lengths))),
        haystacks=haystacks,
        noise_haystacks=haystacks if gpu else min(haystacks, CPU_NOISE_HAYSTACKS),
        inside=7 if short else 14,
        after=7 if short else 14,
        end=0 if quick else 1,
        competitors=1 if short else 3,
        kinds=known_kinds(request.kinds),
        filler=request.filler,
        filler_sha256=request.filler_sha256,
        seed=request.seed,
        dtype=("bfloat16" if gpu else "float32") if request.dtype == "auto" else request.dtype,
        margin_points=request.margin_points,
        quick=quick,
        text=request.text,
        text_sha256=request.text_sha256,
        budgets=FRONTIER_BUDGETS if request.frontier else (),
    )


def known_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The kinds named, in their own order; all without a name.

    Raises ``UsageError`` for an unknown one, with the nearest valid name.
    """
    for name in names:
        if name not in KINDS:
            near = get_close_matches(name, KINDS, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"--kinds {name!r} is not a kind; {meant}Kinds are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if not names or kind in names)


def arms_asked(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods to run: dense first, added where it is missing."""
    return (DENSE, *(name for name in methods if name != DENSE))


def read_text(path: Path, option: str) -> str:
    """The UTF-8 text of a file the user named with ``option``.

    Raises ``UsageError`` for one that cannot be read, now and again by the process that holds the
    model (a pipe cannot), that is larger than ``MOST_FILE_BYTES``, or that is in another
    encoding, with the byte.
    """
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise UsageError(
                f"{option} {path} is a pipe or a device, and the text is read more than once; "
                "save it as a file first"
            )
        if found.st_size > MOST_FILE_BYTES:
            raise UsageError(
                f"{option} {path} holds {found.st_size} bytes, more than any prompt; give its "
                f"first part, for example head -c {MOST_FILE_BYTES} {quote(str(path))}"
            )
        return path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option} {path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset "
            f"{error.start} ({error.reason}); convert it, for example with iconv -t UTF-8"
        ) from error
