"""Host energy from a model: rated CPU watts x busy share. Not a measurement, and says so."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from minference_green.carbon import CPU_POWER, table
from minference_green.errors import UsageError
from minference_green.meters import evidence
from minference_green.meters.clock import MONOTONIC, Clock
from minference_green.meters.counter import check_window
from minference_green.meters.cpu import cpu_name, sockets
from minference_green.meters.evidence import Edge
from minference_green.meters.faults import WindowError
from minference_green.results import Device, DeviceState, Reading

IDLE_SHARE = 0.1
"""codecarbon's floor: a CPU draws a tenth of its rated power when idle."""

GENERIC_WATTS_PER_THREAD = 4.0
"""codecarbon's figure for a CPU that its table does not know."""

RELATIVE_UNCERTAINTY = 0.5
"""Rated power is not drawn power: stated, not measured."""

_SLOPE_SECONDS = 0.05


@dataclass(frozen=True)
class CpuModel:
    """Rated power of this host's processors, and where the figure comes from."""

    name: str
    rated_watts: float
    threads: int
    source: str


def cpu_model() -> CpuModel:
    """Rated power of the host's processors by codecarbon's table.

    A name that is not in the table gets 4 W per thread, and the source says so. Raises
    ``UsageError`` if the table is missing.
    """
    return look_up(cpu_name(), os.cpu_count() or 1, sockets())


def look_up(name: str, threads: int, sockets: int) -> CpuModel:
    """The model of a CPU called ``name``."""
    of = table(CPU_POWER)
    watts = next((_watts(r["TDP"]) for r in of.rows() if _plain(r["Name"]) == _plain(name)), None)
    if watts is None:
        return CpuModel(
            name,
            GENERIC_WATTS_PER_THREAD * threads,
            threads,
            f"{GENERIC_WATTS_PER_THREAD:g} W x {threads} threads, because {name!r} is not in "
            f"{of.source}",
        )
    whole = f"{sockets} x " if sockets > 1 else ""
    return CpuModel(name, watts * sockets, threads, f"{whole}{watts:g} W by {of.source}")


class ModelledMeter:
    """Energy of the whole host's CPUs by a model; see ``meter.Meter``.

    The busy share is of all processes, so it needs a host to itself to mean one run. ``why``
    says why nothing better is read. Without a ``cpu`` model joules are null for that reason.
    """

    def __init__(
        self, cpu: CpuModel | None, *, headline: bool, why: str = "", clock: Clock = MONOTONIC
    ) -> None:
        self._cpu, self._headline, self._why, self._clock = cpu, headline, why, clock
        self._begun: tuple[Edge, Edge] | None = None

    @property
    def description(self) -> str:
        """In words: how energy is obtained, for the first line of every report."""
        if self._cpu is None:
            return f"CPU energy is not known ({self._why})"
        beside = "" if self._headline else ", beside the headline"
        because = f" ({self._why})" if self._why else ""
        return f"CPU energy is modelled, not measured: {_source(self._cpu)}{because}{beside}"

    @property
    def devices(self) -> tuple[Device, ...]:
        """The CPU, where it supplies the headline."""
        return (Device(kind="cpu", name=cpu_name()),) if self._headline else ()

    def begin(self) -> None:
        """Read the busy time twice, for the share before the window."""
        before = self._read()
        self._clock.sleep(_SLOPE_SECONDS)
        self._begun = before, self._read()

    def end(self, start: float, end: float) -> Sequence[Reading]:
        """One reading for the host."""
        if self._begun is None:
            raise WindowError("end() was called without begin()")
        before, t0 = self._begun
        self._begun = None
        check_window(start, end, t0.seconds, self._clock.now())
        t1 = self._read()
        self._clock.sleep(_SLOPE_SECONDS)
        after = self._read()
        if self._cpu is None:
            return [self._unknown()]
        raw = evidence.bracket(before, t0, t1, after, start, end, unit="cpu_seconds")
        raw |= {
            "rated_watts": self._cpu.rated_watts,
            "threads": float(self._cpu.threads),
            "idle_share": IDLE_SHARE,
        }
        joules = evidence.modelled(raw)
        return [
            Reading(
                device="cpu",
                scope="cpu model",
                obtained="modelled",
                source=_source(self._cpu),
                joules=joules,
                uncertainty_joules=RELATIVE_UNCERTAINTY * joules,
                headline=self._headline,
                evidence=raw,
            )
        ]

    def state(self) -> Sequence[DeviceState]:
        """A model tells no state."""
        return []

    def close(self) -> None:
        """Nothing to release."""

    def _unknown(self) -> Reading:
        return Reading(
            device="cpu",
            scope="cpu model",
            obtained="modelled",
            source="none",
            joules=None,
            reason=self._why,
            headline=self._headline,
        )

    def _read(self) -> Edge:
        return Edge(self._clock.now(), _busy_seconds())


def open_modelled(*, headline: bool, why: str = "") -> ModelledMeter:
    """The model of this host.

    Without codecarbon's table there is none: ``UsageError`` where it would be the headline,
    beside a GPU a meter whose joules are null.
    """
    try:
        return ModelledMeter(cpu_model(), headline=headline, why=why)
    except UsageError as error:
        if headline:
            raise
        return ModelledMeter(None, headline=False, why=str(error))


def _source(cpu: CpuModel) -> str:
    return f"{cpu.source} x busy share of all threads, at least {IDLE_SHARE:.0%}"


def _busy_seconds() -> float:
    """CPU seconds spent by all processes of the host since it started."""
    times = psutil.cpu_times()
    # On Linux `user` and `nice` contain the guests' time already.
    parts = ("user", "nice", "system", "irq", "softirq")
    return sum(float(getattr(times, part, 0.0)) for part in parts)


def _watts(text: str) -> float | None:
    """A rated power of the table; a few of its entries are no number."""
    try:
        return float(text)
    except ValueError:
        return None


def _plain(name: str) -> str:
    """A CPU's name without what vendors and firmware write differently."""
    name = re.sub(r"\((R|TM|C)\)|@.*$|\b\d+-Core\b|\bProcessor\b|\bCPU\b", " ", name, flags=re.I)
    return " ".join(name.lower().split())
