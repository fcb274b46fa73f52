"""The clock a meter lives by: real, or virtual in simulations."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Monotonic seconds, and a way to let them pass."""

    now: Callable[[], float]
    sleep: Callable[[float], None]

    def sleep_until(self, moment: float) -> None:
        """Return at ``moment`` or, if it has passed, at once."""
        wait = moment - self.now()
        if wait > 0:
            self.sleep(wait)


MONOTONIC = Clock(time.monotonic, time.sleep)
"""Shared by all processes of a Linux machine, so that their times compare."""
