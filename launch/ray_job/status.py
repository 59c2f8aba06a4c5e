"""What a job is doing, as a small JSON file beside the run: written by its controller, read by `hecate status`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.io.strict_json import JsonError, parse_json

FILE = "status.json"
STALE_SECONDS = 30.0
"""after which a job that does not say it has ended is taken for dead"""


def write_status(folder: Path, status: dict[str, Any]) -> None:
    """Put it in place of the last one at once: a reader sees one or the other. A full disk must not end a job: the last one stays."""
    staged = folder / f"{FILE}.tmp"
    try:
        staged.write_text(json.dumps(status, allow_nan=False, indent=1), encoding="utf-8")
        os.replace(staged, folder / FILE)
    except OSError:
        staged.unlink(missing_ok=True)


def read_status(run: Path) -> dict[str, Any]:
    """The status of a run, by its folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = run / FILE
    try:
        status = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file\n  give the output_dir, or the configuration, of a run that `hecate ray` has started"
        ) from None
    except (OSError, JsonError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(status, dict) or "state" not in status:
        raise UserError(f"{path}: is no status of a run")
    return status


def status_text(status: dict[str, Any], now: float | None = None) -> str:
    """For the terminal: plain lines."""
    age = (time.time() if now is None else now) - status["updated"]
    state = status["state"]
    if age > STALE_SECONDS and not status["ended"]:
        state += f" {age:.0f} s ago; its controller says nothing more"
    lines = [f"state        {state}"]
    if status["detail"]:
        lines.append(f"             {status['detail']}")
    lines.append(f"step         {status['step']} of {status['max_steps']}, generation {status['generation']}")
    known = [(name, status[name], form) for name, form in (("loss", "{:.4f}"), ("tokens_per_s", "{:.0f}"), ("imbalance", "{:.2f}"))]
    lines += [f"{name:<12} {form.format(value)}" for name, value, form in known if value is not None]
    lines.append(f"checkpoint   {status['last_checkpoint'] or 'none yet'}")
    lines.append("device  rank  state        sequences  experts  speed  kind   node")
    for device in status["devices"]:
        rank, sequences, owned, speed = ("-" if device[key] is None else device[key] for key in ("rank", "sequences", "experts", "speed"))
        speed = speed if isinstance(speed, str) else f"{speed:.2f}"
        figures = f"{device['device']:>6}  {rank:>4}  {device['state']:<11}  {sequences:>9}  {owned:>7}  {speed:>5}"
        lines.append(f"{figures}  {device['kind']:<5}  {device['node']}")
    lines += [f"{note['when']}  {note['text']}" for note in status["notes"][-8:]]
    return "\n".join(lines)
