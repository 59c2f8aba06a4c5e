"""A new split of tokens over the replicas of a plan: what it can still become once its experts have been gathered."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_loops import LayerLoads, busy_seconds, dispatch_seconds, even_quota_into, layer_loads
from hecate.parallel.cost.cost_model import cost_numbers, topology_numbers
from hecate.parallel.cost.cost_numbers import CostNumbers, TopologyNumbers
from hecate.parallel.loops import jit
from hecate.parallel.loops.array_loops import largest, total
from hecate.parallel.loops.replica_lists import Replicas, add, copy_into, foreign, only_owners, room_for_plans
from hecate.parallel.planners.local_search import improve
from hecate.parallel.planners.plan import Plan, PlanInput
from hecate.parallel.planners.policies.auto import LEAST_SEARCH_AFTER_ROUTER, SEARCH_SHARE_AFTER_ROUTER
from hecate.parallel.planners.rebalancing import rebalance

_SLACKS = np.array([1.1, -1.2])
"""how far above the mean a device's compute may stay; negative: no assignment leaves its node"""


def split_anew(given: PlanInput, where_LED: np.ndarray) -> Plan:
    """The fastest of a few splits of the given loads over a placement: topology-aware dispatch, and the same with busy devices relieved.
    It is then improved by small changes.

    Args:
        where_LED: bool [layers, experts, ranks], each expert at its owner.
    """
    quota_LED = np.zeros(where_LED.shape)
    base, trial, best = room_for_plans(given.num_experts, given.world_size)
    _split_layers(
        np.array(given.owner_LE, dtype=np.int64),
        given.tokens_LSE,
        np.array(where_LED, dtype=np.bool_),
        topology_numbers(given.topology),
        cost_numbers(given.cost, given.topology, given.execution),
        base,
        trial,
        best,
        _SLACKS,
        quota_LED,
    )
    return Plan(given.owner_LE, where_LED, quota_LED)


@jit.entry
def _split_layers(
    owner_LE: np.ndarray,
    tokens_LSE: np.ndarray,
    where_LED: np.ndarray,
    topology: TopologyNumbers,
    cost: CostNumbers,
    base: Replicas,
    trial: Replicas,
    best: Replicas,
    slacks: np.ndarray,
    quota_LED: np.ndarray,
) -> None:
    """Fills `quota_LED`; `base`, `trial` and `best` are room to work in."""
    ranks, rates, single = len(topology.node_D), total(topology.rate_D), len(topology.uplink_N) == 1
    for layer in range(len(owner_LE)):
        owner = owner_LE[layer]
        loads = layer_loads(tokens_LSE[layer], topology)
        only_owners(base, owner)
        for e in range(len(owner)):
            for d in range(ranks):
                if where_LED[layer, e, d] and d != owner[e]:
                    add(base, e, d)
        even_quota_into(base, loads, topology)
        copy_into(base, best)
        busy_D, work = busy_seconds(base, loads, topology, cost), 0.0
        for d in range(ranks):
            work += busy_D[d] * topology.rate_D[d]
        seconds = largest(busy_D) + dispatch_seconds(base, loads, topology, cost, np.inf)
        held = foreign(base, owner)  # no slot is left
        for slack in slacks:
            if largest(busy_D) <= abs(slack) * work / rates:
                continue
            if single and slack < 0:
                continue
            copy_into(base, trial)
            rebalance(owner, busy_D, held, abs(slack), slack > 0, topology, trial)
            found = _seconds_if_less(seconds, trial, loads, topology, cost)
            if found < seconds:
                seconds = found
                copy_into(trial, best)
        copy_into(best, trial)
        allowance = max(SEARCH_SHARE_AFTER_ROUTER * seconds, LEAST_SEARCH_AFTER_ROUTER / (len(owner) * ranks))
        improve(owner, held, np.zeros((0, 0), np.bool_), loads, topology, cost, trial, allowance, True)
        if _seconds_if_less(seconds, trial, loads, topology, cost) < seconds:
            copy_into(trial, best)
        for e in range(len(owner)):
            for c in range(best.count_E[e]):
                d = best.rank_EC[e, c]
                quota_LED[layer, e, d] = best.quota_ED[e, d]


@jit.loop
def _seconds_if_less(seconds: float, split: Replicas, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """What a split takes in experts and dispatch; if that is `seconds` or more, `seconds` or more."""
    busy = largest(busy_seconds(split, loads, topology, cost))
    if busy >= seconds:
        return busy
    dispatch = dispatch_seconds(split, loads, topology, cost, (seconds - busy) * (1 + 1e-12))
    return busy + dispatch
