"""What is known of each round that is finished: a line of rounds.jsonl, and a line on the screen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from hecate.apps.federate.privacy.accountant import PrivacySpent
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import JsonError, parse_json
from hecate.report.progress import duration_text

UNION = "union"
"""the name of a round's result among the clients"""


@dataclass(frozen=True)
class RoundRecord:
    """One round. Losses are means over label tokens; bytes are those of the files that went between the server and a client."""

    round: int
    weights: dict[str, float]
    """of the clients that took part, by name"""
    dropped: tuple[str, ...]
    """the clients whose updates are missing"""
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    aggregation_error: float
    """of the aggregate against the weighted sum of the clients' adapters, relative, of all modules together"""
    average_error: float
    """the same of federated averaging on these adapters, smaller ranks padded with zeros"""
    held_out: dict[str, dict[str, dict[str, float]]]
    """of the union and of each client, by held-out set: loss, and what else `hecate eval` measures"""
    privacy: dict[str, PrivacySpent]
    """of each client, what all rounds so far have told of its samples; empty without privacy.noise"""
    seconds: float
    """that the round took, or its last part, if it was resumed"""


def rounds_file(folder: Path) -> Path:
    """Where the lines are. `folder` is the federated run's."""
    return folder / "rounds.jsonl"


def read_rounds(folder: Path) -> list[RoundRecord]:
    """Return the rounds that are finished, in their order. Raises UserError: the file is damaged."""
    path = rounds_file(folder)
    try:
        return [_checked(from_json_values(RoundRecord, parse_json(line))) for line in read_plain(path).splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, JsonError) as error:
        raise UserError(f"{path}: cannot be read: {error}\n  remove its last line, and that round is done again") from error


def _checked(record: RoundRecord) -> RoundRecord:
    """Raises JsonError: a figure that every record has is missing."""
    if not all("loss" in figures for sets in record.held_out.values() for figures in sets.values()):
        raise JsonError("its held-out figures lack the loss")
    if not all(record.held_out.values()):
        raise JsonError("its held-out figures are of no set")
    return record


def add_record(folder: Path, record: RoundRecord) -> None:
    """Add a line. Raises UserError: the disk refuses."""
    path = rounds_file(folder)
    before = read_plain(path) if path.exists() else b""
    try:
        replace_file(path, [before, json.dumps(to_json_values(record)).encode() + b"\n"])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def line_of(record: RoundRecord, count: int) -> str:
    """Return the line on the screen."""
    parts = [f"round {record.round}/{count}", f"{len(record.weights)} clients"]
    if record.dropped:
        parts.append(f"without {', '.join(record.dropped)}")
    if UNION in record.held_out:
        losses = {name: mean(figures["loss"] for figures in sets.values()) for name, sets in record.held_out.items()}
        clients = [loss for name, loss in losses.items() if name != UNION]
        parts.append(f"loss of the union {losses[UNION]:.3f}, of clients {min(clients):.3f} to {max(clients):.3f}")
    if record.privacy:
        most = max(record.privacy.values(), key=lambda spent: spent.epsilon)
        parts.append(f"epsilon {most.epsilon:.3g} at most, at delta {most.delta:g}")
    parts.append(f"error {record.aggregation_error:.2g} (of averaging {record.average_error:.2g})")
    parts.append(f"{_bytes(sum(record.bytes_up.values()))} up, {_bytes(sum(record.bytes_down.values()))} down")
    return " | ".join([*parts, duration_text(record.seconds)])


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
