"""The time that counts as waiting: of a process that was stopped meanwhile, only what it could look at."""

from __future__ import annotations

import time

LONGEST_LOOK = 1.0
"""Seconds that the time between two looks counts at most. A process that waits looks far more often: one that
looks later was stopped by a signal or a scheduler, and its messages have had no chance to be seen."""


class RunningClock:
    """Seconds in which this process ran and looked."""

    __slots__ = ("_last", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def look(self) -> float:
        """Return the seconds until now."""
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_LOOK)
        self._last = now
        return self.seconds
