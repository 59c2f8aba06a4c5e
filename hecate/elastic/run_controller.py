"""The protocol between a run and the launcher's controller, which receives reports between steps, on every rank, and may give orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from hecate.engine.protocol import ExpertEngine
from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.strict_json import dump_json, parse_json
from hecate.parallel.cluster.topology import Topology
from hecate.ranks.ranks import Ranks
from hecate.report.events import StepEvent

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ReplanOrder:
    """An order to change speeds, shares or owners after the step under way."""

    number: int
    """The number of the order, from 1 in each run; the ranks carry out the newest."""
    flops: tuple[float, ...] | None = None
    """The FLOP/s of each rank's device, for the plans from now on; None: as before."""
    sequences: tuple[int, ...] | None = None
    """The number of sequences in a micro-step, by rank; None: as before, or by the speeds in `flops` if these are given."""
    reshard: bool = False
    """Whether to move experts to better owners, if that pays under the new speeds."""

    def to_bytes(self) -> bytes:
        return dump_json(to_json_values(self))

    @staticmethod
    def from_bytes(data: bytes) -> ReplanOrder:
        """Read what `to_bytes` has written. Raises JsonError: the data are no order."""
        return from_json_values(ReplanOrder, parse_json(data))


@dataclass(frozen=True, kw_only=True)
class BeginFacts:
    """What every rank reports when the run is built, or goes on with other ranks."""

    step: int
    """The number of optimizer steps done."""
    max_steps: int
    sequences: tuple[int, ...]
    """The number of sequences in each micro-step, by rank."""
    owned: tuple[int, ...]
    """The number of experts owned, by rank."""
    topology: Topology
    """The devices of the ranks, and their links."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What one rank reports of a step that has ended."""

    step: int
    """The number of optimizer steps done."""
    seconds: float
    """The duration of the step on this rank."""
    dense_tokens: int
    """The number of tokens, with padding, that this rank took through its decoder layers up to their experts."""
    dense_seconds: float
    """The seconds of `dense_tokens`. They contain no waiting for other ranks, so they measure the speed of this rank's device alone."""
    loss: float
    tokens: int
    """The number of tokens of the whole step."""
    imbalance: float
    """The largest load of a rank over the mean load."""
    bytes_sent: int
    """The number of bytes that all ranks have sent."""
    loads: dict[str, list[int]]
    """By unit, as text, the assignments of each expert on all ranks."""


class RunController(Protocol):
    """The launcher's end of a run, called on every rank. All methods must return at once.

    `replan_order` and `stop_requested` are called at the end of each step's backward pass, the others between steps.
    """

    def begins(self, facts: BeginFacts) -> None:
        """Called when the run is built, and again when it goes on with other ranks."""

    def stepped(self, facts: StepFacts) -> None:
        """Called when a step has ended."""

    def saved(self, step: int, path: Path) -> None:
        """Called on rank 0 when a checkpoint is complete."""

    def replan_order(self) -> ReplanOrder | None:
        """The newest order, whether it was carried out or not. Training follows the controller of rank 0, after the step under way."""

    def stop_requested(self) -> bool:
        """Whether the run is to save after the step under way and return. It does so if the controller of any rank returns True."""


def begin_facts(*, step: int, max_steps: int, shares: Sequence[int], engine: ExpertEngine) -> BeginFacts:
    """The report of a run that begins, or goes on, at `step` with these shares of a micro-step's sequences."""
    owners = np.concatenate([*engine.shards.owners.values(), []]).astype(int)
    return BeginFacts(
        step=step,
        max_steps=max_steps,
        sequences=tuple(shares),
        owned=tuple(np.bincount(owners, minlength=len(shares)).tolist()),
        topology=engine.shards.config.topology,
    )


def step_facts(event: StepEvent) -> StepFacts:
    """The report of a step."""
    return StepFacts(
        step=event.step,
        seconds=event.seconds,
        dense_tokens=event.work.tokens,
        dense_seconds=event.work.seconds,
        loss=event.result.loss,
        tokens=event.tokens,
        imbalance=event.imbalance,
        bytes_sent=event.result.bytes_sent,
        loads={str(unit): loads_ED.sum(1).tolist() for unit, loads_ED in event.result.loads.items()},
    )


class ControllerLink:
    """Reports a run to its controller, and sends the orders of the first rank's to all.

    A controller that raises is named once and called no more; the run goes on as without one.
    """

    def __init__(self, controller: RunController, say: Callable[[str], None]) -> None:
        """`say`: called with what the user must know."""
        self._controller: RunController | None = controller
        self._say = say
        self._carried_out = 0
        """The number of the last order that was carried out."""
        self._order: ReplanOrder | None = None
        """The newest order of the first rank's controller, if it is not carried out yet."""

    def begins(self, facts: BeginFacts) -> None:
        self._ask(lambda controller: controller.begins(facts))

    def stepped(self, facts: StepFacts) -> None:
        self._ask(lambda controller: controller.stepped(facts))

    def saved(self, step: int, path: Path) -> None:
        self._ask(lambda controller: controller.saved(step, path))

    def stop_requested(self) -> bool:
        """See `RunController.stop_requested`."""
        return bool(self._ask(lambda controller: controller.stop_requested()))

    def has_new_order(self) -> bool:
        """Whether this rank's controller has an order that is not carried out yet."""
        order = self._ask(lambda controller: controller.replan_order())
        self._order = order if order is not None and order.number > self._carried_out else None
        return self._order is not None

    def receive_order(self, ranks: Ranks) -> ReplanOrder:
        """The first rank's order, to be carried out now. Every rank must call it, when the first rank has a new one."""
        order = ReplanOrder.from_bytes(ranks.broadcast_from(0, None if self._order is None else self._order.to_bytes()))
        self._carried_out = order.number
        return order

    def _ask(self, call: Callable[[RunController], T]) -> T | None:
        """What the controller returns; None if it has failed, now or before."""
        if self._controller is None:
            return None
        try:
            return call(self._controller)
        except Exception as error:  # noqa: BLE001 - whatever a controller raises, the run goes on
            self._controller = None
            self._say(
                f"the run's controller failed: {' '.join((str(error) or type(error).__name__).split())[:200]}; the run goes on without it"
            )
            return None
