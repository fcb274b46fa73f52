"""Host energy from RAPL counters, through Linux's powercap files."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minference_green.meters import evidence
from minference_green.meters.clock import MONOTONIC, Clock
from minference_green.meters.counter import check_window
from minference_green.meters.evidence import Edge
from minference_green.meters.faults import RaplError, WindowError
from minference_green.results import Device, DeviceState, Reading

POWERCAP = Path("/sys/class/powercap")

SLOPE_SECONDS = 0.05
"""Over how long the power beside a window is taken; RAPL moves about every millisecond."""

_MAX_WATTS = 1500.0
"""No package draws more; a window long enough to wrap a counter twice at this is refused."""


@dataclass(frozen=True)
class Domain:
    """One RAPL counter: a package, or the DRAM behind it."""

    name: str
    file: Path
    range_joules: float
    """The counter starts again at zero beyond this."""

    def joules(self) -> float:
        """The counter now; raises ``RaplError`` if it cannot be read."""
        return _number(self.file) / 1e6


def find_domains(root: Path = POWERCAP) -> list[Domain]:
    """Every package, and its DRAM where counted.

    Cores and graphics lie inside a package and ``psys`` around it, so they are left out; the
    memory-mapped twin of the same counters is used only where the usual one is missing.
    Raises ``RaplError`` saying what is missing or not readable.
    """
    domains = []
    zones = sorted(root.glob("intel-rapl:*")) or sorted(root.glob("intel-rapl-mmio:*"))
    for zone in zones:
        try:
            name = (zone / "name").read_text().strip()
        except OSError as error:
            raise RaplError(f"RAPL zone {zone} has no readable name: {error.strerror}") from error
        if not (name.startswith("package") or name == "dram"):
            continue
        package = zone.name.split(":")[1]
        label = name if name.startswith("package") else f"dram of package {package}"
        domains.append(
            Domain(label, zone / "energy_uj", _number(zone / "max_energy_range_uj") / 1e6)
        )
    if not any(d.name.startswith("package") for d in domains):
        raise RaplError(
            f"no RAPL counters under {root}: a virtual machine, an unsupported CPU, or the "
            "intel_rapl_common module is not loaded; use --meter modelled"
        )
    for domain in domains:
        domain.joules()
    return domains


class RaplMeter:
    """Reads all RAPL packages and DRAM as one figure; see ``meter.Meter``."""

    def __init__(
        self,
        name: str,
        *,
        headline: bool,
        domains: Sequence[Domain] | None = None,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._name, self._headline, self._clock = name, headline, clock
        self._domains = find_domains() if domains is None else list(domains)
        self._begun: tuple[_Snapshot, _Snapshot] | None = None

    @property
    def description(self) -> str:
        """In words: how energy is obtained, for the first line of every report."""
        beside = "" if self._headline else ", beside the headline"
        return f"RAPL counters of {self._name} ({self._covers}){beside}"

    @property
    def devices(self) -> tuple[Device, ...]:
        """The CPU, where it supplies the headline."""
        return (Device(kind="cpu", name=self._name),) if self._headline else ()

    def begin(self) -> None:
        """Read the counters twice, for the power before the window."""
        before = self._read()
        self._clock.sleep(SLOPE_SECONDS)
        self._begun = before, self._read()

    def end(self, start: float, end: float) -> Sequence[Reading]:
        """One reading for the host; raises ``RaplError`` if a counter contradicts itself."""
        if self._begun is None:
            raise WindowError("end() was called without begin()")
        before, t0 = self._begun
        self._begun = None
        check_window(start, end, t0.seconds, self._clock.now())
        t1 = self._read()
        self._clock.sleep(SLOPE_SECONDS)
        after = self._read()
        snapshots = (before, t0, t1, after)
        if (span := after.seconds - before.seconds) > self._longest:
            return [self._too_long(span)]
        sums = self._sums(snapshots)
        first, second, third, last = map(Edge, (s.seconds for s in snapshots), sums)
        raw = evidence.bracket(first, second, third, last, start, end)
        joules = evidence.bracketed(raw)
        if joules <= 0:
            raise RaplError(
                f"the RAPL counters of {self._name} gained {joules:.3f} J over a window of "
                f"{end - start:.1f} s, so they stand still; use --meter modelled"
            )
        return [
            Reading(
                device="cpu",
                scope=self._covers,
                obtained="counter",
                source="RAPL through powercap",
                joules=joules,
                uncertainty_joules=evidence.bracket_uncertainty(raw),
                headline=self._headline,
                evidence=raw,
            )
        ]

    def state(self) -> Sequence[DeviceState]:
        """RAPL tells no state."""
        return []

    def close(self) -> None:
        """Nothing to release."""

    @property
    def _covers(self) -> str:
        packages = sum(d.name.startswith("package") for d in self._domains)
        dram = " and DRAM" if len(self._domains) > packages else ""
        return ("package" if packages == 1 else f"{packages} packages") + dram

    def _read(self) -> "_Snapshot":
        begun = self._clock.now()
        joules = tuple(d.joules() for d in self._domains)
        return _Snapshot((begun + self._clock.now()) / 2, joules)

    def _sums(self, snapshots: Sequence["_Snapshot"]) -> list[float]:
        """Joules of all domains together at each snapshot, from 0 on, wraps undone."""
        sums = [0.0]
        for earlier, later in itertools.pairwise(snapshots):
            gained = 0.0
            for domain, a, b in zip(self._domains, earlier.joules, later.joules, strict=True):
                gained += b - a if b >= a else b - a + domain.range_joules
            sums.append(sums[-1] + gained)
        watts = (sums[-1] - sums[0]) / (snapshots[-1].seconds - snapshots[0].seconds)
        limit = _MAX_WATTS * len(self._domains)
        if watts > limit:
            raise RaplError(
                f"the RAPL counters of {self._name} say {watts:.0f} W, which no host draws; "
                "one went backwards: run again"
            )
        return sums

    @property
    def _longest(self) -> float:
        """Seconds after which a counter may have wrapped twice."""
        return min(d.range_joules for d in self._domains) / _MAX_WATTS

    def _too_long(self, seconds: float) -> Reading:
        return Reading(
            device="cpu",
            scope=self._covers,
            obtained="counter",
            source="RAPL through powercap",
            joules=None,
            reason=f"{seconds:.0f} s is longer than {self._longest:.0f} s, after which a RAPL "
            "counter may have wrapped unseen; measure shorter windows",
            headline=self._headline,
        )


@dataclass(frozen=True)
class _Snapshot:
    """All domains' counters at one moment."""

    seconds: float
    joules: tuple[float, ...]


def _number(file: Path) -> float:
    try:
        return float(int(file.read_text()))
    except PermissionError as error:
        raise RaplError(
            f"RAPL counter {file} is not readable for this user; "
            "run as root, or: sudo chmod -R a+r /sys/class/powercap"
        ) from error
    except (OSError, ValueError) as error:
        raise RaplError(f"RAPL counter {file} gives no number: {error}") from error
