"""When a window counts: rules that look at one window and nothing else."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from minference_green.results import DeviceState, Fingerprint, Reading

SHORT_WINDOW_SECONDS = 2.0
"""Below this a window is marked: a counter that moves every 100 ms resolves it poorly."""

CLOCK_TOLERANCE = 0.005
CLOCK_SLACK_SECONDS = 0.001
"""Host and device must agree on a window's length within 0.5 % + 1 ms."""

MAX_INVALID_SHARE = 0.20
"""With more invalid windows than this the measurement as a whole is invalid."""

INVALIDATING_CAUSES = ("thermal", "power_brake")
"""Slowdowns that make a window another experiment. A power cap is a big GPU's normal state."""


def distrusted(fingerprint: Fingerprint) -> dict[str, str]:
    """Why readings of a device are disputed whatever they show, by device."""
    return {
        mark.device: f"green-bench doctor of {mark.created_at} failed on {mark.device}: "
        f"{', '.join(mark.failing)}; see its advice, then run it again"
        for mark in fingerprint.doctor
        if mark.failing
    }


def doubts(
    seconds: float,
    device_seconds: float | None,
    readings: Sequence[Reading],
    before: Sequence[DeviceState],
    after: Sequence[DeviceState],
    distrusted: Mapping[str, str] = MappingProxyType({}),
) -> tuple[bool, tuple[str, ...]]:
    """Whether a window is valid, and every reason to doubt it, each with what to do.

    ``distrusted`` says why a device's readings are disputed whatever they show.
    """
    invalid: list[str] = []
    marks: list[str] = []
    if device_seconds is not None:
        difference = abs(seconds - device_seconds)
        if difference > CLOCK_TOLERANCE * seconds + CLOCK_SLACK_SECONDS:
            invalid.append(
                f"host clock says {seconds:.4f} s, device events {device_seconds:.4f} s: "
                "the host was held up; leave the machine to the run"
            )
    for first, last in zip(before, after, strict=False):
        for cause in INVALIDATING_CAUSES:
            gained = last.throttle_seconds.get(cause, 0.0) - first.throttle_seconds.get(cause, 0.0)
            if gained > 0:
                words = cause.replace("_", " ")
                invalid.append(
                    f"{words} slowdown for {gained:.2f} s of the window; improve cooling or power"
                )
    for reading in readings:
        if reading.joules is None and reading.headline:
            invalid.append(reading.reason or f"{reading.device} gave no joules")
        if reading.device in distrusted:
            marks.append(f"disputed: {distrusted[reading.device]}")
        elif reading.disputed:
            marks.append(f"disputed: counter and sampled power disagree on {reading.device}")
    if seconds < SHORT_WINDOW_SECONDS:
        marks.append(f"short: {seconds:.2f} s, below {SHORT_WINDOW_SECONDS:g} s; raise --window")
    return not invalid, tuple(invalid + marks)
