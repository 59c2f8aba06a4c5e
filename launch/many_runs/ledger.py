"""What has become of each run of a sweep, in a file of its own: OUTPUT_DIR/sweep/NAME.json. Beside it is what the run has printed.

And the lock that lets one `hecate sweep` at a time work in a folder.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hecate.config import Change, Config, to_yaml
from hecate.config.effective import leaves_of
from hecate.config.schema import LEAVES
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import JsonError, dump_json, parse_json
from hecate.io.strict_yaml import YamlError, parse_yaml
from hecate.launch.many_runs.sweep import STATE_FOLDER, Sweep

FREE = (
    "output_dir",
    "resume",
    "save_steps",
    "save_total_limit",
    "save_retain_steps",
    "save_retain_hours",
    "save_async",
    "logging_steps",
    "report_to",
    "data.cache",
)
"""the keys that may change between two calls, as all of `ray` may: they change no figure that runs are compared by"""


class RunState(Enum):
    """How the last process of a run has ended."""

    STARTED = "begun"
    """it has not ended, or nobody has seen its end"""
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


@dataclass(frozen=True)
class SweepEntry:
    """What is known of a run that was started."""

    state: RunState
    reason: str
    """why the run failed; "" if it did not"""
    seconds: float
    """the seconds that its processes have taken so far"""
    config: str
    """the run's configuration, as `to_yaml` writes it"""


def log_file(folder: str, name: str) -> Path:
    """What a run's processes have printed. `folder` is the sweep's."""
    return Path(folder, STATE_FOLDER, f"{name}.log")


def read_entries(sweep: Sweep) -> dict[str, SweepEntry]:
    """Return what is known of the runs that were started and whose folders still exist, by their names.

    Raises:
        UserError: a file is damaged.
    """
    found = {run.name: _read(_file(sweep.output_dir, run.name)) for run in sweep.runs if os.path.isdir(run.folder)}
    return {name: entry for name, entry in found.items() if entry is not None}


def write_entry(folder: str, name: str, entry: SweepEntry) -> None:
    """Remember what has become of a run. Raises UserError if the disk refuses."""
    path = _file(folder, name)
    try:
        replace_file(path, [dump_json(to_json_values(entry))])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def changed_values(started: str, config: Config) -> list[Change]:
    """Return the keys by which a run would not be the one that was started, sorted.

    Args:
        started: the configuration of that run as YAML. A key that it lacks counts as its default.

    Raises:
        YamlError: `started` is none.
    """
    before = parse_yaml(started)
    if not isinstance(before, Mapping):
        raise YamlError("the configuration that was begun is no mapping of keys to values")
    then, now = leaves_of(before), leaves_of(parse_yaml(to_yaml(config)))
    names = [name for name in LEAVES if name not in FREE and not name.startswith("ray.")]
    pairs = {name: (then.get(name, _plain(LEAVES[name].default)), now[name]) for name in names}
    return [Change(name, *pair) for name, pair in sorted(pairs.items()) if pair[0] != pair[1]]


@contextmanager
def working_alone(folder: str) -> Iterator[int]:
    """Hold the folder of a sweep or of rounds for this process, and for those that get the descriptor yielded, until all have ended.

    Raises:
        UserError: another `hecate sweep` or `hecate federate` is at work in it, or the folder cannot be made.
    """
    try:
        Path(folder, STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        # A lock that processes inherit with the descriptor: it holds until the last run has ended, even if this process is killed before.
        lock = os.open(_lock(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: the sweep's folder cannot be made: {error.strerror or error}\n  choose another output_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(
            f"{folder}: another hecate sweep or federate, or a run that one has started, is at work in it\n"
            "  wait for its end, or stop it; hecate sweep --table shows how far a sweep is"
        ) from None
    try:
        yield lock
    finally:
        os.close(lock)


def at_work(folder: str) -> bool:
    """Return whether a `hecate sweep`, or a run that one has started, is at work in the folder."""
    try:
        lock = os.open(_lock(folder), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _file(folder: str, name: str) -> Path:
    return Path(folder, STATE_FOLDER, f"{name}.json")


def _lock(folder: str) -> Path:
    return Path(folder, STATE_FOLDER, "lock")


def _read(path: Path) -> SweepEntry | None:
    try:
        return from_json_values(SweepEntry, parse_json(read_plain(path)))
    except FileNotFoundError:
        return None
    except (OSError, JsonError) as error:
        raise UserError(f"{path}: what is known of the run cannot be read: {error}\n  remove it together with the run's folder") from error


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
