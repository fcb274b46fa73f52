"""A GPU as its management library shows it: the door NVML and the simulation stand behind."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

PowerField = Literal["instant", "average", "usage"]
"""Field 186, field 185 (1 s trailing average), or the legacy power reading."""

SIMULATED = "simulated"
"""The library that answers for a device that does not exist."""


@dataclass(frozen=True)
class GpuInfo:
    """What does not change while a GPU is open."""

    uuid: str
    name: str
    library: str
    """Who answers: ``NVML``, or ``simulated``."""
    driver: str
    has_counter: bool
    power_field: PowerField | None
    """The most immediate power reading supported."""
    capability: str | None = None
    memory_bytes: int | None = None
    power_limit_watts: float | None = None
    mig: bool = False
    scope: str = "board"
    """``module`` where the counter covers CPU and memory of a superchip too."""

    @property
    def simulated(self) -> bool:
        """Whether no device stands behind it; its joules then say so."""
        return self.library == SIMULATED


@dataclass(frozen=True)
class Conditions:
    """State of a GPU now; null where it does not tell. Names as in ``results.DeviceState``."""

    temperature_celsius: float | None = None
    memory_temperature_celsius: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_limit_watts: float | None = None
    memory_used_bytes: int | None = None
    throttle_seconds: dict[str, float] = field(default_factory=dict)


class Gpu(Protocol):
    """One open GPU. Every method raises a ``MeasurementError`` from ``faults`` if it fails."""

    @property
    def info(self) -> GpuInfo:
        """Identity and what is supported."""

    def energy_joules(self) -> float:
        """Joules since the driver was loaded; ``NoCounterError`` without a counter."""

    def watts(self, power_field: PowerField) -> float:
        """Board power now; ``NoPowerError`` where the field is not supported."""

    def conditions(self) -> Conditions:
        """Temperature, clocks, limit, memory and cumulative throttle times now."""

    def process_ids(self) -> tuple[int, ...]:
        """Compute processes on the device; an empty answer proves nothing inside a VM."""

    def close(self) -> None:
        """Release the device."""
