"""Train the runs of a sweep, each by `hecate train` or `hecate ray` in a process of its own, and remember how each has ended.

Ctrl-C is passed on to the runs under way, which save and stop; the runs that are left wait for the next call of the same command.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from hecate.checkpoint import latest_good
from hecate.config import Config, to_yaml
from hecate.errors import UserError
from hecate.io.plain_files import open_plain
from hecate.io.python_module import RUN_MODULE
from hecate.io.signals import on_signals
from hecate.launch.many_runs.ledger import RunState, SweepEntry, log_file, read_entries, working_alone, write_entry
from hecate.launch.many_runs.sweep import STATE_FOLDER, Sweep, SweepRun
from hecate.report.progress import duration_text

_log = logging.getLogger(__name__)

PROGRAM = (*RUN_MODULE, "hecate")
_POLL_SECONDS = 0.1
_TAIL = 4096
"""the bytes at the end of what a run has printed in which the reason of its failure is looked for"""
_LONGEST_REASON = 200
_ERROR = re.compile(r"(?:[\w.]*(?:Error|Exception)\b|hecate: ).*")


@dataclass
class _UnderWay:
    """A run whose process is alive."""

    run: SweepRun
    entry: SweepEntry
    process: subprocess.Popen[bytes]
    started: float
    log_start: int
    """the size of the run's log before this process"""


def train_runs(
    sweep: Sweep,
    configs: Mapping[str, Config],
    verb: Sequence[str],
    environment: Callable[[int, Config], Mapping[str, str]],
    say: Callable[[str], None],
    *,
    program: Sequence[str] | None = None,
    what: str = "",
) -> int:
    """Train all runs that are not finished, at most `sweep.jobs` at once. Those that were started go on from their last checkpoint.

    Args:
        configs: the configuration of every run, by name.
        verb: the words after `hecate` that come before the configuration: ["train"].
        environment: variables for a process, by its place among those that run at once, from 0, and its configuration.
        say: shows a line.
        program: what `verb` and the configuration are arguments of; None: hecate.
        what: what the runs make up, for the first line; empty: a sweep.

    Returns:
        0 if all runs have finished, 1 if one has not, or 128 + the number of the signal that has stopped the sweep.

    Raises:
        UserError: another sweep is at work in the folder, or the disk refuses.
    """
    with working_alone(sweep.output_dir) as lock, _signals() as stop:
        entries = read_entries(sweep)
        done = {name for name, entry in entries.items() if entry.state is RunState.FINISHED}
        waiting = [run for run in sweep.runs if run.name not in done]
        say((what or f"sweep of {len(sweep.runs)} runs") + (f", {len(done)} of them finished already" if done else ""))
        under_way: dict[int, _UnderWay] = {}
        passed_on = 0
        try:
            while under_way or (waiting and not stop):
                free = [] if stop else [place for place in range(sweep.jobs) if place not in under_way]
                for place in free[: len(waiting)]:
                    run = waiting.pop(0)
                    config, entry = configs[run.name], entries.get(run.name)
                    variables = environment(place, config)
                    under_way[place] = _begin(sweep, run, config, entry, [*(program or PROGRAM), *verb], variables, lock, say)
                for place in [place for place, alive in under_way.items() if alive.process.poll() is not None]:
                    ended = under_way.pop(place)
                    entries[ended.run.name] = _end(sweep, ended, stopping=bool(stop), say=say)
                if len(stop) > passed_on:
                    passed_on = len(stop)
                    for alive in under_way.values():
                        alive.process.send_signal(stop[-1])
                time.sleep(_POLL_SECONDS)
        finally:
            for alive in under_way.values():
                alive.process.kill()
    if stop:
        return 128 + stop[0]
    return 0 if all(entry.state is RunState.FINISHED for entry in entries.values()) and len(entries) == len(sweep.runs) else 1


def reason_of(printed: str) -> str:
    """Return the line that says why a run has failed: the last error, or the last line. What a launcher says of a rank explains nothing."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    explaining = [line for line in errors if not line.startswith("hecate: rank ")]
    return (explaining or errors or lines or ["it has printed nothing"])[-1][:_LONGEST_REASON]


def _begin(
    sweep: Sweep,
    run: SweepRun,
    config: Config,
    entry: SweepEntry | None,
    program: Sequence[str],
    variables: Mapping[str, str],
    lock: int,
    say: Callable[[str], None],
) -> _UnderWay:
    folder, log = Path(run.folder), log_file(sweep.output_dir, run.name)
    resumes = entry is not None and _can_resume(folder, say)
    entry = SweepEntry(RunState.STARTED, "", entry.seconds if entry and resumes else 0.0, to_yaml(config))
    # A process that is killed at once must leave a folder by which the next call knows that the run is the sweep's.
    folder.mkdir(parents=True, exist_ok=True)
    write_entry(sweep.output_dir, run.name, entry)
    command = [*program, sweep.run, *run.overrides, *(["resume=true"] if resumes else [])]
    say(f"{run.name}: {'goes on' if resumes else 'begins'}; it prints to {log}")
    with log.open("ab") as output:
        if not resumes:
            output.truncate(0)
        before = output.tell() if resumes else 0  # after `truncate` the position stays
        # In a session of its own, so that Ctrl-C reaches it once, from here; a second signal would end its ranks at once.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **variables},
            start_new_session=True, pass_fds=[lock],
        )  # fmt: skip
    return _UnderWay(run, entry, process, time.monotonic(), before)


def _can_resume(folder: Path, say: Callable[[str], None]) -> bool:
    """Whether the run can go on from a checkpoint. If it left none, what it has left is moved aside, so that it can begin again."""
    if latest_good(folder) is not None:
        return True
    if any(folder.iterdir()):
        number = next(n for n in range(1, sys.maxsize) if not _aside(folder, n).exists())
        try:
            folder.rename(_aside(folder, number))
        except OSError as error:
            raise UserError(f"{folder}: cannot be moved aside: {error.strerror or error}") from error
        say(f"{folder.name}: has left no checkpoint and begins again; what it left is in {_aside(folder, number)}")
    return False


def _aside(folder: Path, number: int) -> Path:
    return folder.parent / STATE_FOLDER / f"{folder.name}.before-{number}"


def _end(sweep: Sweep, ended: _UnderWay, *, stopping: bool, say: Callable[[str], None]) -> SweepEntry:
    code, seconds, name = ended.process.returncode, time.monotonic() - ended.started, ended.run.name
    state, reason = RunState.FINISHED, ""
    if code in (130, 143) or (code != 0 and stopping):
        state = RunState.STOPPED
    elif code != 0:
        state = RunState.FAILED
        reason = f"status {code}: {reason_of(_tail(log_file(sweep.output_dir, name), ended.log_start))}"
    Path(ended.run.folder).mkdir(exist_ok=True)  # a run on Ray that fails before it begins removes it
    entry = replace(ended.entry, state=state, reason=reason, seconds=ended.entry.seconds + seconds)
    write_entry(sweep.output_dir, name, entry)
    say(f"{name}: {state.value} after {duration_text(seconds)}" + (f", {reason}" if reason else ""))
    return entry


def _tail(log: Path, start: int) -> str:
    with open_plain(log) as file:
        file.seek(max(start, log.stat().st_size - _TAIL))
        return file.read().decode(errors="replace")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the numbers of the SIGINTs and SIGTERMs that have come."""
    come: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        come.append(number)
        if len(come) == 1:
            _log.info("hecate: the runs under way save and stop; a second signal ends them at once")

    with on_signals(note):
        yield come
