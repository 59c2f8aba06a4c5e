"""Keeps an observer away from the training: whether it raises, hangs or is slow, the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hecate.elastic.observer import BeginFacts, Observer, StepFacts
from hecate.report.tracking.call_thread import PATIENCE, CallThread

MOST_WAITING = 100
"""The number of events that an observer may be behind; each has the loads of all units."""
LAST_SECONDS = 5.0
"""How long the end of a run waits for an observer; less than the ten seconds from a signal to the end."""


class ObserverThread:
    """Passes reports on to an observer, in order, in a thread of its own; its methods return at once. A context manager.

    An observer that raises is named once, and gets no more reports. One that has not returned for `PATIENCE` seconds is named once. Reports
    for which there is no room are left out; that is said once, and their number at the end.
    """

    def __init__(self, observer: Observer, say: Callable[[str], None]) -> None:
        """`say`: called with what the user must know, in the thread that calls the methods of this object."""
        self._observer = observer
        self._say = say
        self._thread = CallThread("observer of the run", MOST_WAITING)
        self._failed = self._hangs = False
        """Whether the user has been informed of the observer's failure; `_hangs`: of its silence."""
        self._closed = False
        self._left_out = 0
        """The number of events that the observer has not received."""

    def begins(self, facts: BeginFacts) -> None:
        self._tell(lambda: self._observer.begins(facts))

    def stepped(self, facts: StepFacts) -> None:
        self._tell(lambda: self._observer.stepped(facts))

    def saved(self, step: int, path: Path) -> None:
        self._tell(lambda: self._observer.saved(step, path))

    def close(self) -> None:
        """Give the observer some time for what is left, unless it hangs; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._thread.end()
        done = self._thread.wait(0.0 if self._thread.silent_for >= PATIENCE else LAST_SECONDS)
        self._name_failure()
        if not done:
            self._left_out += self._thread.waiting
            self._say("the run ends without its observer, which has not returned from what it was told last")
        if self._left_out:
            self._say(f"the run's observer was not told of so many events, because it was behind: {self._left_out}")

    def __enter__(self) -> ObserverThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, call: Callable[[], None]) -> None:
        self._name_failure()
        if self._failed:
            return
        if not self._thread.hand_over(call):
            if not self._left_out:
                self._say(f"the run's observer is {MOST_WAITING} events behind; it is not told of further ones while it has no room")
            self._left_out += 1
        if self._thread.silent_for >= PATIENCE and not self._hangs:
            self._hangs = True
            self._say(f"the run's observer has not answered for {PATIENCE:g} s; the run goes on without waiting for it")

    def _name_failure(self) -> None:
        if self._thread.error is not None and not self._failed:
            self._failed = True
            self._say(f"the run's observer failed: {self._thread.error}; the run goes on without it")
