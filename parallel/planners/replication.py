"""Rules by which `auto` brings replicas of experts to the ranks whose tokens chose them, before it balances the ranks' work."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.cost.cost_loops import LayerLoads
from hecate.parallel.cost.cost_numbers import TopologyNumbers
from hecate.parallel.loops.array_loops import descending_order, where_largest
from hecate.parallel.loops.jit import loop
from hecate.parallel.loops.replica_lists import Replicas, add

OWNERS, WANTED, NODES, NODES_BUT_ONE = range(4)
_WINDOW = 8
"""experts that a node weighs against each other at a time"""


class ExpertOrders(NamedTuple):
    """Experts in the order in which they are wanted; ties differ from place to place, or all would ask the same owner."""

    by_load_E: np.ndarray
    """int64 [experts], hottest first"""
    rank_DE: np.ndarray
    """int64 [ranks, as many as have room]: experts of other owners that the rank's tokens chose; then -1"""
    node_NE: np.ndarray
    """int64 [nodes, experts]: the experts that the node's tokens chose most often come first"""


@loop
def expert_orders(owner: np.ndarray, slots: np.ndarray, loads: LayerLoads, topology: TopologyNumbers) -> ExpertOrders:
    ranks, experts = loads.tokens_SE.shape
    nodes = len(topology.uplink_N)
    widest = 0
    for d in range(ranks):
        widest = max(widest, min(slots[d], experts))
    rank_DE, amount = np.empty((ranks, widest), np.int64), np.zeros((ranks, widest))
    for d in range(ranks if widest > 0 else 0):
        tokens, first = loads.tokens_SE[d], d * experts // ranks
        for i in range(widest):
            rank_DE[d, i] = -1
        for i in range(experts):
            e = first + i if first + i < experts else first + i - experts
            if tokens[e] <= amount[d, widest - 1] or owner[e] == d:
                continue
            place = widest - 1
            while place > 0 and amount[d, place - 1] < tokens[e]:
                amount[d, place] = amount[d, place - 1]
                rank_DE[d, place] = rank_DE[d, place - 1]
                place -= 1
            amount[d, place] = tokens[e]
            rank_DE[d, place] = e
    node_NE, wanted = np.empty((nodes, experts), np.int64), np.empty(experts)
    for n in range(nodes):
        first = (n + 1) * experts // nodes
        for i in range(experts):
            wanted[i] = loads.tokens_NE[n, (first + i) % experts]
        order = descending_order(wanted)
        for i in range(experts):
            node_NE[n, i] = (order[i] + first) % experts
    return ExpertOrders(descending_order(loads.load_E), rank_DE, node_NE)


@loop
def bring_wanted(room: np.ndarray, orders: ExpertOrders, loads: LayerLoads, replicas: Replicas) -> None:
    """To each rank the experts of which it has the most assignments, as many as it has room for."""
    for d in range(len(room)):
        for i in range(min(room[d], orders.rank_DE.shape[1])):
            e = orders.rank_DE[d, i]
            if e < 0 or loads.tokens_SE[d, e] <= 0:
                break
            add(replicas, e, d)


@loop
def bring_to_nodes(
    owner: np.ndarray,
    room: np.ndarray,
    least: float,
    orders: ExpertOrders,
    loads: LayerLoads,
    topology: TopologyNumbers,
    replicas: Replicas,
) -> None:
    """Into each node the experts it lacks that its tokens want most, more than `least`, one copy each.

    Nodes take turns. Of the next few on its list a node takes the one that relieves the busiest way in: tokens for it from outside its
    home node, over the home node's uplink. Then each copy goes to the least busy rank of the node with room.

    Args:
        room: int64 [ranks]: replicas that each may get.
    """
    nodes, experts = loads.tokens_NE.shape
    open_, left = np.empty((nodes, experts), np.bool_), np.zeros(nodes, np.int64)
    free, arriving = room.copy(), np.zeros(nodes)
    for d in range(len(room)):
        left[topology.node_D[d]] += max(room[d], 0)
    for e in range(experts):
        for n in range(nodes):
            open_[n, e] = True
        for c in range(replicas.count_E[e]):
            open_[topology.node_D[replicas.rank_EC[e, c]], e] = False
        for n in range(nodes):
            if open_[n, e]:
                arriving[topology.node_D[owner[e]]] += loads.tokens_NE[n, e]
    brought, start = np.zeros((nodes, experts), np.bool_), np.zeros(nodes, np.int64)
    more = True
    while more:
        more = False
        for n in range(nodes):
            if left[n] <= 0:
                continue
            best, most, seen, i = -1, 0.0, 0, start[n]
            while i < experts and seen < _WINDOW:
                e = orders.node_NE[n, i]
                if loads.tokens_NE[n, e] <= least:
                    break
                if open_[n, e]:
                    home = topology.node_D[owner[e]]
                    gain = loads.tokens_NE[n, e] * arriving[home] / topology.uplink_N[home]
                    if gain > most:
                        best, most = e, gain
                    seen += 1
                elif seen == 0:
                    start[n] = i + 1
                i += 1
            if best >= 0:
                open_[n, best] = False
                brought[n, best] = True
                arriving[topology.node_D[owner[best]]] -= loads.tokens_NE[n, best]
                left[n] -= 1
                more = True
    _place(owner, brought, open_, free, orders, loads, topology, replicas)


