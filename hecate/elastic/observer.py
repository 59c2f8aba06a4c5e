"""Who watches a run from outside and may ask it to change course: the whole protocol between training and whatever started it.

Training calls it between steps, on every rank, and never waits for an answer. It knows nothing of who listens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hecate.elastic.pace import Pace
from hecate.io.strict_json import JsonError, parse_json
from hecate.parallel.topology_file import topology_text
from hecate.parallel.units import Unit
from hecate.report.events import StepResult

if TYPE_CHECKING:
    from hecate.train.loop import Run


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
    loads: dict[Unit, list[int]]
    """unit -> choices of each expert, all ranks together"""


class Observer(Protocol):
    """Every method must return at once and must not fail; it is called on every rank, between steps."""

    def begins(self, facts: dict[str, Any]) -> None:
        """The run is built, or goes on with other ranks. `facts`, JSON values: step, max_steps, rows, owned (experts of each rank),
        topology (YAML text)."""

    def stepped(self, facts: StepFacts) -> None:
        """A step has ended."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is complete. On rank 0."""

    def order(self) -> Order | None:
        """The newest order, carried out or not. Only rank 0's counts."""

    def wants_stop(self) -> bool:
        """Save after this step and return? One rank that wants it suffices."""


class Watched:
    """A run as its observer sees it."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self._run, self._observer = run, observer
        self._pace = Pace(run.moe, run.ranks.device)
        self._done = 0

    def begins(self) -> None:
        run = self._run
        self._pace.take()
        owners = np.concatenate([*run.moe.engine.shards.owners.values(), []]).astype(int)
        self._observer.begins(
            {
                "step": run.step,
                "max_steps": run.config.max_steps,
                "rows": list(run.shares),
                "owned": np.bincount(owners, minlength=len(run.shares)).tolist(),
                "topology": topology_text(run.moe.engine.shards.config.topology),
            }
        )

    def stepped(self, result: StepResult, *, tokens: int, seconds: float, bytes_sent: int) -> None:
        dense_tokens, dense_seconds = self._pace.take()
        self._observer.stepped(
            StepFacts(
                step=self._run.step,
                seconds=seconds,
                dense_tokens=dense_tokens,
                dense_seconds=dense_seconds,
                loss=result.loss,
                tokens=tokens,
                imbalance=self._run.moe.engine.shards.plans.imbalance(result.loads),
                bytes_sent=bytes_sent,
                loads={layer: loads_ED.sum(1).tolist() for layer, loads_ED in result.loads.items()},
            )
        )

    def has_order(self) -> bool:
        """Is there one on this rank, the first, that is not carried out yet?"""
        order = self._observer.order() if self._run.ranks.is_first else None
        return order is not None and order.number > self._done

    def take_order(self) -> Order:
        """The first rank's order, to be carried out now. Every rank must call it, when the first one has one."""
        newest = self._observer.order() if self._run.ranks.is_first else None
        order = Order.from_bytes(self._run.ranks.broadcast_from(0, None if newest is None else newest.to_bytes()))
        self._done = order.number
        return order
