"""A step whose results must not depend on the ranks, with `EngineConfig.on_every_rank`.

A micro-step has a pass for each of a rank's groups of sequences: all forward passes come first (`begin_passes`), then the backward
passes, each with gradients of its own, which are added up as a `SumOrder` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hecate.engine.engine import Engine
from hecate.engine.shards import ExpertShards
from hecate.engine.step import MicroStep, Step
from hecate.experts.forward_pass import CurrentPass, PassTokens
from hecate.parallel.values.summation import PositionSums, SumOrder
from hecate.parallel.values.units import Unit


def begin_ordered_step(engine: Engine, number: int, micro_steps: int, order: SumOrder) -> OrderedStep:
    """See `ExpertEngine.begin_step`; `order`: in which gradients are summed."""
    return engine.begin(lambda: OrderedStep(engine.shards, engine.current, number, micro_steps, order))


class OrderedStep(Step):
    """One optimizer step, in which the gradients of positions are summed in an order."""

    def __init__(self, shards: ExpertShards, current: CurrentPass, number: int, micro_steps: int, order: SumOrder) -> None:
        super().__init__(shards, current, number, micro_steps)
        self._order = order
        self._sums: dict[Unit, PositionSums[Tensor]] = {unit: PositionSums(order.size) for unit in shards.trained}
        """of the gradients of this rank's positions"""

    def begin_passes(self, tokens: Sequence[PassTokens], positions: Sequence[int]) -> list[OrderedPass]:
        """The passes of a micro-step, equally many on every rank. Each is to be made the current one while the model runs its forward pass,
        in their order; then their backward passes follow in the same order, of which the last ends the micro-step.

        Args:
            tokens: of each pass.
            positions: of this rank, ascending; passes beyond them are of padding, and count nowhere.
        """
        assert len(tokens) == self._order.passes, (len(tokens), self._order.passes)
        number, last = self.ledger.begin_micro_step(), len(tokens) - 1
        return [
            OrderedPass(self, number, one, position=positions[i] if i < len(positions) else None, ends=i == last)
            for i, one in enumerate(tokens)
        ]

    def _end_pass(self, micro: MicroStep) -> None:
        assert isinstance(micro, OrderedPass)
        if micro.ends:
            super()._end_pass(micro)

    def _leaves_replicas(self, unit: Unit) -> bool:
        return True

    def _reduce(self, unit: Unit) -> bool:
        store, present, in_last = self.shards.stores[unit], self._present, self.ledger.in_last_micro_step
        assert isinstance(present, OrderedPass)
        self._sums[unit].add(present.position, store.take_gradient(), last=in_last)
        if not (in_last and present.ends):
            return False
        store.reduce_in_order(self._sums.pop(unit).sums, self._order)
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class OrderedPass(MicroStep):
    """A forward pass of one group of sequences."""

    position: int | None
    """of its group of sequences in the micro-step; None: it has no group there"""
    ends: bool
    """its backward pass ends the micro-step"""