@loop
def _place(
    owner: np.ndarray,
    brought: np.ndarray,
    open_: np.ndarray,
    free: np.ndarray,
    orders: ExpertOrders,
    loads: LayerLoads,
    topology: TopologyNumbers,
    replicas: Replicas,
) -> None:
    nodes, experts = loads.tokens_NE.shape
    busy, extra = np.zeros(len(free)), np.zeros(experts)
    for e in range(experts):
        far, nodes_with = 0.0, 0.0
        for n in range(nodes):
            if open_[n, e]:
                far += loads.tokens_NE[n, e]
            else:
                nodes_with += 1.0
        extra[e] = far / nodes_with  # assignments from nodes without the expert go evenly over those with it
        if replicas.count_E[e] == 1:
            busy[owner[e]] += loads.tokens_NE[topology.node_D[owner[e]], e] + extra[e]
    for n in range(nodes):
        for w in range(experts):
            e = orders.node_NE[n, w]
            if brought[n, e]:
                best = -1
                for i in range(topology.first_N[n], topology.first_N[n + 1]):
                    d = topology.member_D[i]
                    if free[d] > 0 and (best < 0 or busy[d] * topology.rate_D[best] < busy[best] * topology.rate_D[d]):
                        best = d
                add(replicas, e, best)
                free[best] -= 1
                busy[best] += loads.tokens_NE[n, e] + extra[e]


@loop
def deal(
    owner: np.ndarray, room: np.ndarray, orders: ExpertOrders, loads: LayerLoads, topology: TopologyNumbers, replicas: Replicas
) -> None:
    """Slot by slot, the expert with the highest load per replica that still finds room gets one more replica (Hecate, Algorithm 1).

    It goes to the node with the fewest of them, of these to the one with the most slots left, and in it to the rank with the most.
    """
    ranks, experts, nodes = len(room), len(owner), len(topology.uplink_N)
    free_D, free_N, left = room.copy(), np.zeros(nodes, np.int64), 0
    for d in range(ranks):
        free_N[topology.node_D[d]] += free_D[d]
        left += free_D[d]
    share_X, held_XN = np.empty(experts), np.zeros((experts, nodes), np.int64)
    for x in range(experts):  # hottest first
        share_X[x] = loads.load_E[orders.by_load_E[x]]
        held_XN[x, topology.node_D[owner[orders.by_load_E[x]]]] = 1
    while left > 0:
        x = where_largest(share_X)
        if share_X[x] <= 0:
            return
        e, best = orders.by_load_E[x], -1
        for d in range(ranks):
            if free_D[d] <= 0 or replicas.has_ED[e, d]:
                continue
            n, m = topology.node_D[d], topology.node_D[best]
            better = best < 0 or held_XN[x, n] < held_XN[x, m]
            if not better and held_XN[x, n] == held_XN[x, m]:
                better = free_N[n] > free_N[m] or (free_N[n] == free_N[m] and free_D[d] > free_D[best])
            if better:
                best = d
        if best < 0:
            share_X[x] = -1.0
            continue
        add(replicas, e, best)
        node = topology.node_D[best]
        free_D[best] -= 1
        free_N[node] -= 1
        left -= 1
        held_XN[x, node] += 1
        share_X[x] = loads.load_E[e] / replicas.count_E[e]


@loop
def replicate(
    rule: int,
    owner: np.ndarray,
    slots: np.ndarray,
    cost_in_rows: float,
    orders: ExpertOrders,
    loads: LayerLoads,
    topology: TopologyNumbers,
    replicas: Replicas,
) -> None:
    """Add to `replicas`, of owners only, what a rule says.

    - OWNERS: nothing.
    - WANTED: all experts of other owners where they fit in, wanted or not: nothing is dispatched then. Else `bring_wanted`.
    - NODES: `bring_to_nodes` of those that are wanted by more tokens than cost half as much to send as the expert.
    - NODES_BUT_ONE: the same of those wanted by as many as cost as much, into all slots of a rank but one.
    """
    ranks, experts = loads.tokens_SE.shape
    if rule == WANTED:
        lacking = np.full(ranks, experts)
        for e in range(experts):
            lacking[owner[e]] -= 1
        room_for_all = True
        for d in range(ranks):
            room_for_all = room_for_all and slots[d] >= lacking[d]
        if room_for_all:
            for e in range(experts):
                for d in range(ranks):
                    if d != owner[e]:
                        add(replicas, e, d)
        else:
            bring_wanted(slots, orders, loads, replicas)
    elif rule == NODES:
        bring_to_nodes(owner, slots, cost_in_rows / 2, orders, loads, topology, replicas)
    elif rule == NODES_BUT_ONE:
        room = slots.copy()
        for d in range(ranks):
            room[d] = max(slots[d] - 1, 0)
        bring_to_nodes(owner, room, cost_in_rows, orders, loads, topology, replicas)
