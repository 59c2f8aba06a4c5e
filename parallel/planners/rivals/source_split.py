"""How other systems divide an expert's assignments among its replicas: rules by which each source has shares of its own.

Only the simulator executes such plans. A run that trains takes the same placement and quotas (`with_our_split`), and a rank serves its
own assignments first, then its node's (`hecate.parallel.cost.flows`).

Shapes: ... any leading dimensions, L layers, E experts, S = D ranks as sources and as destinations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps
from typing import Literal

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import exposed_seconds
from hecate.parallel.cost.cost_model import cost_numbers, price_missing, price_traffic
from hecate.parallel.planners.plan import LayerPlan, Plan, PlanInput, Planner

SplitRule = Literal["alike", "in_node", "in_order"]
"""alike: every source has the same shares, in proportion to the weights. in_node: the same over the replicas in the source's node, if
there are any, else over all. in_order: the assignments of all sources lie in a line, the lower rank's first, and each replica serves a
part of it"""

ALL_SOURCES = slice(None)


@dataclass(frozen=True, eq=False)
class SourceSplit:
    """The rule of a plan, and what it goes by."""

    rule: SplitRule
    weight_ED: np.ndarray
    """[..., experts, ranks]: alike, in_node: weights, 0 where no replica is; in_order: where on the line a replica's part begins, which is
    as long as its quota"""

    def of_layer(self, layer: int) -> SourceSplit:
        return SourceSplit(self.rule, self.weight_ED[layer])

    def shares(
        self, where_ED: np.ndarray, quota_ED: np.ndarray, planned_ED: np.ndarray, topology: Topology, sources: slice = ALL_SOURCES
    ) -> np.ndarray:
        """float64 [experts, these sources, ranks]: shares of a source's assignments of an expert that go to each rank; they sum to 1.

        Where the rule says nothing, which is of sources without assignments in a line and of experts without weights, they are those of
        topology-aware dispatch (`even_shares`).

        Args:
            where_ED: bool [experts, ranks].
            quota_ED: float64 [experts, ranks].
            planned_ED: float64 [experts, all sources]: the loads that the quotas were made for.
            sources: which are wanted. Those of all take a gigabyte where a thousand ranks have hundreds of experts.
        """
        if self.rule == "in_order":
            begin_E1D, end_E1D = self.weight_ED[:, None], (self.weight_ED + quota_ED)[:, None]
            last_ES1 = np.cumsum(planned_ED, axis=1)[:, sources, None]
            first_ES1 = last_ES1 - planned_ED[:, sources, None]
            part_ESD = np.minimum(last_ES1, end_E1D) - np.maximum(first_ES1, begin_E1D)
            # Sums of fractions are not exact, and what is only rounding must not travel.
            part_ESD = np.where(part_ESD > 1e-9 * planned_ED.sum(1)[:, None, None], part_ESD, 0.0)
            total_ES1 = part_ESD.sum(-1, keepdims=True)
        else:
            same_node_SD = topology.same_node()[sources]
            part_ESD = np.broadcast_to(self.weight_ED[:, None], (len(planned_ED), *same_node_SD.shape)).astype(np.float64)
            if self.rule == "in_node":
                near_ESD = part_ESD * same_node_SD
                part_ESD = np.where(near_ESD.sum(-1, keepdims=True) > 0, near_ESD, part_ESD)
                total_ES1 = part_ESD.sum(-1, keepdims=True)
            else:  # weights are added in the order of the ranks, so that the bits do not depend on which sources are wanted
                total_ES1 = np.cumsum(self.weight_ED, axis=-1, dtype=np.float64)[:, None, -1:]
        if (total_ES1 > 0).all():
            return np.asarray(part_ESD / total_ES1)
        return np.divide(part_ESD, total_ES1, out=even_shares(where_ED, topology, sources), where=total_ES1 > 0)


def even_shares(where_ED: np.ndarray, topology: Topology, sources: slice = ALL_SOURCES) -> np.ndarray:
    """float64 [experts, these sources, ranks]: those of topology-aware dispatch (see `hecate.parallel.cost.flows.token_split`).

    Args:
        where_ED: bool [experts, ranks], each expert somewhere.
    """
    local_ESD = where_ED[:, None] & np.eye(topology.world_size, dtype=bool)[sources]
    near_ESD = where_ED[:, None] & topology.same_node()[sources]
    anywhere_ESD = np.broadcast_to(where_ED[:, None], local_ESD.shape)
    found_ESD = np.where(near_ESD.any(-1, keepdims=True), near_ESD, anywhere_ESD)
    found_ESD = np.where(local_ESD.any(-1, keepdims=True), local_ESD, found_ESD)
    return np.asarray(found_ESD / found_ESD.sum(-1, keepdims=True))


def traffic_of_shares(share_ESD: np.ndarray, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
    """float64 [7, ranks]: what each rank sends and serves (see `price_layers`) if each source divides its assignments by these shares.

    Args:
        share_ESD: float64 [experts, sources, ranks], see `SourceSplit.shares`.
        loads_ED: float64 [experts, sources].
    """
    sent_SD = (share_ESD * loads_ED[..., None]).sum(0)
    within_SD = topology.same_node()
    near_SD, far_SD = sent_SD * (within_SD & ~np.eye(topology.world_size, dtype=bool)), sent_SD * ~within_SD
    rows = near_SD.sum(1), near_SD.sum(0), far_SD.sum(1), far_SD.sum(0), np.diagonal(sent_SD), sent_SD.sum(0), loads_ED.sum(0)
    return np.stack(rows).astype(np.float64)


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
