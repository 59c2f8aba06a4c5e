"""The plans of one layer from which `auto` begins its search for small changes, most of them by rules of other systems.

What a search finds depends on where it begins: with each of them it finds plans that it does not find with the others.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_loops import LayerLoads, even_quota_into
from hecate.parallel.cost.cost_numbers import TopologyNumbers
from hecate.parallel.loops.array_loops import descending_order, total, where_largest
from hecate.parallel.loops.jit import loop
from hecate.parallel.loops.replica_lists import Replicas, add, only_owners
from hecate.parallel.planners.replication import ExpertOrders, deal

STARTS = 7
"""the number of starts, which are:"""
BEST, FILLED, UNDER, EVEN, EVEN_SLOTS, DEALT, HELD = range(STARTS)
"""the best plan so far; `fill_up`; `keep_under`; `spread_over_nodes` with copies in half of the slots, and in all of them; `deal` of
as many replicas a rank as travel hidden; those whose frozen parts ranks hold"""

_LEAST = 1e-6
"""as many assignments as this, or fewer, are not moved"""
_HALVINGS = 7
"""how often `keep_under` halves the distance between the mean and the busiest rank's time, to find its bound"""


@loop
def goes_slot_by_slot(start: int) -> bool:
    """Whether making a plan takes time for each slot; else it does for each rank."""
    return start in (EVEN, EVEN_SLOTS, DEALT)


@loop
def start_with(
    start: int,
    owner: np.ndarray,
    slots: np.ndarray,
    resident: np.ndarray,
    hidden: int,
    orders: ExpertOrders,
    loads: LayerLoads,
    topology: TopologyNumbers,
    plan: Replicas,
) -> None:
    """Fill `plan` with one of the plans from which the search begins, of those after BEST.

    Args:
        hidden: how many replicas travel to a rank while other work hides them.
    """
    only_owners(plan, owner)
    if start == FILLED:
        fill_up(owner, slots, loads, topology, plan)
    elif start == UNDER:
        keep_under(owner, slots, loads, topology, plan)
    elif start in (EVEN, EVEN_SLOTS):
        spread_over_nodes(start == EVEN, owner, slots, loads, topology, plan)
    else:
        if start == DEALT:
            room = slots.copy()
            for d in range(len(slots)):
                room[d] = min(slots[d], hidden)
            deal(owner, room, orders, loads, topology, plan)
        elif start == HELD and len(resident) > 0:
            room = slots.copy()
            for i in range(len(owner)):
                e = orders.by_load_E[i]
                for d in range(len(slots)):
                    if resident[e, d] and d != owner[e] and room[d] > 0:
                        add(plan, e, d)
                        room[d] -= 1
        even_quota_into(plan, loads, topology)


@loop
def fill_up(owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas) -> None:
    """From owners alone: each rank below its share of the assignments is filled up by one owner's experts (MoonEP's rule).

    The owner that is furthest above its share fills the rank that is furthest below, and may fall below its own share and be filled up
    itself. It gives its largest experts first. What finds no slot stays with it. Changes `replicas`, of owners only.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
    """
    experts, ranks = replicas.has_ED.shape
    free, over_D = slots.copy(), np.zeros(ranks)
    home_X, rank_X, amount_X, pairs = np.empty(ranks, np.int64), np.empty(ranks, np.int64), np.empty(ranks), 0
    all_loads, rates = total(loads.load_E), total(topology.rate_D)
    for d in range(ranks):
        over_D[d] = -all_loads * topology.rate_D[d] / rates
    for e in range(experts):
        over_D[owner[e]] += loads.load_E[e]
        replicas.quota_ED[e, owner[e]] = loads.load_E[e]
    least = _LEAST * max(all_loads, 1.0)
    while pairs < ranks:  # each rank is filled once, and whoever is last balances itself
        home, rank = where_largest(over_D), where_largest(-over_D)
        if over_D[home] <= least or over_D[rank] >= -least:
            break
        home_X[pairs], rank_X[pairs], amount_X[pairs] = home, rank, -over_D[rank]
        over_D[home] += over_D[rank]
        over_D[rank] = 0.0
        pairs += 1
    left_E = loads.load_E.copy()
    amount_of = np.empty(experts)
    while True:
        x = where_largest(amount_X[:pairs]) if pairs > 0 else 0
        if pairs == 0 or amount_X[x] <= least:
            return
        home, rank = home_X[x], rank_X[x]
        for e in range(experts):
            amount_of[e] = left_E[e] if owner[e] == home and (replicas.has_ED[e, rank] or free[rank] > 0) else 0.0
        e = where_largest(amount_of)
        amount = min(amount_X[x], amount_of[e])
        if amount <= least:
            amount_X[x] = 0.0
            continue
        if not replicas.has_ED[e, rank]:
            add(replicas, e, rank)
            free[rank] -= 1
        replicas.quota_ED[e, rank] += amount
        replicas.quota_ED[e, home] -= amount
        amount_X[x] -= amount
        left_E[e] -= amount


