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
    """The experts of this rank; None: the model's layers compute their experts themselves, and read nothing of a pass but its tokens."""
    current: CurrentPass
    tokens: PassTokens = field(default_factory=PassTokens)
    stats: dict[Unit, RouterStats] | None = None
    """What the routers of the layers that have run have done; None: it is not kept."""
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


def materialized(shards: ExpertShards, current: CurrentPass, *, on_owners: bool = False) -> EvaluationPass:
    """Materialize all layers, and return the pass in which the model may then be called. Every rank must call it.

    Args:
        on_owners: experts stay with their owners (`ExpertEngine.evaluation`).
    """
    shards.plans.place_for_evaluation(on_owners=on_owners)
    for unit, frozen in shards.frozen.items():
        frozen.start(shards.plans.borrow_frozen(unit))
    shards.gather(*shards.families)
    # Everything has arrived before the model is called: then each rank may run on its own, where no other rank joins a collective.
    for store in shards.trained.values():
        store.replicas()
    for frozen in shards.frozen.values():
        frozen.wait()
    return EvaluationPass(shards, current)


@contextmanager
def evaluation(shards: ExpertShards, current: CurrentPass, *, in_lockstep: bool) -> Iterator[EvaluationPass]:
    """See `Engine.evaluation`."""
    forward = materialized(shards, current, on_owners=in_lockstep)
    try:
        with current.set_to(forward):
            yield forward
    finally:
        # Nothing is sent, so that a rank whose block has raised does not wait for others whose blocks go on.
        for store in shards.trained.values():
            store.drop()
        for unit, frozen in shards.frozen.items():
            frozen.start(shards.plans.return_frozen(unit))
