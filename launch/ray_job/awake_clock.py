"""How long others have been silent, as far as this process was there to hear them."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_SECONDS = 2.0


class AwakeClock:
    """Seconds that go by while this process runs: those in which it stood still, stopped by a signal or with its machine suspended, do not
    count, or everybody else would seem to have been silent. Two seconds count at most between a call and the next."""

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read, self._last, self._seconds = read, read(), 0.0

    def __call__(self) -> float:
        """Since it was made."""
        now = self._read()
        self._seconds += min(now - self._last, _LONGEST_SECONDS)
        self._last = now
        return self._seconds
