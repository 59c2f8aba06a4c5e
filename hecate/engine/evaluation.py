"""Forward passes without training: every expert everywhere, or tokens sent to the experts' owners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from hecate.engine.shards import ExpertShards
from hecate.experts.forward_pass import CurrentPass, PassTokens
from hecate.experts.routers.router import RouterStats, Routing
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.values.units import Unit


@dataclass(frozen=True, eq=False)
class EvaluationPass:
    """A `ForwardPass` without training: any number of them, until the evaluation ends."""

    shards: ExpertShards | None
    """which holds the experts; None: the model's layers compute their experts themselves, and need of a pass no more than its tokens"""
    current: CurrentPass
    tokens: PassTokens = field(default_factory=PassTokens)
    stats: dict[Unit, RouterStats] | None = None
    """what the routers of the layers that have run have done; None: it is not kept"""
    step: int = 0

    @contextmanager
    def forward(self, tokens: PassTokens) -> Iterator[dict[Unit, RouterStats]]:
        """Until the end of the block, the model's forward passes are of these tokens; yields what routers do in them."""
        stats: dict[Unit, RouterStats] = {}
        with self.current.set_to(replace(self, tokens=tokens, stats=stats)):
            yield stats

    def prefetch(self, *units: Unit) -> None:
        """Does nothing: what is gathered at all was gathered when the evaluation began."""

    def note_routing(self, unit: Unit, routing: Routing) -> None:
        if self.stats is not None:
            self.stats[unit] = replace(routing.stats(), expert_TK=routing.expert_TK)

    def experts(self, unit: Unit, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor) -> Tensor:
        shards = self.shards
        assert shards is not None, "this model's layers compute their experts themselves"
        replicas_SC = shards.stores[shards.trained_in[unit]].replicas()
        work = shards.dispatched(unit, replicas_SC, RoutedTokens(x_TD, expert_TK, weight_TK, token_T))
        y_RD = shards.families[unit].compute(work.routed, work.replicas, step=None)
        return shards.combined(work, y_RD, backward_follows=False)

    def again(self) -> EvaluationPass:
        return self


@contextmanager
def evaluation(shards: ExpertShards, current: CurrentPass, *, together: bool) -> Iterator[EvaluationPass]:
    """See `Engine.evaluation`."""
    if together:
        shards.plans.place_on_owners()
    else:
        shards.plans.place_everywhere()
    for unit, frozen in shards.frozen.items():
        frozen.start(shards.plans.borrow_frozen(unit))
    shards.gather(*shards.families)
    for store in shards.trained.values():
        store.replicas()
    for frozen in shards.frozen.values():
        frozen.wait()
    one = EvaluationPass(shards, current)
    try:
        with current.set_to(one):
            yield one
    finally:
        for store in shards.trained.values():
            store.drop()
        for unit, frozen in shards.frozen.items():
            frozen.start(shards.plans.return_frozen(unit))
