"""Start a `hecate` command and wait for events in its output and metrics while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.launch.ray_job.status import JobStatus, read_status

Record = dict[str, Any]
_PATIENCE = 120.0
"""the longest wait for any event, in seconds"""
_POLL = 0.002


class Job:
    """A running `hecate` command. Its events are read from the launcher's output and from metrics.jsonl.

    Both are needed, because Ray forwards what ranks print with a delay.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, output: Path) -> None:
        self.process, self.folder = process, folder
        self._output = Tail(output)
        self._metrics = Tail(folder / "metrics.jsonl")

    def until_said(self, text: str) -> float:
        """Wait until the launcher, or a rank that shares its terminal, prints `text`, and return the time."""
        return self._until(self._output, lambda line: text in line)[0]

    def next_step(self) -> tuple[float, Record]:
        """Wait for the next step that has not been read yet. Returns the time at which it was finished, and its record."""
        seen, line = self._until(self._metrics, lambda line: line.startswith('{"kind":"step"'))
        return seen, json.loads(line)

    def until_ranks(self, number: int) -> float:
        """Wait until `number` ranks continue together, and return the time."""
        return self._until(self._metrics, lambda line: f'"text":"{number} ranks go on after step' in line)[0]

    def rest(self, steps: int) -> None:
        """Let the job train for `steps` steps, and skip all events until then."""
        self._metrics.skip()
        for _ in range(steps):
            self.next_step()
        self._metrics.skip()
        self._output.skip()

    def status(self, wanted: Callable[[JobStatus], bool]) -> JobStatus:
        """Return the first status for which `wanted` is true."""
        for _ in self._waiting("a status"):
            with suppress(UserError):
                found = read_status(self.folder)
                if wanted(found):
                    return found
        raise AssertionError

    def _until(self, tail: Tail, is_it: Callable[[str], bool]) -> tuple[float, str]:
        for _ in self._waiting(tail.path.name):
            for line in tail.read():
                now = time.perf_counter()
                if is_it(line):
                    return now, line
        raise AssertionError

    def _waiting(self, what: str) -> Iterator[None]:
        deadline = time.monotonic() + _PATIENCE
        while True:
            yield
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self._output.path.read_text(encoding="utf-8")[-3000:]
                raise SystemExit(f"{self.folder.name}: waited {_PATIENCE:.0f} s for {what}; the end of the job's output:\n{said}")
            time.sleep(_POLL)


class Tail:
    """The lines of a growing file, which a run that goes back to a checkpoint cuts to its beginning, or replaces by that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: list[str] = []
        """the lines of the current file that have been read"""
        self._taken = 0

    def read(self) -> Iterator[str]:
        """Yield the new lines, each once. Lines that the caller does not consume are yielded first by the next call."""
        self._look()
        while self._taken < len(self._seen):
            self._taken += 1
            yield self._seen[self._taken - 1]

    def skip(self) -> None:
        """Mark all current lines as read."""
        self._look()
        self._taken = len(self._seen)

    def _look(self) -> None:
        with suppress(FileNotFoundError):
            # All of it each time: a file that was cut may have grown beyond its former length since.
            *whole, _ = self.path.read_bytes().split(b"\n")
            before, self._seen = self._seen, [line.decode(errors="replace") for line in whole]
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, self._seen, strict=False)))
            self._taken = min(self._taken, kept)


@contextmanager
def job(workshop: Path, name: str, command: list[str], *overrides: str) -> Iterator[Job]:
    """Run `hecate COMMAND` with the configuration in `workshop`. At the end of the block it is stopped by a signal and saves."""
    folder, output = workshop / "runs" / name, workshop / f"{name}.txt"
    words = [sys.executable, "-m", "hecate", *command, str(workshop / "config.yaml"), f"output_dir={folder}", *overrides]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with open(output, "wb") as file, subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            yield Job(process, folder, output)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=_PATIENCE)  # until all ranks have saved and exited
            finally:
                process.kill()
