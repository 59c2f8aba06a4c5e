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
        """The summed gradients of this rank's positions, by layer."""

    def begin_passes(self, tokens: Sequence[PassTokens], positions: Sequence[int]) -> list[OrderedPass]:
        """The passes of a micro-step, equally many on every rank. The caller sets each as the current pass while the model runs forward, in
        their order; then their backward passes follow in the same order, of which the last ends the micro-step.

        Args:
            tokens: of each pass.
            positions: of this rank, ascending; passes beyond them are of padding, and count nowhere.
        """
        assert len(tokens) == self._order.passes, (len(tokens), self._order.passes)
        number = self.ledger.begin_micro_step()
        position_of = dict(enumerate(positions))
        return [
            OrderedPass(self, number, pass_tokens, position=position_of.get(index), ends=index == len(tokens) - 1)
            for index, pass_tokens in enumerate(tokens)
        ]

    def _end_pass(self, micro: MicroStep) -> None:
        assert isinstance(micro, OrderedPass)
        if micro.ends:
            super()._end_pass(micro)

    def _leaves_replicas(self, unit: Unit) -> bool:
        return True

    def _reduce(self, unit: Unit) -> bool:
        store, in_last = self.shards.stores[unit], self.ledger.in_last_micro_step
        assert isinstance(self._under_way, OrderedPass)
        # Taken after each backward pass: the next one would add to it, in an order that depends on which passes this rank has.
        self._sums[unit].add(self._under_way.position, store.take_gradient(), last=in_last)
        if not (in_last and self._under_way.ends):
            return False
        store.reduce_in_order(self._sums.pop(unit).sums, self._order)
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class OrderedPass(MicroStep):
    """A forward pass of one group of sequences."""

    position: int | None
    """The number in the micro-step of the group of sequences that the pass computes; None: the pass is of padding alone."""
    ends: bool
    """Whether the pass's backward pass ends the micro-step."""
