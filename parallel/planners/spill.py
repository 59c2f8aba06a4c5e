"""Handing choices from busy devices to those with time left."""

from __future__ import annotations

import numpy as np

from hecate.parallel.compiled import compiled
from hecate.parallel.planners.layer_loops import TopologyNumbers

_LEAST = 1e-6
"""choices not worth moving"""


@compiled
def spill(
    owner: np.ndarray,
    busy: np.ndarray,
    slots: np.ndarray,
    slack: float,
    topology: TopologyNumbers,
    where: np.ndarray,
    quota: np.ndarray,
) -> None:
    """Move choices from devices above `slack` times the mean compute time to those below it; changes `where` and `quota`.

    Nodes first: whole nodes hand over few large experts, so that few copies cross the slow links. Then the devices of each node among
    themselves, then whatever did not fit. Largest piece to the one with the most time left; ties by index.

    Args:
        owner: int64 [experts].
        busy: float64 [ranks]: seconds of expert compute under `quota`.
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
        where: bool [experts, ranks].
        quota: float64 [experts, ranks].
    """
    experts, ranks = quota.shape
    choices = np.zeros(ranks)
    free = slots.copy()
    for e in range(experts):
        for d in range(ranks):
            choices[d] += quota[e, d]
            if where[e, d] and owner[e] != d:
                free[d] -= 1
    rate = topology.rate_D.sum()
    target = slack * (busy * topology.rate_D).sum() / rate
    total = choices.sum()
    excess, spare = np.zeros(ranks), np.zeros(ranks)
    for d in range(ranks):
        if busy[d] > target:
            excess[d] = (busy[d] - target) * choices[d] / busy[d]
        else:
            # A device with little work takes choices at the average work of a choice.
            spare[d] = max(0.0, slack * total * topology.rate_D[d] / rate - choices[d])
    if len(topology.uplink_N) > 1:
        _between_nodes(owner, free, slack * total / rate, topology, where, quota, excess, spare)
        _between_devices(owner, free, topology, True, where, quota, excess, spare)
    _between_devices(owner, free, topology, False, where, quota, excess, spare)


@compiled
def _between_nodes(
    owner: np.ndarray,
    free: np.ndarray,
    fair: float,
    topology: TopologyNumbers,
    where: np.ndarray,
    quota: np.ndarray,
    excess: np.ndarray,
    spare: np.ndarray,
) -> None:
    experts, ranks = quota.shape
    nodes = len(topology.uplink_N)
    over = np.zeros(nodes)
    held = np.zeros((nodes, experts))
    for d in range(ranks):
        over[topology.node_D[d]] -= fair * topology.rate_D[d]
    for e in range(experts):
        for d in range(ranks):
            held[topology.node_D[d], e] += quota[e, d]
            over[topology.node_D[d]] += quota[e, d]
    takes = np.maximum(-over, 0.0)
    for source in range(nodes):
        if over[source] <= _LEAST:
            continue
        for e in np.argsort(-held[source], kind="mergesort"):
            piece = min(held[source, e], over[source])
            while piece > _LEAST:
                node = int(np.argmax(takes))
                amount = min(piece, takes[node])
                if amount <= _LEAST:
                    break
                moved = _fill_node(e, node, amount, owner, free, topology, where, quota, spare)
                takes[node] = takes[node] - moved if moved > _LEAST else 0.0
                piece -= moved
                over[source] -= moved
                for d in range(ranks):
                    if topology.node_D[d] == source and quota[e, d] > 0:
                        taken = moved * quota[e, d] / held[source, e]
                        quota[e, d] -= taken
                        excess[d] = max(0.0, excess[d] - taken)
                held[source, e] -= moved
            if over[source] <= _LEAST:
                break


@compiled
def _fill_node(
    expert: int,
    node: int,
    amount: float,
    owner: np.ndarray,
    free: np.ndarray,
    topology: TopologyNumbers,
    where: np.ndarray,
    quota: np.ndarray,
    spare: np.ndarray,
) -> float:
    """Give choices of an expert to the devices of a node; returns how many found room."""
    left = amount
    while left > _LEAST:
        best = _most_spare(expert, node, free, topology, where, spare)
        if best < 0:
            break
        left -= _give(expert, best, left, free, where, quota, spare)
    return amount - left


@compiled
def _between_devices(
    owner: np.ndarray,
    free: np.ndarray,
    topology: TopologyNumbers,
    same_node: bool,
    where: np.ndarray,
    quota: np.ndarray,
    excess: np.ndarray,
    spare: np.ndarray,
) -> None:
    for source in np.argsort(-excess, kind="mergesort"):
        if excess[source] <= _LEAST:
            break
        node = topology.node_D[source] if same_node else -1
        held = np.flatnonzero(quota[:, source] > _LEAST)
        for e in held[np.argsort(-quota[:, source][held], kind="mergesort")]:
            left = min(quota[e, source], excess[source])
            if left <= _LEAST:
                break
            while left > _LEAST:
                best = _most_spare(e, node, free, topology, where, spare)
                if best < 0:
                    break
                moved = _give(e, best, left, free, where, quota, spare)
                quota[e, source] -= moved
                excess[source] -= moved
                left -= moved


@compiled
def _most_spare(expert: int, node: int, free: np.ndarray, topology: TopologyNumbers, where: np.ndarray, spare: np.ndarray) -> int:
    """The device with the most time left (of a node; -1: of all) that has the expert; else of those with a free slot; -1: none."""
    best, best_fresh = -1, -1
    for d in range(len(spare)):
        if spare[d] > _LEAST and (node < 0 or topology.node_D[d] == node):
            if where[expert, d]:
                if best < 0 or spare[d] > spare[best]:
                    best = d
            elif free[d] > 0 and (best_fresh < 0 or spare[d] > spare[best_fresh]):
                best_fresh = d
    return best if best >= 0 else best_fresh


@compiled
def _give(expert: int, device: int, amount: float, free: np.ndarray, where: np.ndarray, quota: np.ndarray, spare: np.ndarray) -> float:
    moved = min(amount, spare[device])
    if not where[expert, device]:
        where[expert, device] = True
        free[device] -= 1
    quota[expert, device] += moved
    spare[device] -= moved
    return moved
