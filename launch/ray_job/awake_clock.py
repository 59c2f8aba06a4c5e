"""A clock for the silence of other processes, which stands still while this process does."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_SECONDS = 2.0


class AwakeClock:
    """Counts the seconds in which this process runs. While it is stopped by a signal, or its machine is suspended, it can receive no
    answer, so that time must not count as silence of others. Between two calls at most two seconds count."""

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read, self._last, self._seconds = read, read(), 0.0

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        now = self._read()
        self._seconds += min(now - self._last, _LONGEST_SECONDS)
        self._last = now
        return self._seconds
