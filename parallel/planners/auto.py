"""Ours: replicas and token shares planned together, for devices and links that may all differ, chosen by predicted seconds.

A plan is made in two moves. *Reach* gives each device the experts that its own tokens want most, as many as one of a few rules says.
*Spill*: where devices are still too busy, they hand choices of their largest experts to those with time left, which get a replica for
it. Every rule with every degree of spill is a candidate; the cost model picks the best for each layer.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.compiled import compiled
from hecate.parallel.cost_model import overlap_degree
from hecate.parallel.planners.layer_loops import (
    CostNumbers,
    TopologyNumbers,
    busy_seconds,
    cost_numbers,
    dispatch_seconds,
    even_quota_into,
    replica_seconds,
    topology_numbers,
)
from hecate.parallel.planners.plan import Plan, PlanInput
from hecate.parallel.planners.spill import spill

SLACKS = (1.0, 1.05, 1.1, 1.25, 1.6)
"""how far above the mean a device's compute may stay before it spills"""
_REACHES = 8


def plan_auto(given: PlanInput) -> Plan:
    """The fastest of a few candidate plans under the cost model, layer by layer; with `max_imbalance`, of those that keep to it.

    Never gives a device more replicas than it has slots. Before any load is known every expert counts as equally hot.
    """
    tokens_LED = np.ascontiguousarray(given.tokens_LED, dtype=np.float64)
    topology, cost = topology_numbers(given.topology), cost_numbers(given.cost, given.topology)
    owned_LED = given.owned_LED
    resident_LED = owned_LED if given.resident_LED is None else given.resident_LED | owned_LED
    where_LED, quota_LED = np.empty_like(owned_LED), np.empty_like(tokens_LED)
    hidden = overlap_degree(given.cost, given.topology)
    worth = (given.cost.expert_bytes + given.cost.reduced_bytes) / (4 * given.cost.row_bytes) if given.cost.row_bytes else np.inf
    for layer in range(given.num_layers):
        _plan_layer(
            given.owner_LE[layer],
            tokens_LED[layer],
            resident_LED[layer],
            np.asarray(given.slots_D, dtype=np.int64),
            hidden,
            worth,
            np.inf if given.max_imbalance is None else float(given.max_imbalance),
            topology,
            cost,
            where_LED[layer],
            quota_LED[layer],
        )
    return Plan(given.owner_LE, where_LED, quota_LED)


@compiled
def _plan_layer(
    owner: np.ndarray,
    tokens: np.ndarray,
    resident: np.ndarray,
    slots: np.ndarray,
    hidden: int,
    worth: float,
    max_imbalance: float,
    topology: TopologyNumbers,
    cost: CostNumbers,
    best_where: np.ndarray,
    best_quota: np.ndarray,
) -> None:
    """Fills `best_where` and `best_quota` [experts, ranks]."""
    where, base = np.empty_like(best_where), np.empty_like(best_quota)
    trial_where, trial_quota = np.empty_like(best_where), np.empty_like(best_quota)
    bounded = max_imbalance < np.inf
    best_seconds, best_uneven = np.inf, np.inf
    last_copies = -1
    for rule in range(_REACHES):
        copies = _reach(_REACHES - 1 - rule, owner, tokens, slots, hidden, worth, topology, where)
        if _REACHES - 1 - rule in (2, 3, 5):
            if copies == last_copies:
                continue
            last_copies = copies
        fixed = replica_seconds(owner, where, resident, topology, cost)
        if fixed >= best_seconds and not bounded:  # spilling only adds replicas
            continue
        even_quota_into(where, tokens, topology, base)
        base_busy = busy_seconds(tokens, base, topology, cost)
        mean = (base_busy * topology.rate_D).sum() / topology.rate_D.sum()
        for degree in range(len(SLACKS) + 1):
            if degree == 0:
                trial_where[:] = where
                trial_quota[:] = base
                busy = base_busy.max()
                added = fixed
            else:
                slack = min(SLACKS[degree - 1], max_imbalance)
                if base_busy.max() <= slack * mean or (not bounded and slack * mean * 0.9 + fixed >= best_seconds):
                    continue
                trial_where[:] = where
                trial_quota[:] = base
                spill(owner, base_busy, slots, slack, topology, trial_where, trial_quota)
                busy = busy_seconds(tokens, trial_quota, topology, cost).max()
                if busy + fixed >= best_seconds and not bounded:
                    continue
                added = replica_seconds(owner, trial_where, resident, topology, cost)
            if busy + added >= best_seconds and not bounded:
                continue
            seconds = busy + added + dispatch_seconds(tokens, trial_quota, topology, cost)
            uneven = max(busy / mean, max_imbalance) if bounded and mean > 0 else 0.0
            if uneven < best_uneven - 1e-9 or (uneven <= best_uneven + 1e-9 and seconds < best_seconds):
                best_seconds, best_uneven = seconds, uneven
                best_where[:] = trial_where
                best_quota[:] = trial_quota


