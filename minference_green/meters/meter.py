"""The door every energy source stands behind.

A window is bracketed: :meth:`Meter.begin` blocks until the source is ready, the caller runs
the work between two monotonic times, :meth:`Meter.end` blocks until the source can say what
that interval cost. Nothing above this door knows a vendor's name.
"""

from collections.abc import Sequence
from typing import Protocol

from minference_green.results import Device, DeviceState, Reading


class Meter(Protocol):
    """One energy source: the GPUs a run uses, or the host."""

    @property
    def description(self) -> str:
        """In words: how energy is obtained, for the first line of every report."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices read, for the fingerprint."""

    def begin(self) -> None:
        """Block until a window may start; raises ``MeasurementError`` if it cannot be measured."""

    def end(self, start: float, end: float) -> Sequence[Reading]:
        """Readings for ``time.monotonic()`` times ``start`` to ``end``, one per device.

        Raises ``MeasurementError`` when the source contradicts itself (a counter that goes
        backwards or stands still, a device that vanished).
        """

    def state(self) -> Sequence[DeviceState]:
        """Temperature, clocks and throttle times now, one per device that tells."""

    def close(self) -> None:
        """Release the source."""
