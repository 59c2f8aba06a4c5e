"""Whoever watches a run from outside, and may ask it to re-plan or to stop: the protocol between training and whatever started it.

Training calls its `Observer` between steps, on every rank, and never waits for an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hecate.elastic.layer_timer import LayerTimer
from hecate.engine.protocol import ExpertEngine
from hecate.io.strict_json import JsonError, parse_json
from hecate.model.moe_model import MoeModel
from hecate.parallel.topology_file import topology_text
from hecate.ranks.ranks import Ranks
from hecate.report.events import StepEvent


@dataclass(frozen=True, kw_only=True)
class ReplanOrder:
    """What all ranks are to change after the step under way; None leaves a thing as it is."""

    number: int
    """counts the orders of a run from 1; the ranks carry out the newest"""
    flops: tuple[float, ...] | None = None
    """of each rank's device, for the plans from now on"""
    sequences: tuple[int, ...] | None = None
    """of each micro-step, by rank"""
    reshard: bool = False
    """move experts to better owners, if that pays under the new speeds"""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> ReplanOrder:
        """Raises JsonError."""
        raw = parse_json(data)
        if not isinstance(raw, dict) or set(raw) != {"number", "flops", "sequences", "reshard"}:
            raise JsonError("not an order")
        flops, sequences = (None if raw[key] is None else tuple(raw[key]) for key in ("flops", "sequences"))
        return ReplanOrder(number=raw["number"], flops=flops, sequences=sequences, reshard=raw["reshard"])


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What one rank tells its observer about a step that has ended."""

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
    loads: dict[str, list[int]]
    """unit, as text -> assignments of each expert, all ranks together"""


class Observer(Protocol):
    """Every method must return at once and must not fail; it is called on every rank, between steps."""

    def begins(self, facts: dict[str, Any]) -> None:
        """The run is built, or goes on with other ranks.

        Args:
            facts: JSON values: step, max_steps, rows (sequences of each micro-step, by rank), owned (experts of each rank), topology (YAML
                text).
        """

    def stepped(self, facts: StepFacts) -> None:
        """A step has ended."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is complete. On rank 0."""

    def replan_order(self) -> ReplanOrder | None:
        """The newest order, carried out or not. Only rank 0's counts."""

    def stop_requested(self) -> bool:
        """Whether the run is to save after this step and return. One rank that says so suffices."""


class ObserverLink:
    """Tells an observer about a run, and brings its orders from the first rank to all."""

    def __init__(self, observer: Observer, moe: MoeModel, device: torch.device) -> None:
        self._observer = observer
        self._timer = LayerTimer(moe, device)
        self._carried_out = 0
        """number of the last order"""

    def begins(self, *, step: int, max_steps: int, shares: Sequence[int], engine: ExpertEngine) -> None:
        """See `Observer.begins`."""
        self._timer.take()
        owners = np.concatenate([*engine.shards.owners.values(), []]).astype(int)
        self._observer.begins(
            {
                "step": step,
                "max_steps": max_steps,
                "rows": list(shares),
                "owned": np.bincount(owners, minlength=len(shares)).tolist(),
                "topology": topology_text(engine.shards.config.topology),
            }
        )

    def stepped(self, event: StepEvent) -> None:
        """See `Observer.stepped`."""
        dense_tokens, dense_seconds = self._timer.take()
        self._observer.stepped(
            StepFacts(
                step=event.step,
                seconds=event.seconds,
                dense_tokens=dense_tokens,
                dense_seconds=dense_seconds,
                loss=event.result.loss,
                tokens=event.tokens,
                imbalance=event.imbalance,
                bytes_sent=event.bytes_sent,
                loads={str(unit): loads_ED.sum(1).tolist() for unit, loads_ED in event.result.loads.items()},
            )
        )

    def saved(self, step: int, path: Path) -> None:
        """See `Observer.saved`."""
        self._observer.saved(step, path)

    def stop_requested(self) -> bool:
        """See `Observer.stop_requested`."""
        return self._observer.stop_requested()

    def has_new_order(self) -> bool:
        """Whether this rank's observer has an order that is not carried out yet."""
        order = self._observer.replan_order()
        return order is not None and order.number > self._carried_out

    def receive_order(self, ranks: Ranks) -> ReplanOrder:
        """The first rank's order, to be carried out now. Every rank must call it, when the first rank has a new one."""
        newest = self._observer.replan_order() if ranks.is_first else None
        order = ReplanOrder.from_bytes(ranks.broadcast_from(0, None if newest is None else newest.to_bytes()))
        self._carried_out = order.number
        return order