@compiled
def _reach(
    rule: int,
    owner: np.ndarray,
    tokens: np.ndarray,
    slots: np.ndarray,
    hidden: int,
    worth: float,
    topology: TopologyNumbers,
    where: np.ndarray,
) -> int:
    """Fills `where` by rule; returns the number of replicas. Rules: owners only; one replica a node where its tokens are worth it; each
    device's experts whose tokens are worth it; as many as travel hidden; experts hotter than a device can bear, everywhere; as many as
    fit."""
    experts, ranks = where.shape
    where[:] = False
    for e in range(experts):
        where[e, owner[e]] = True
    if rule == 1:
        _each_node(owner, tokens, slots, worth, topology, where)
    elif rule >= 6:
        room = slots.copy()
        for d in range(ranks):
            room[d] -= (slots[d] + 1) // 2 if rule == 6 else min(slots[d], 1)
        _each_node(owner, tokens, room, worth, topology, where)
    elif rule == 4:
        load = np.zeros(experts)
        for e in range(experts):
            for d in range(ranks):
                load[e] += tokens[e, d]
        used = np.zeros(ranks, np.int64)
        for e in np.argsort(-load, kind="mergesort"):
            if load[e] * ranks <= load.sum():
                break
            for d in range(ranks):
                if used[d] < slots[d] and not where[e, d]:
                    where[e, d] = True
                    used[d] += 1
    elif rule > 1:
        room = np.minimum(slots, hidden) if rule == 3 else slots
        if room.min() >= experts and rule != 2:
            where[:] = True
        else:
            _most_wanted(tokens, room, worth if rule == 2 else 0.0, where)
    return where.sum()


@compiled
def _each_node(owner: np.ndarray, tokens: np.ndarray, slots: np.ndarray, worth: float, topology: TopologyNumbers, where: np.ndarray) -> None:
    """Bring into each node the experts from other nodes that its tokens want most, one copy each, to its least busy device with room."""
    experts, ranks = where.shape
    nodes = len(topology.uplink_N)
    wanted = np.zeros((nodes, experts))
    for e in range(experts):
        for d in range(ranks):
            wanted[topology.node_D[d], e] += tokens[e, d]
    room = np.zeros(nodes, np.int64)
    for d in range(ranks):
        room[topology.node_D[d]] += max(slots[d], 0)
    brought = np.zeros((nodes, experts), np.bool_)
    order = np.empty((nodes, experts), np.int64)
    busy, free = np.zeros(ranks), slots.copy()
    arriving, home = np.zeros(nodes), np.empty(experts, np.int64)
    for e in range(experts):
        home[e] = topology.node_D[owner[e]]
        for n in range(nodes):
            if n != home[e]:
                arriving[home[e]] += wanted[n, e]
    for n in range(nodes):
        order[n] = np.argsort(-wanted[n], kind="mergesort")
    more = True
    while more:
        more = False
        for n in range(nodes):
            if room[n] <= 0:
                continue
            best, most = -1, 0.0
            for e in range(experts):
                if home[e] != n and not brought[n, e] and wanted[n, e] > worth:
                    gain = wanted[n, e] * arriving[home[e]] / topology.uplink_N[home[e]]
                    if gain > most:
                        best, most = e, gain
            if best >= 0:
                brought[n, best] = True
                arriving[home[best]] -= wanted[n, best]
                room[n] -= 1
                more = True
    for e in range(experts):
        copies, far = 1.0, 0.0
        for n in range(nodes):
            if brought[n, e]:
                copies += 1.0
            elif n != home[e]:
                far += wanted[n, e]
        busy[owner[e]] += wanted[home[e], e]
        for n in range(nodes):  # what comes from nodes without the expert goes evenly over those with it
            if brought[n, e]:
                wanted[n, e] += far / copies
            elif n == home[e]:
                busy[owner[e]] += far / copies
    for n in range(nodes):
        for e in order[n]:
            if brought[n, e]:
                best = -1
                for d in range(ranks):
                    if topology.node_D[d] == n and free[d] > 0:
                        if best < 0 or busy[d] * topology.rate_D[best] < busy[best] * topology.rate_D[d]:
                            best = d
                where[e, best] = True
                free[best] -= 1
                busy[best] += wanted[n, e]


@compiled
def _most_wanted(tokens: np.ndarray, room: np.ndarray, least: float, where: np.ndarray) -> None:
    """Give each device the experts it has not of which it has the most tokens, more than `least`, as many as it has room for."""
    experts, ranks = where.shape
    widest = min(max(room.max(), 0), experts)
    chosen, amount = np.full((ranks, widest), -1, np.int64), np.zeros((ranks, widest))
    for e in range(experts):
        for d in range(ranks):
            last = min(room[d], widest) - 1
            if last < 0 or where[e, d] or tokens[e, d] <= max(least, amount[d, last]):
                continue
            place = last
            while place > 0 and amount[d, place - 1] < tokens[e, d]:
                amount[d, place] = amount[d, place - 1]
                chosen[d, place] = chosen[d, place - 1]
                place -= 1
            amount[d, place] = tokens[e, d]
            chosen[d, place] = e
    for d in range(ranks):
        for place in range(widest):
            if chosen[d, place] >= 0:
                where[chosen[d, place], d] = True
