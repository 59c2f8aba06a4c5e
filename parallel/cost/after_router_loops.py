"""How long a layer takes from its router on, with a plan whose replicas are gathered or are still to come: a compiled loop.

Shapes: E experts, D ranks.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_loops import TRAFFIC_ROWS, compute_seconds, exposed_seconds, replica_parts, traffic_seconds
from hecate.parallel.cost.cost_numbers import CostNumbers, TopologyNumbers
from hecate.parallel.cost.flow_loops import add_traffic, no_flow
from hecate.parallel.loops.array_loops import largest
from hecate.parallel.loops.jit import entry, loop
from hecate.parallel.loops.replica_lists import Replicas, fill_lists


@entry
def seconds_after_router(
    owner: np.ndarray,
    where: np.ndarray,
    present: np.ndarray,
    resident: np.ndarray,
    quota: np.ndarray,
    planned: np.ndarray,
    loads: np.ndarray,
    topology: TopologyNumbers,
    cost: CostNumbers,
    brought: CostNumbers,
    enough: float,
) -> float:
    """Seconds of experts, dispatch and backward pass, and of the gather of what is missing; if `enough` or more, `enough` or more.

    The gather that attention has hidden is over and does not count.

    Args:
        owner: int64 [experts].
        where: bool [experts, ranks]: the plan's replicas.
        present: bool [experts, ranks]: replicas that have been gathered.
        resident: bool [experts, ranks]: frozen parts that ranks hold; [0, 0]: only the owners'.
        quota, planned, loads: see `add_traffic`.
        cost: without frozen parts, which neither plan pays again.
        brought: the cost of what is brought now, whose frozen part is paid at once.
    """
    experts, ranks = where.shape
    replicas = Replicas(where, np.empty(experts, np.int64), np.empty((experts, ranks), np.int32), quota)
    trainable, frozen = np.empty((4, ranks)), np.empty((4, ranks))
    seconds = 0.0
    if _fill_missing(owner, present, replicas):
        seconds += replica_parts(owner, replicas, resident, topology, brought, trainable, frozen)[0]
    everywhere = fill_lists(where, replicas)
    gather, _, added = replica_parts(owner, replicas, np.zeros((0, 0), np.bool_), topology, cost, trainable, frozen)
    seconds += added - exposed_seconds(cost.hides_gather, gather, topology.slowdown)
    if seconds >= enough:
        return seconds
    if enough < np.inf and len(quota) > 0 and len(planned) == 0:
        seconds_at_least = seconds + _least_compute(replicas, loads, topology, cost)
        if seconds_at_least >= enough:
            return seconds_at_least
    traffic, rows = np.zeros((TRAFFIC_ROWS, ranks)), np.empty((5, ranks))
    add_traffic(where, quota, planned, loads, topology, no_flow(ranks, len(topology.uplink_N)), traffic)
    compute, dispatch = traffic_seconds(traffic, everywhere, topology, cost, rows)
    return seconds + compute + dispatch


@loop
def _fill_missing(owner: np.ndarray, present: np.ndarray, replicas: Replicas) -> bool:
    """The lists of what a plan needs besides, and of the owners; returns whether it needs anything."""
    missing = False
    for e in range(len(owner)):
        count = 0
        for d in range(present.shape[1]):
            lacks = replicas.has_ED[e, d] and not present[e, d]
            if lacks or d == owner[e]:
                replicas.rank_EC[e, count] = d
                count += 1
            missing = missing or (lacks and d != owner[e])
        replicas.count_E[e] = count
    return missing


@loop
def _least_compute(replicas: Replicas, loads: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """Seconds of expert compute on the busiest rank, where each rank serves its quotas of these loads."""
    ranks = loads.shape[1]
    local, served, own, rows = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.empty(ranks)
    for e in range(len(loads)):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            local[d] += min(loads[e, d], replicas.quota_ED[e, d])
            served[d] += replicas.quota_ED[e, d]
        for d in range(ranks):
            own[d] += loads[e, d]
    return largest(compute_seconds(local, served, own, topology, cost, rows))
