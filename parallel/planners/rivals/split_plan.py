"""Plans of other systems, whose sources divide their tokens among the replicas by a rule of that system.

Only the simulator executes them. A run that trains takes the same placement and quotas and divides tokens as this project does
(`with_our_split`).

Shapes: L layers, E experts, S = D ranks as sources and as destinations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import exposed_seconds
from hecate.parallel.cost.cost_model import cost_numbers, price_missing, price_traffic
from hecate.parallel.planners.plan import LayerPlan, Plan, PlanInput, Planner
from hecate.parallel.planners.rivals.source_split import ALL_SOURCES, SourceSplit, traffic_of_shares


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitPlan(Plan):
    """A plan with quotas, and how each source divides its assignments so that they come out under the loads they were made for."""

    source_split: SourceSplit

    def layer(self, given: PlanInput, index: int) -> SplitLayerPlan:
        plan = super().layer(given, index)
        return SplitLayerPlan(plan.placement, plan.loads_ED, plan.quota_ED, source_split=self.source_split.of_layer(index))

    def traffic(self, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: Topology) -> np.ndarray:
        assert self.quota_LED is not None
        layers = enumerate(zip(self.where_LED, self.quota_LED, planned_LED, loads_LED, strict=True))
        return np.stack(
            [
                traffic_of_shares(self.source_split.of_layer(layer).shares(where_ED, quota_ED, planned_ED, topology), loads_ED, topology)
                for layer, (where_ED, quota_ED, planned_ED, loads_ED) in layers
            ]
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitLayerPlan(LayerPlan):
    """One layer's part of a `SplitPlan`."""

    source_split: SourceSplit

    def dispatches(self, topology: Topology) -> bool:
        stays = (bool((self.split(topology, rank)[:, rank] == 1).all()) for rank in range(topology.world_size))
        return not (self.placement.where_ED.all() and all(stays))

    def split(self, topology: Topology, source: int) -> np.ndarray:
        return self._shares(topology, slice(source, source + 1))[:, 0]

    def traffic(self, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
        return traffic_of_shares(self._shares(topology), loads_ED, topology)

    def seconds_from_router(self, given: PlanInput, present_ED: np.ndarray, enough: float = np.inf) -> float:
        owner_E, where_ED, topology = given.owner_LE[0], self.placement.where_ED, given.topology
        cost = replace(given.cost, frozen_bytes=0.0)
        traffic_XD = self.traffic(given.expected_LED[0], topology)
        seconds = price_traffic(owner_E, where_ED, traffic_XD, topology, cost, execution=given.execution).seconds
        hides_gather = cost_numbers(cost, topology, given.execution).hides_gather
        hidden_before = exposed_seconds(hides_gather, float(seconds.gather), topology.overlap_slowdown)
        resident_ED = None if given.resident_LED is None else given.resident_LED[0]
        brought = price_missing(owner_E, present_ED, where_ED, topology, given.cost, resident_ED)
        return float(seconds.total - seconds.optimizer - hidden_before + brought.seconds.gather)

    def _shares(self, topology: Topology, sources: slice = ALL_SOURCES) -> np.ndarray:
        """float64 [experts, these sources, ranks]"""
        assert self.quota_ED is not None
        return self.source_split.shares(self.placement.where_ED, self.quota_ED, self.loads_ED, topology, sources)


def with_our_split(planner: Planner) -> Planner:
    """The same placement and quotas, but a rank serves its own assignments first."""

    @wraps(planner)
    def planned(given: PlanInput) -> Plan:
        plan = planner(given)
        return Plan(plan.owner_LE, plan.where_LED, plan.quota_LED)

    return planned
