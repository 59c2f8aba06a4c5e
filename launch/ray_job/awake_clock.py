"""A clock that measures how long other processes are silent. It stands still while this process is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_SECONDS = 2.0


class AwakeClock:
    """Counts the seconds in which this process runs.

    While a signal stops this process, or its machine is suspended, it receives no answers, so this time must not count as silence of
    other processes. At most two seconds count between two calls.
    """

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read, self._last, self._seconds = read, read(), 0.0

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        now = self._read()
        self._seconds += min(now - self._last, _LONGEST_SECONDS)
        self._last = now
        return self._seconds
