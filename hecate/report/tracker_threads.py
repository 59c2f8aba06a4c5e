"""Keeps trackers away from the training: each has a thread of its own, and the run waits for one only when it is closed, and not long.

A tracker is closed at the run's end, and when the run goes back to a checkpoint or another rank begins to report.

A tracker that raises, or has not returned from a call for PATIENCE seconds, is named once. One that has raised gets no more; one that
is slow gets all that it has room for, and is given up when it has MOST_WAITING steps still to take.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hecate.io.durable import replace_file
from hecate.report.metrics import Record
from hecate.report.tracked_figures import load_pictures, numbers_of
from hecate.report.trackers import TrackedRun, Tracker

PATIENCE = 30.0
"""seconds after which a tracker that has not returned is named, and for which the end of a run waits for all of them together"""
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
            worker.send(None)
        until = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.thread.join(0.0 if worker.named else max(0.0, until - time.monotonic()))
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
        self._queue: queue.Queue[_Sent | None] = queue.Queue(MOST_WAITING)
        self._error: str | None = None
        self._overrun = False
        self._calling_since: float | None = None
        # A daemon, so that a process whose tracker hangs can end.
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def send(self, sent: _Sent | None) -> None:
        """Hand over a step; None: it was the last."""
        if self._error is None and not self._overrun:
            try:
                self._queue.put_nowait(sent)
            except queue.Full:
                self._overrun = True

    def trouble(self, *, closing: bool) -> str | None:
        """What is wrong with the tracker, if anything is.

        Args:
            closing: it has had its time to finish.
        """
        if self._error is not None:
            return f"failed: {self._error}"
        if self._overrun:
            return f"is {MOST_WAITING} steps behind"
        if closing:
            return f"has not finished {PATIENCE:g} s after the run's last word" if self.thread.is_alive() else None
        since = self._calling_since
        return None if since is None or time.monotonic() - since < PATIENCE else f"has not answered for {PATIENCE:g} s"

    def _work(self) -> None:
        try:
            run = replace(self._run, known_as=_read(self._memory) if self._run.step else None)
            tracker = self._call(lambda: self._adapter(run))
            if tracker.run_id is not None:
                replace_file(self._memory, [tracker.run_id.encode()], durable=False)
            while (sent := self._queue.get()) is not None:
                self._call(lambda sent=sent: tracker.log(sent.step, sent.numbers, load_pictures(sent.loads or {})))  # type: ignore[misc]
            self._call(tracker.close)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tracker raises, the run goes on
            self._error = " ".join((str(error) or type(error).__name__).split())[:200]

    def _call(self, function: Callable[[], Any]) -> Any:
        self._calling_since = time.monotonic()
        result = function()
        self._calling_since = None
        return result


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
