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
from hecate.parallel.planners.replication import ExpertOrders, bring_to_nodes, deal

BEST, FILLED, UNDER, SPREAD, MOVED, NEAR, DEALT, PACKED, COVERED, ALONE = range(10)
"""the best plan so far; `fill_up`; `keep_under`; `spread` with copies in all slots, and in half of them; `copy_in_nodes`; `deal`; `pack`;
in each node all experts that its tokens chose, as far as the slots go; no replicas"""
ONE_NODE = (BEST, FILLED, UNDER, SPREAD, MOVED, DEALT, PACKED, ALONE)
SEVERAL_NODES = (BEST, FILLED, NEAR, DEALT, PACKED, COVERED, ALONE)
"""the starts in the order in which the search takes them while its time lasts, on one node and on several"""

_LEAST = 1e-6
"""as many assignments as this, or fewer, are not moved"""
_HALVINGS = 7
"""how often `keep_under` halves the distance between the mean and the busiest rank's time, to find its bound"""


@loop
def goes_slot_by_slot(start: int) -> bool:
    """Whether making a plan takes time for each slot; else it does for each rank."""
    return start in (SPREAD, MOVED, NEAR, DEALT)


@loop
def start_with(
    start: int, owner: np.ndarray, slots: np.ndarray, orders: ExpertOrders, loads: LayerLoads, topology: TopologyNumbers, plan: Replicas
) -> None:
    """Fill `plan` with one of the plans from which the search begins, of those after BEST."""
    only_owners(plan, owner)
    if start == FILLED:
        fill_up(owner, slots, loads, topology, plan)
    elif start == UNDER:
        keep_under(owner, slots, loads, topology, plan)
    elif start in (SPREAD, MOVED):
        number = 0
        for d in range(len(slots)):
            number += slots[d]
        spread(number if start == SPREAD else number // 2, owner, slots, loads, topology, plan)
    elif start == PACKED:
        pack_owners(owner, slots, loads, topology, plan)
    else:
        if start == COVERED:
            bring_to_nodes(owner, slots, 0.0, orders, loads, topology, plan)
        elif start == DEALT:
            deal(owner, slots, orders, loads, topology, plan)
        elif start == NEAR:
            copy_in_nodes(owner, slots, loads, topology, plan)
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
def pack_owners(owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas) -> None:
    """From owners alone: whole experts by load, each to the least busy rank with room for it, at home if that is as good (SmartMoE's rule).

    A rank computes no more experts than if all had the same number, so that those that get a hot one give cold ones away. Few experts
    travel, each once. Changes `replicas`, of owners only.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
    """
    experts, ranks = replicas.has_ED.shape
    room, free = -(-experts // ranks), slots.copy()
    count_D, busy_D = np.zeros(ranks, np.int64), np.zeros(ranks)
    order_E = descending_order(loads.load_E)
    for e in range(experts):
        busy_D[owner[e]] += loads.load_E[e] / topology.rate_D[owner[e]]  # those still to come count at home
    for i in range(experts):
        e = order_E[i]
        home, load = owner[e], loads.load_E[e]
        busy_D[home] -= load / topology.rate_D[home]
        best = home if count_D[home] < room else -1
        for d in range(ranks):
            if d != home and count_D[d] < room and free[d] > 0 and load > 0:
                later, best_later = busy_D[d] + load / topology.rate_D[d], np.inf
                if best >= 0:
                    best_later = busy_D[best] + load / topology.rate_D[best]
                if later < best_later * (1.0 - _LEAST):
                    best = d
        best = best if best >= 0 else home
        if best != home:
            add(replicas, e, best)
            free[best] -= 1
            replicas.quota_ED[e, home] = 0.0
        replicas.quota_ED[e, best] = load
        busy_D[best] += load / topology.rate_D[best]
        count_D[best] += 1


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
def spread(spare: int, owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas) -> None:
    """`spare` more copies to the highest load per copy, then all packed by load, each to the least busy rank with room (EPLB's rule).

    An expert stays at home where that is as good; its copies serve the same number of assignments. Changes `replicas`, of owners only.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
    """
    experts, ranks = replicas.has_ED.shape
    copies_E, share_E, free = np.ones(experts, np.int64), loads.load_E.copy(), slots.copy()
    for _ in range(spare):
        e = where_largest(share_E)
        if share_E[e] <= 0:
            break
        copies_E[e] += 1
        share_E[e] = loads.load_E[e] / copies_E[e] if copies_E[e] < ranks else 0.0
    for e in range(experts):
        share_E[e] = loads.load_E[e] / copies_E[e]
    busy_D = np.zeros(ranks)
    for e in range(experts):
        busy_D[owner[e]] += share_E[e] / topology.rate_D[owner[e]]  # those still to come count at home
    order_E = descending_order(share_E)
    for x in range(experts):
        e = order_E[x]
        home, share = owner[e], share_E[e]
        if share <= 0:
            break  # the rest has no tokens, and stays at home
        busy_D[home] -= share / topology.rate_D[home]
        placed, at_home = 0, False
        while placed < copies_E[e]:
            best = -1 if at_home else home
            for d in range(ranks):
                if d == home or replicas.has_ED[e, d] or free[d] <= 0:
                    continue
                if best < 0 or busy_D[d] + share / topology.rate_D[d] < (busy_D[best] + share / topology.rate_D[best]) * (1.0 - _LEAST):
                    best = d
            if best < 0:
                break
            if best == home:
                at_home = True
            else:
                add(replicas, e, best)
                free[best] -= 1
            busy_D[best] += share / topology.rate_D[best]
            placed += 1
        each = loads.load_E[e] / placed
        for c in range(replicas.count_E[e]):
            replicas.quota_ED[e, replicas.rank_EC[e, c]] = each
        if not at_home:
            replicas.quota_ED[e, home] = 0.0


@loop
def copy_in_nodes(owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas) -> None:
    """In each node, slot by slot, one more copy of the expert with the highest load of the node's tokens per copy there.

    It goes to the least busy rank of the node with room. Adds to `replicas`, of owners only, and leaves the quotas to the caller.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
    """
    experts, ranks = replicas.has_ED.shape
    free, busy_D, share_E = slots.copy(), np.zeros(ranks), np.empty(experts)
    copies_E = np.empty(experts, np.int64)
    for e in range(experts):
        busy_D[owner[e]] += loads.load_E[e]
    for node in range(len(topology.uplink_N)):
        first, last = topology.first_N[node], topology.first_N[node + 1]
        left = 0
        for i in range(first, last):
            left += free[topology.member_D[i]]
        for e in range(experts):
            copies_E[e] = 1 if topology.node_D[owner[e]] == node else 0
            share_E[e] = loads.tokens_NE[node, e]
        while left > 0:
            e = where_largest(share_E)
            if share_E[e] <= 0:
                break
            best = -1
            for i in range(first, last):
                d = topology.member_D[i]
                if free[d] <= 0 or replicas.has_ED[e, d]:
                    continue
                if best < 0 or busy_D[d] * topology.rate_D[best] < busy_D[best] * topology.rate_D[d]:
                    best = d
            if best < 0:
                share_E[e] = 0.0
                continue
            add(replicas, e, best)
            free[best] -= 1
            left -= 1
            copies_E[e] += 1
            share = loads.tokens_NE[node, e] / copies_E[e]
            share_E[e] = share
            busy_D[best] += share
            if copies_E[e] == 1:  # its tokens of this node no longer go to the owner
                busy_D[owner[e]] -= share