@loop
def keep_under(owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas) -> None:
    """What a rank has above a bound goes to the ranks of its node with the most room under it, the largest experts first (UltraEP's rule).

    The bound is the lowest that is found feasible, in each node. Changes `replicas`, of owners only.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
    """
    order_E = descending_order(loads.load_E)
    load_D = np.zeros(len(slots))
    for e in range(len(owner)):
        load_D[owner[e]] += loads.load_E[e]
        replicas.quota_ED[e, owner[e]] = loads.load_E[e]
    for node in range(len(topology.uplink_N)):
        all_loads, rates, busiest = 0.0, 0.0, 0.0
        for i in range(topology.first_N[node], topology.first_N[node + 1]):
            d = topology.member_D[i]
            all_loads += load_D[d]
            rates += topology.rate_D[d]
            busiest = max(busiest, load_D[d] / topology.rate_D[d])
        low, high = all_loads / rates, busiest
        if _moved_under(low, False, node, order_E, owner, slots, load_D, loads, topology, replicas):
            high = low
        for _ in range(_HALVINGS):
            if high > low * (1 + 1e-3):
                middle = (low + high) / 2
                if _moved_under(middle, False, node, order_E, owner, slots, load_D, loads, topology, replicas):
                    high = middle
                else:
                    low = middle
        _moved_under(high, True, node, order_E, owner, slots, load_D, loads, topology, replicas)


@loop
def _moved_under(
    bound: float,
    keeps: bool,
    node: int,
    order_E: np.ndarray,
    owner: np.ndarray,
    slots: np.ndarray,
    load_D: np.ndarray,
    loads: LayerLoads,
    topology: TopologyNumbers,
    replicas: Replicas,
) -> bool:
    """Whether what a node's ranks have above a bound finds room in the node; with `keeps` it is moved, too."""
    first, last = topology.first_N[node], topology.first_N[node + 1]
    ranks = last - first
    over, room, free = np.empty(ranks), np.empty(ranks), np.empty(ranks, np.int64)
    for i in range(ranks):
        d = topology.member_D[first + i]
        over[i] = load_D[d] - bound * topology.rate_D[d]
        room[i] = max(-over[i], 0.0)
        free[i] = slots[d]
    tried = np.empty(ranks, np.bool_)
    by_over = descending_order(over)
    for s in range(ranks):
        need = over[by_over[s]]
        least = _LEAST * max(load_D[topology.member_D[first + by_over[s]]], 1.0)
        if need <= least:
            break
        source = topology.member_D[first + by_over[s]]
        for x in range(len(owner)):
            e = order_E[x]
            if owner[e] != source:
                continue
            left = min(loads.load_E[e], need)
            tried[:] = False
            while left > least:
                best = -1
                for i in range(ranks):
                    if room[i] > least and free[i] > 0 and not tried[i] and (best < 0 or room[i] > room[best]):
                        best = i
                if best < 0:
                    break
                amount = min(left, room[best])
                tried[best] = True
                room[best] -= amount
                free[best] -= 1
                left -= amount
                need -= amount
                if keeps:
                    rank = topology.member_D[first + best]
                    add(replicas, e, rank)
                    replicas.quota_ED[e, rank] = amount
                    replicas.quota_ED[e, source] -= amount
            if need <= least:
                break
        if need > least:
            return False
    return True


@loop
def spread_over_nodes(
    own_place: bool, owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas
) -> None:
    """Copies of the highest load per copy, first one for each node, then one for all nodes at a time (LAER-MoE's rule).

    Then all by load, each to a node that has fewest copies of its expert, and there to the least busy rank with room. Assignments are
    split evenly over the copies in their own node, else over all. Changes `replicas`, of owners only.

    Args:
        own_place: there are copies for half of the slots beside one for each owner, which takes none; else for all slots, and one at its
            owner takes one, so that all ranks serve as many.
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
    """
    experts, ranks = replicas.has_ED.shape
    nodes, places = len(topology.uplink_N), 0
    for d in range(ranks):
        places += slots[d]
    places = experts + places // 2 if own_place else places
    each = nodes if nodes * experts <= places else 1
    copies_E, share_E, left = np.full(experts, each), loads.load_E / each, places - experts * each
    while left > 0:
        e = where_largest(share_E)
        more = 1 if copies_E[e] < nodes else nodes
        if share_E[e] <= 0:
            break
        if more > left or copies_E[e] + more > ranks:
            share_E[e] = 0.0
            continue
        copies_E[e] += more
        left -= more
        share_E[e] = loads.load_E[e] / copies_E[e]
    for e in range(experts):
        share_E[e] = loads.load_E[e] / copies_E[e]
    free, busy_D, held_N = slots.copy(), np.zeros(ranks), np.zeros(nodes, np.int64)
    order_E = descending_order(share_E)
    for x in range(experts):
        e = order_E[x]
        home, at_home, placed = owner[e], False, 0
        held_N[:] = 0
        if share_E[e] <= 0:
            break  # the rest has no tokens, and stays at home
        while placed < copies_E[e]:
            best = -1
            for d in range(ranks):
                has = at_home if d == home else replicas.has_ED[e, d]
                if has or (free[d] <= 0 and not (own_place and d == home)):
                    continue
                if best >= 0:
                    held, least = held_N[topology.node_D[d]], held_N[topology.node_D[best]]
                    if held > least or (held == least and busy_D[d] * topology.rate_D[best] >= busy_D[best] * topology.rate_D[d]):
                        continue
                best = d
            if best < 0:
                break
            if best == home:
                at_home = True
            else:
                add(replicas, e, best)
            if best != home or not own_place:
                free[best] -= 1
            placed += 1
            held_N[topology.node_D[best]] += 1
            busy_D[best] += share_E[e]
        if placed == 0:  # no rank has room
            at_home, placed = True, 1
            held_N[topology.node_D[home]] = 1
        far = 0.0
        for n in range(nodes):
            if held_N[n] == 0:
                far += loads.tokens_NE[n, e]
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            n = topology.node_D[d]
            replicas.quota_ED[e, d] = loads.tokens_NE[n, e] / max(held_N[n], 1) + far / placed if d != home or at_home else 0.0
