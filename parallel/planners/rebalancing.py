"""Hands assignments of tokens from devices that are too busy to devices with time left, for `auto`."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_numbers import TopologyNumbers
from hecate.parallel.loops.array_loops import descending_order, total, where_largest
from hecate.parallel.loops.jit import loop
from hecate.parallel.loops.replica_lists import Replicas, add, foreign

_LEAST = 1e-6
"""as many assignments as this, or fewer, are not moved"""


@loop
def rebalance(
    owner: np.ndarray, busy: np.ndarray, slots: np.ndarray, slack: float, across: bool, topology: TopologyNumbers, replicas: Replicas
) -> None:
    """Move assignments from devices above `slack` times the mean compute time to those below it; changes `replicas`.

    Nodes first: whole nodes hand over few large experts, so that few copies cross the slow links. Then the devices of each node among
    themselves, then whatever did not fit. Largest piece to the one with the most time left; ties by index.

    Args:
        owner: int64 [experts].
        busy: float64 [ranks]: seconds of expert compute under the quotas.
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
        across: move assignments between nodes, too.
    """
    experts, ranks = replicas.has_ED.shape
    free = foreign(replicas, owner)
    for d in range(ranks):
        free[d] = slots[d] - free[d]
    choices, held_D = np.zeros(ranks), np.zeros(ranks + 1, np.int64)
    for e in range(experts):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            choices[d] += replicas.quota_ED[e, d]
            held_D[d + 1] += 1
    rate, work = total(topology.rate_D), 0.0
    for d in range(ranks):
        work += busy[d] * topology.rate_D[d]
    target = slack * work / rate
    fair = slack * total(choices) / rate
    excess, spare = np.zeros(ranks), np.zeros(ranks)
    for d in range(ranks):
        held_D[d + 1] += held_D[d]
        if busy[d] > target:
            excess[d] = (busy[d] - target) * choices[d] / busy[d]
        else:
            # A device with little work takes assignments at the average work of an assignment.
            spare[d] = max(0.0, fair * topology.rate_D[d] - choices[d])
    # The experts of each rank; those with excess get no new ones.
    experts_of = np.empty(held_D[ranks], np.int64)
    end_D = held_D.copy()
    for e in range(experts):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            experts_of[end_D[d]] = e
            end_D[d] += 1
    several = len(topology.uplink_N) > 1
    if several and across:
        _between_nodes(free, fair, topology, replicas, excess, spare)
    if several:
        _between_devices(free, held_D, experts_of, topology, True, replicas, excess, spare)
    if across or not several:
        _between_devices(free, held_D, experts_of, topology, False, replicas, excess, spare)


@loop
def _between_nodes(
    free: np.ndarray, fair: float, topology: TopologyNumbers, replicas: Replicas, excess: np.ndarray, spare: np.ndarray
) -> None:
    experts, ranks = replicas.has_ED.shape
    nodes = len(topology.uplink_N)
    over = np.zeros(nodes)
    held = np.zeros((nodes, experts))
    for d in range(ranks):
        over[topology.node_D[d]] -= fair * topology.rate_D[d]
    for e in range(experts):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            held[topology.node_D[d], e] += replicas.quota_ED[e, d]
            over[topology.node_D[d]] += replicas.quota_ED[e, d]
    takes = np.empty(nodes)
    for n in range(nodes):
        takes[n] = max(-over[n], 0.0)
    for source in range(nodes):
        if over[source] <= _LEAST:
            continue
        largest = held[source].copy()
        while over[source] > _LEAST:  # few experts: looking for each is faster than sorting all
            e = where_largest(largest)
            largest[e] = 0.0
            piece = min(held[source, e], over[source])
            if piece <= _LEAST:
                break
            while piece > _LEAST:
                node = where_largest(takes)
                amount = min(piece, takes[node])
                if amount <= _LEAST:
                    return
                moved = _fill_node(e, node, amount, free, topology, replicas, spare)
                takes[node] = takes[node] - moved if moved > _LEAST else 0.0
                piece -= moved
                over[source] -= moved
                for i in range(topology.first_N[source], topology.first_N[source + 1]):
                    d = topology.member_D[i]
                    if replicas.has_ED[e, d]:
                        taken = moved * replicas.quota_ED[e, d] / held[source, e]
                        replicas.quota_ED[e, d] -= taken
                        excess[d] = max(0.0, excess[d] - taken)
                held[source, e] -= moved


@loop
def _fill_node(
    expert: int, node: int, amount: float, free: np.ndarray, topology: TopologyNumbers, replicas: Replicas, spare: np.ndarray
) -> float:
    """Give assignments of an expert to the devices of a node; returns how many found room."""
    left = amount
    while left > _LEAST:
        best = _most_spare(expert, node, free, topology, replicas, spare)
        if best < 0:
            break
        left -= _give(expert, best, left, free, replicas, spare)
    return amount - left


@loop
def _between_devices(
    free: np.ndarray,
    held_D: np.ndarray,
    experts_of: np.ndarray,
    topology: TopologyNumbers,
    same_node: bool,
    replicas: Replicas,
    excess: np.ndarray,
    spare: np.ndarray,
) -> None:
    order = descending_order(excess)
    # Time left only shrinks: once nobody can take an expert's assignments, nobody can any more.
    nobody_NE = np.zeros((len(topology.uplink_N) if same_node else 1, len(replicas.count_E)), np.bool_)
    for s in range(len(order)):
        source = order[s]
        if excess[source] <= _LEAST:
            break
        node = topology.node_D[source] if same_node else -1
        nobody_E = nobody_NE[max(node, 0)]
        held = experts_of[held_D[source] : held_D[source + 1]]
        amount = np.empty(len(held))
        for i in range(len(held)):
            amount[i] = replicas.quota_ED[held[i], source]
        by_amount = descending_order(amount)
        for i in range(len(held)):
            e = held[by_amount[i]]
            left = min(replicas.quota_ED[e, source], excess[source])
            if left <= _LEAST:
                break
            while left > _LEAST and not nobody_E[e]:
                best = _most_spare(e, node, free, topology, replicas, spare)
                if best < 0:
                    nobody_E[e] = True
                    break
                moved = _give(e, best, left, free, replicas, spare)
                replicas.quota_ED[e, source] -= moved
                excess[source] -= moved
                left -= moved


@loop
def _most_spare(expert: int, node: int, free: np.ndarray, topology: TopologyNumbers, replicas: Replicas, spare: np.ndarray) -> int:
    """The device with the most time left (of a node; -1: of all) that has the expert; else of those with a free slot; -1: none."""
    best, best_fresh = -1, -1
    first = 0 if node < 0 else topology.first_N[node]
    last = len(spare) if node < 0 else topology.first_N[node + 1]
    for i in range(first, last):
        d = i if node < 0 else topology.member_D[i]
        if spare[d] > _LEAST:
            if replicas.has_ED[expert, d]:
                if best < 0 or spare[d] > spare[best]:
                    best = d
            elif free[d] > 0 and (best_fresh < 0 or spare[d] > spare[best_fresh]):
                best_fresh = d
    return best if best >= 0 else best_fresh


@loop
def _give(expert: int, device: int, amount: float, free: np.ndarray, replicas: Replicas, spare: np.ndarray) -> float:
    moved = min(amount, spare[device])
    if not replicas.has_ED[expert, device]:
        add(replicas, expert, device)
        free[device] -= 1
    replicas.quota_ED[expert, device] += moved
    spare[device] -= moved
    return moved
