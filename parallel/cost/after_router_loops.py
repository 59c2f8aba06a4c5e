"""How long a layer takes from its router on, with a plan whose replicas are gathered or are still to come: a compiled loop.

Shapes: E experts, D ranks.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_loops import (
    TRAFFIC_ROWS,
    busy_seconds,
    dispatch_seconds,
    even_quota_into,
    exposed_seconds,
    layer_loads,
    replica_parts,
    traffic_seconds,
)
from hecate.parallel.cost.cost_numbers import CostNumbers, TopologyNumbers
from hecate.parallel.cost.flow_loops import add_traffic
from hecate.parallel.loops.array_loops import largest
from hecate.parallel.loops.jit import entry, loop
from hecate.parallel.loops.replica_lists import Replicas, fill_lists, only_owners


@entry
def seconds_after_router(
    owner: np.ndarray,
    where: np.ndarray,
    present: np.ndarray,
    resident: np.ndarray,
    quota: np.ndarray,
    planned: np.ndarray,
    loads: np.ndarray,
    tokens: np.ndarray,
    topology: TopologyNumbers,
    cost: CostNumbers,
    brought: CostNumbers,
    room: Replicas,
    enough: float,
) -> float:
    """Seconds of experts, dispatch and backward pass, and of the gather of what is missing; if `enough` or more, `enough` or more.

    The gather that attention has hidden is over and does not count.

    Args:
        owner: int64 [experts].
        where: bool [experts, ranks]: the plan's replicas.
        present: bool [experts, ranks]: replicas that have been gathered.
        resident: bool [experts, ranks]: frozen parts that ranks hold; [0, 0]: only the owners'.
        quota, planned, loads: see `add_traffic`; of a plan that was made for the loads that came, the last two are [0, 0].
        tokens: float64 [ranks, experts]: the loads that came.
        cost: without frozen parts, which neither plan pays again.
        brought: the cost of what is brought now, whose frozen part is paid at once.
        room: to work in.
    """
    ranks = where.shape[1]
    only_owners(room, owner)  # the lists below hold the owners, too: whoever works in the room next takes away all that its `has_ED` says
    replicas = Replicas(where, room.count_E, room.rank_EC, quota if len(quota) > 0 else room.quota_ED)
    trainable, frozen = np.empty((4, ranks)), np.empty((4, ranks))
    seconds = 0.0
    if _fill_missing(owner, present, replicas):
        seconds += replica_parts(owner, replicas, resident, topology, brought, trainable, frozen)[0]
    everywhere = fill_lists(where, replicas)
    gather, _, added = replica_parts(owner, replicas, np.zeros((0, 0), np.bool_), topology, cost, trainable, frozen)
    seconds += added - exposed_seconds(cost.hides_gather, gather, topology.slowdown)
    if seconds >= enough:
        return seconds
    if len(planned) == 0:
        sums = layer_loads(tokens, topology)
        if len(quota) == 0:
            even_quota_into(replicas, sums, topology)
        compute = largest(busy_seconds(replicas, sums, topology, cost))
        if seconds + compute >= enough:
            return seconds + compute
        return seconds + compute + dispatch_seconds(replicas, sums, topology, cost, enough - seconds - compute)
    traffic, rows = np.zeros((TRAFFIC_ROWS, ranks)), np.empty((5, ranks))
    add_traffic(where, quota, planned, loads, topology, traffic)
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
