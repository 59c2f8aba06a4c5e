"""Who watches a run from outside and may ask it to change course: the whole protocol between training and whatever started it.

Training calls it between steps, on every rank, and never waits for an answer. It knows nothing of who listens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hecate.checkpoint.strict_json import JsonError, parse_json


@dataclass(frozen=True, kw_only=True)
class Order:
    """What all ranks are to change after the step under way; None leaves a thing as it is."""

    number: int
    """counts the orders of a run from 1; the ranks carry out the newest"""
    flops: tuple[float, ...] | None = None
    """of each rank's device, for the plans from now on"""
    rows: tuple[int, ...] | None = None
    """of each micro-step, by rank"""
    reshard: bool = False
    """move experts to better owners, if that pays under the new speeds"""

    def to_bytes(self) -> bytes:
        return json.dumps({"number": self.number, "flops": self.flops, "rows": self.rows, "reshard": self.reshard}).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Order:
        """Raises JsonError."""
        raw = parse_json(data)
        if not isinstance(raw, dict) or set(raw) != {"number", "flops", "rows", "reshard"}:
            raise JsonError("not an order")
        flops, rows = (None if raw[key] is None else tuple(raw[key]) for key in ("flops", "rows"))
        return Order(number=raw["number"], flops=flops, rows=rows, reshard=raw["reshard"])


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What one rank knows of a step that has ended."""

    step: int
    """optimizer steps done"""
    seconds: float
    dense_tokens: int
    dense_seconds: float
    """tokens, padding among them, that this rank took through its decoder layers up to their experts, and how long that took: no
    collective is waited for in it, so it tells one device's speed from another's"""
    loss: float
    tokens: int
    """of the whole step"""
    imbalance: float
    """largest over mean load of the ranks"""
    bytes_sent: int
    """by all ranks"""
    loads: dict[int, list[int]]
    """layer -> choices of each expert, all ranks together"""


class Observer(Protocol):
    """Every method must return at once and must not fail; it is called on every rank, between steps."""

    def begins(self, facts: dict[str, Any]) -> None:
        """The run is built. `facts`, JSON values: step, max_steps, rows, owned (experts of each rank), topology (YAML text)."""

    def stepped(self, facts: StepFacts) -> None:
        """A step has ended."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is complete. On rank 0."""

    def order(self) -> Order | None:
        """The newest order, carried out or not. Only rank 0's counts."""

    def wants_stop(self) -> bool:
        """Save after this step and return? One rank that wants it suffices."""
