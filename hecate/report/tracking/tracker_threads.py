"""Keeps trackers away from the training: each has a thread of its own, and the run waits for one only when it is closed, and not long.

A tracker is closed at the run's end, and when the run goes back to a checkpoint or another rank begins to report.

A tracker that raises, or has not returned from a call for PATIENCE seconds, is named once; the first call, which imports its library and
may log in, has START_PATIENCE seconds. One that has raised gets no more; one that is slow gets all that it has room for, and is given up
when it has MOST_WAITING steps still to take. The end of a run waits PATIENCE seconds for all of them together, or for those that are still
starting until they have had START_PATIENCE.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hecate.io.durable import replace_file
from hecate.io.plain_files import read_plain_text
from hecate.report.metrics import Record
from hecate.report.tracking.call_thread import PATIENCE, CallThread
from hecate.report.tracking.tracked_figures import load_pictures, numbers_of
from hecate.report.tracking.trackers import TrackedRun, Tracker

START_PATIENCE = 300.0
"""seconds that a tracker may take to start: on a busy machine, or from a network's disk, importing its library alone takes a minute"""
MOST_WAITING = 1000
PICTURE_STEPS = 50
"""pictures of loads are sent with the first record of a step, and then with every so many"""


class Trackers:
    """The trackers of a run, on the rank that reports. A context manager."""

    def __init__(
        self,
        adapters: Mapping[str, Callable[[TrackedRun], Tracker]],
        run: TrackedRun,
        say: Callable[[str], None],
    ) -> None:
        """Args:
        adapters: name -> how the run is opened.
        run: `known_as` is read from the run's folder for each tracker.
        say: called with what the user must know, in the thread that calls the methods of this object.
        """
        self._say = say
        self._workers = [_Worker(name, adapter, run) for name, adapter in adapters.items()]
        self._steps = 0

    def record(self, record: Record) -> None:
        """Send what is recorded in metrics.jsonl to all trackers. Returns at once."""
        if not self._workers:
            return
        numbers, loads = numbers_of(record), None
        if record["kind"] == "step":
            loads = record["loads"] if self._steps % PICTURE_STEPS == 0 else None
            self._steps += 1
        if numbers:
            for worker in self._workers:
                worker.send(_Sent(record["step"], numbers, loads))
        self._name_troubled()

    def close(self) -> None:
        """Give the trackers that have not been named some time to take what is left; closing twice is fine."""
        for worker in self._workers:
            worker.end()
        until = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.wait(0.0 if worker.named else max(0.0, until - time.monotonic()))
        if starting := [worker for worker in self._workers if worker.starting and not worker.named]:
            self._say(f"waiting for {', '.join(worker.name for worker in starting)} to start, so that what was recorded goes there, too")
        for worker in starting:
            worker.wait_for_start()
            worker.wait(PATIENCE)
        self._name_troubled(closing=True)
        self._workers = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name_troubled(self, *, closing: bool = False) -> None:
        for worker in self._workers:
            trouble = worker.trouble(closing=closing)
            if trouble and not worker.named:
                worker.named = True
                self._say(f"tracker {worker.name} {trouble}; the run goes on without it, and metrics.jsonl has everything")


@dataclass(frozen=True)
class _Sent:
    step: int
    numbers: Mapping[str, float]
    loads: Mapping[str, Any] | None


class _Worker:
    """One tracker and its thread, which makes all calls of it."""

    def __init__(self, name: str, adapter: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        self.name, self.named = name, False
        self._adapter = adapter
        self._memory = run.folder / f"tracker-{name}.txt"
        self._run = run
        self._tracker: Tracker | None = None
        """None: it is not open yet"""
        self._since, self._start_over = time.monotonic(), threading.Event()
        self._overrun = False
        self._thread = CallThread(f"tracker {name}", MOST_WAITING)
        self._thread.hand_over(self._open)

    def send(self, sent: _Sent) -> None:
        self._hand_over(lambda: self._opened.log(sent.step, sent.numbers, load_pictures(sent.loads or {})))

    def end(self) -> None:
        """Say that nothing more comes."""
        self._hand_over(lambda: self._opened.close())
        self._thread.end()

    def wait(self, seconds: float) -> None:
        """Wait until all is done, but no longer than this."""
        self._thread.wait(seconds)

    @property
    def starting(self) -> bool:
        """Whether the tracker has time left to start, and has neither started nor failed."""
        return not self._start_over.is_set() and time.monotonic() < self._since + START_PATIENCE

    def wait_for_start(self) -> None:
        """Wait while it is `starting`."""
        self._start_over.wait(max(0.0, self._since + START_PATIENCE - time.monotonic()))

    def trouble(self, *, closing: bool) -> str | None:
        """What is wrong with the tracker, if anything is.

        Args:
            closing: it has had its time to finish.
        """
        if self._thread.error is not None:
            return f"failed: {self._thread.error}"
        if self._overrun:
            return f"is {MOST_WAITING} steps behind"
        if not self._start_over.is_set():
            return None if self.starting else f"has not started in {START_PATIENCE:g} s"
        if closing:
            return None if self._thread.wait(0.0) else f"has not finished {PATIENCE:g} s after the run's last word"
        return None if self._thread.silent_for < PATIENCE else f"has not answered for {PATIENCE:g} s"

    @property
    def _opened(self) -> Tracker:
        assert self._tracker is not None
        return self._tracker

    def _hand_over(self, call: Callable[[], object]) -> None:
        if not self._overrun and self._thread.error is None:
            self._overrun = not self._thread.hand_over(call)

    def _open(self) -> None:
        try:
            tracker = self._adapter(replace(self._run, known_as=_read(self._memory) if self._run.step else None))
            if tracker.run_id is not None:
                replace_file(self._memory, [tracker.run_id.encode()], durable=False)
            self._tracker = tracker
        finally:
            self._start_over.set()


def _read(path: Path) -> str | None:
    try:
        return read_plain_text(path).strip() or None
    except FileNotFoundError:
        return None
