"""Makes calls in a thread of its own, so that the training waits for nobody whom it only tells something."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

PATIENCE = 30.0
"""seconds after which whoever has not returned from a call is named"""


class CallThread:
    """Makes calls in the order in which they come, each when the one before it has returned. One that raises is the last.

    The thread is a daemon, so that a process whose call hangs can end.
    """

    def __init__(self, name: str, room: int) -> None:
        """Args:
        name: of the thread.
        room: how many calls may wait.
        """
        self.error: str | None = None
        """what a call has raised, in one line; None: nothing"""
        self._room = room
        self._calls: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._calling_since: float | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def hand_over(self, call: Callable[[], object]) -> bool:
        """Have something called later, and return at once; False: there is no room for it, and it is never called."""
        with self._changed:
            if len(self._calls) >= self._room:
                return False
            self._calls.append(call)
            self._changed.notify()
            return True

    @property
    def silent_for(self) -> float:
        """For how many seconds the call under way has not returned; 0: there is none."""
        since = self._calling_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> int:
        """How many calls have not begun."""
        return len(self._calls)

    def end(self) -> None:
        """Say that no more calls come. What waits is still called."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Wait until all calls are made, or one has raised; False: they are not, after so many seconds. `end` comes before."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            self._calling_since = time.monotonic()
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - whatever it is, the run goes on
                self.error = " ".join((str(error) or type(error).__name__).split())[:200]
                return
            finally:
                self._calling_since = None

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._ended)
            return self._calls.popleft() if self._calls else None
