"""One layer's part of a plan, and plans that are made after a layer's router has decided and before its tokens travel.

Before the router decides, loads are predicted from past steps. Afterwards the ranks can exchange the true loads, in one all-gather of
[experts] integers, and plan the layer from them (*exact*), or change a plan that was made from the prediction where that pays
(*calibrated*, Hecate, arXiv 2502.02581, §3.2). Every function in this file is pure, so all ranks reach the same result.

Shapes: E experts, D ranks as sources and as destinations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.after_router_loops import seconds_after_router
from hecate.parallel.cost.cost_loops import exposed_seconds
from hecate.parallel.cost.cost_model import LayerCost, Priced, contiguous, cost_numbers, price, topology_numbers
from hecate.parallel.cost.executed_flows import executed_flows, served
from hecate.parallel.cost.flows import Flows, flows, nothing_travels, token_split
from hecate.parallel.cost.route_loops import FASTEST
from hecate.parallel.planners import Plan, PlanInput
from hecate.parallel.planners.auto import TIE
from hecate.parallel.planners.new_split import split_anew
from hecate.parallel.planners.rivals.source_split import ALL_SOURCES, SourceSplit, flows_of_shares
from hecate.parallel.values.placement import Placement


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's part of a plan, and the loads it was made for."""

    placement: Placement
    loads_ED: np.ndarray
    """float64 [experts, source ranks]"""
    quota_ED: np.ndarray | None
    """see `Plan.quota_LED`"""
    source_split: SourceSplit | None = None
    """see `Plan.source_split`"""

    def dispatches(self, topology: Topology) -> bool:
        """Whether a token may have to leave its rank."""
        if self.source_split is not None and self.quota_ED is not None:
            return not (self.placement.where_ED.all() and all(self._keeps(topology, rank) for rank in range(topology.world_size)))
        return not nothing_travels(self.placement.where_ED, self.loads_ED, self.quota_ED, topology)

    def split(self, topology: Topology, source: int) -> np.ndarray:
        """float64 [experts, ranks]: see `token_split`."""
        share_ESD = self._shares(topology, slice(source, source + 1))
        if share_ESD is not None:
            return share_ESD[:, 0]
        return token_split(self.placement.where_ED, self.loads_ED, self.quota_ED, topology, source)

    def flow(self, loads_ED: np.ndarray, topology: Topology) -> Flows:
        """How the assignments of these loads travel under the plan, which may have been made for other loads."""
        share_ESD = self._shares(topology)
        if share_ESD is not None:
            return flows_of_shares(share_ESD, loads_ED.astype(np.float64), topology)
        if self.quota_ED is not None and np.array_equal(loads_ED, self.loads_ED):  # as executed, at a third of the time
            return flows(self.loads_ED, self.quota_ED, topology)
        return executed_flows(self.placement.where_ED, self.quota_ED, self.loads_ED, loads_ED.astype(np.float64), topology)

    def served(self, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
        """float64 [ranks]: number of assignments that each rank serves under these loads."""
        return served(self.flow(loads_ED, topology)).sum(0)

    def _keeps(self, topology: Topology, rank: int) -> bool:
        """Whether no token leaves this rank."""
        return bool((self.split(topology, rank)[:, rank] == 1).all())

    def _shares(self, topology: Topology, sources: slice = ALL_SOURCES) -> np.ndarray | None:
        """float64 [experts, these sources, ranks]; None: by the quotas."""
        if self.source_split is None or self.quota_ED is None:
            return None
        return self.source_split.shares(self.placement.where_ED, self.quota_ED, self.loads_ED, topology, sources)


def layer_plan(plan: Plan, given: PlanInput, index: int) -> LayerPlan:
    """A layer's part of a plan; `index` is its place in the input."""
    quota_ED = None if plan.quota_LED is None else plan.quota_LED[index]
    source_split = None if plan.source_split is None else plan.source_split.of_layer(index)
    return LayerPlan(plan.placement(index), given.expected_LED[index], quota_ED, source_split)


def one_layer(given: PlanInput, index: int, loads_ED: np.ndarray, resident_ED: np.ndarray | None = None) -> PlanInput:
    """What a planner is given for one of several layers, whose loads are known.

    Args:
        resident_ED: bool [experts, ranks], see `PlanInput.resident_LED`; None: as `given` has it.
    """
    if resident_ED is None and given.resident_LED is not None:
        resident_ED = given.resident_LED[index]
    return replace(
        given,
        owner_LE=given.owner_LE[index : index + 1],
        loads_LED=loads_ED[None].astype(np.float64),
        resident_LED=None if resident_ED is None else resident_ED[None],
        present_LED=None if given.present_LED is None else given.present_LED[index : index + 1],
    )


def some_layers(given: PlanInput, some_L: np.ndarray) -> PlanInput:
    """What a planner is given for some of several layers, bool [layers]."""
    if some_L.all():
        return given
    return replace(
        given,
        owner_LE=given.owner_LE[some_L],
        loads_LED=None if given.loads_LED is None else given.loads_LED[some_L],
        resident_LED=None if given.resident_LED is None else given.resident_LED[some_L],
        present_LED=None if given.present_LED is None else given.present_LED[some_L],
    )


def best_after_router(
    planner: Callable[[PlanInput], Plan], given: PlanInput, present: Sequence[LayerPlan], *, splits: bool
) -> list[tuple[float, LayerPlan]]:
    """For each layer the best plan that could take the place of `present`, whose replicas have been gathered, and its `calibration_gain`.

    It is the plan that the planner makes of the true loads, or a new split over the replicas that are there. It is worth taking if it
    gains anything. Of two that gain as much, to a billionth of the layer's seconds, it is the planner's.

    Args:
        given: the layers under their true loads.
        present: the plan of each layer.
        splits: whether a new split counts; the policies of other systems go by their own plans alone.
    """
    candidates = [planner(given)]
    if splits:
        candidates.append(split_anew(given, np.stack([plan.placement.where_ED for plan in present])))
    found = []
    for layer, now in enumerate(present):
        alone = one_layer(given, layer, given.expected_LED[layer])
        seconds = after_router(alone, now)
        gain, best = 0.0, None
        for candidate in candidates:
            plan = layer_plan(candidate, given, layer)
            gains = calibration_gain(alone, now, plan, seconds, gain + TIE * seconds)
            if best is None or gains > gain + TIE * seconds:
                gain, best = gains, plan
        assert best is not None
        found.append((gain if gain > TIE * seconds else min(gain, 0.0), best))
    return found


def calibration_gain(given: PlanInput, present: LayerPlan, better: LayerPlan, present_seconds: float, least: float = -np.inf) -> float:
    """Seconds that a layer's micro-step is predicted to gain by `better` in place of `present`, whose replicas have been gathered.

    The replicas that `better` needs besides travel after the router has decided. Nothing hides that gather, so it counts in full. Dispatch,
    experts and the backward pass count for both plans; the gather that attention has hidden is done and counts for neither.

    Args:
        given: one layer under its true loads.
        present_seconds: what `after_router` says of `present`.
        least: a gain that is no larger need not be exact, only be no larger.
    """
    return present_seconds - after_router(given, better, present, enough=present_seconds - least)


def price_missing(
    owner_E: np.ndarray, present_ED: np.ndarray, better_ED: np.ndarray, topology: Topology, cost: LayerCost, resident_ED: np.ndarray | None
) -> Priced:
    """The price of the gather of what a better plan needs besides.

    Args:
        owner_E: int64 [..., experts].
        present_ED: bool [..., experts, ranks]: replicas that have been gathered.
        better_ED: bool [..., experts, ranks]: replicas of the better plan.
        resident_ED: bool [..., experts, ranks]: frozen parts that are there; None: only the owners'.
    """
    owned_ED = owner_E[..., None] == np.arange(topology.world_size)
    nothing_ED = np.zeros(better_ED.shape)
    where_ED = (better_ED & ~present_ED) | owned_ED
    # A frozen part that comes now is paid now.
    cost = replace(cost, frozen_lifetime=1.0)
    return price(owner_E, where_ED, Flows(*(nothing_ED,) * 5), nothing_ED, topology, cost, resident_ED=resident_ED)


def after_router(given: PlanInput, plan: LayerPlan, present: LayerPlan | None = None, *, enough: float = np.inf) -> float:
    """Seconds of a layer's micro-step from its router on, the gather included of what a plan needs besides what has been gathered.

    Args:
        given: one layer under its true loads.
        present: whose replicas have been gathered; None: those of `plan`.
        enough: where it takes so many seconds, they need not be exact, only be as many.
    """
    assert given.loads_LED is not None
    loads_ED, where_ED = given.loads_LED[0], plan.placement.where_ED
    present_ED = where_ED if present is None else present.placement.where_ED
    if plan.source_split is not None and plan.quota_ED is not None:
        return after_router_by_flows(given, plan, present_ED)
    cost = cost_numbers(given.cost, given.topology, given.execution)
    none_ED, shape = np.zeros((0, 0)), where_ED.shape
    fresh = plan.quota_ED is None or plan.loads_ED is loads_ED or np.array_equal(plan.loads_ED, loads_ED)
    return seconds_after_router(
        contiguous(given.owner_LE[0], shape[:1], np.int64),
        contiguous(where_ED, shape, np.bool_),
        contiguous(present_ED, shape, np.bool_),
        np.zeros((0, 0), np.bool_) if given.resident_LED is None else contiguous(given.resident_LED[0], shape, np.bool_),
        none_ED if plan.quota_ED is None else contiguous(plan.quota_ED, shape, np.float64),
        none_ED if fresh else contiguous(plan.loads_ED, shape, np.float64),
        contiguous(loads_ED, shape, np.float64),
        topology_numbers(given.topology),
        cost._replace(frozen_bytes=0.0),
        cost._replace(fetched_share=1.0, route=FASTEST),  # a frozen part that comes now is paid now
        enough,
    )


def after_router_by_flows(given: PlanInput, plan: LayerPlan, present_ED: np.ndarray) -> float:
    """The same in plain numpy, for plans that divide each source's assignments by another system's rule; and what tests go by.

    Args:
        present_ED: bool [experts, ranks]: replicas that have been gathered.
    """
    assert given.loads_LED is not None
    cost = replace(given.cost, frozen_bytes=0.0)
    flow = plan.flow(given.loads_LED[0], given.topology)
    owner_E, where_ED = given.owner_LE[0], plan.placement.where_ED
    seconds = price(owner_E, where_ED, flow, given.loads_LED[0], given.topology, cost, execution=given.execution).seconds
    hides_gather = cost_numbers(cost, given.topology, given.execution).hides_gather
    hidden_before = exposed_seconds(hides_gather, float(seconds.gather), given.topology.overlap_slowdown)
    resident_ED = None if given.resident_LED is None else given.resident_LED[0]
    brought = price_missing(owner_E, present_ED, where_ED, given.topology, given.cost, resident_ED)
    return float(seconds.total - seconds.optimizer - hidden_before + brought.seconds.gather)
