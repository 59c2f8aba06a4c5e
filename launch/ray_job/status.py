"""What a job on a Ray cluster is doing, as a value, and as a small JSON file beside the run.

The job's controller writes the file; `hecate status` and benchmarks read it. Both do it through this module alone.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import JsonError, parse_json
from hecate.launch.membership.job_states import ENDED, State

FILE = "status.json"
STALE_SECONDS = 30.0
"""age of the status of a running job from which on its controller is taken for dead"""
_NOTES_SHOWN = 8


class DeviceState(Enum):
    """What a device of a job is doing."""

    COMING = "coming"
    """its worker has not started"""
    LOADING = "loading"
    """its worker loads the model alone, while other ranks train"""
    READY = "ready"
    """its worker has loaded the model, and waits to join the ranks"""
    STARTING = "starting"
    """its rank builds its part of the run"""
    TRAINING = "training"
    IDLE = "idle"
    """its rank's part in the present generation has ended"""


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """One device of a job."""

    device: int
    """the device's number in the job"""
    rank: int | None
    """the device's rank; None: it is not in the present generation"""
    state: DeviceState
    sequences: int | None
    """the sequences of a micro-step that its rank computes; None: not known yet"""
    experts: int | None
    """the number of experts that its rank owns; None: not known yet"""
    speed: float | None
    """the device's real over its planned speed; None: not measured yet"""
    kind: str
    node: str
    """the address and the beginning of Ray's id of its node, for a person"""
    pid: int | None
    """the process id of its worker; None: there is none"""


@dataclass(frozen=True, kw_only=True)
class StatusNote:
    """Something that has happened, for a person."""

    when: str
    """the time of day, HH:MM:SS"""
    text: str


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """What a job is doing. docs/use/launch.md describes its JSON form, which has the field `ended` in addition."""

    state: State
    detail: str
    """why the job has failed; empty if it has not"""
    generation: int
    """the number of the present generation of ranks, from 0"""
    max_steps: int
    step: int
    """the number of optimizer steps done"""
    loss: float | None
    """the newest step's loss; None: no step has been reported yet, or the number is not finite"""
    tokens_per_s: float | None
    """the newest step's tokens a second, or None, as `loss` has it"""
    imbalance: float | None
    """the newest step's imbalance, or None, as `loss` has it"""
    last_checkpoint: str | None
    """the name of the newest checkpoint's folder; None: there is none"""
    devices: tuple[DeviceStatus, ...]
    spares: int
    """the number of processes that have imported everything, and wait to take a lost worker's place"""
    topology: str | None
    """the topology of all devices, as YAML; None: not measured yet"""
    notes: tuple[StatusNote, ...]
    """the newest notes, oldest first"""
    updated: float
    """the time of this status, in seconds since 1970"""

    @property
    def ended(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.state in ENDED


def finite(value: float | None) -> float | None:
    """A figure as the status has it: None if it is no finite number, which JSON cannot express."""
    return value if value is not None and math.isfinite(value) else None


def write_status(folder: Path, status: JobStatus) -> None:
    """Replace the status file of the run in `folder` at once: a reader sees the old status or the new one, never a part.

    If the disk refuses, the old file stays: a full disk must not end a job.
    """
    values = {**to_json_values(status), "ended": status.ended}
    with suppress(OSError):
        replace_file(folder / FILE, [json.dumps(values, allow_nan=False, indent=1).encode()], durable=False)


def read_status(run: Path) -> JobStatus:
    """Return the status of the run in the folder `run`.

    Raises:
        UserError: there is no status file, or it is not the status of a run of this version.
    """
    path = run / FILE
    try:
        values: Any = parse_json(read_plain(path))
        if isinstance(values, dict):
            values.pop("ended", None)
        return from_json_values(JobStatus, values)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file\n  give the output_dir, or the configuration, of a run that `hecate ray` has started"
        ) from None
    except (OSError, JsonError) as error:
        raise UserError(f"{path}: cannot be read as the status of a run: {error}") from None


def status_text(status: JobStatus, now: float | None = None) -> str:
    """The status for the terminal, as plain lines.

    Args:
        now: seconds since 1970; None: the present time.
    """
    age = (time.time() if now is None else now) - status.updated
    state = status.state.value
    if age > STALE_SECONDS and not status.ended:
        state += f" {age:.0f} s ago; its controller has written nothing since"
    lines = [f"state        {state}"]
    if status.detail:
        lines.append(f"             {status.detail}")
    lines.append(f"step         {status.step} of {status.max_steps}, generation {status.generation}")
    figures = (("loss", status.loss, ".4f"), ("tokens_per_s", status.tokens_per_s, ".0f"), ("imbalance", status.imbalance, ".2f"))
    lines += [f"{name:<12} {value:{form}}" for name, value, form in figures if value is not None]
    lines.append(f"checkpoint   {status.last_checkpoint or 'none yet'}")
    lines.append("device  rank  state        sequences  experts  speed  kind   node")
    lines += [_device_line(device) for device in status.devices]
    lines += [f"{note.when}  {note.text}" for note in status.notes[-_NOTES_SHOWN:]]
    return "\n".join(lines)


def _device_line(device: DeviceStatus) -> str:
    rank, sequences, owned = ("-" if number is None else number for number in (device.rank, device.sequences, device.experts))
    speed = "-" if device.speed is None else f"{device.speed:.2f}"
    figures = f"{device.device:>6}  {rank:>4}  {device.state.value:<11}  {sequences:>9}  {owned:>7}  {speed:>5}"
    return f"{figures}  {device.kind:<5}  {device.node}"
