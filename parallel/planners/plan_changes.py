"""Which small changes to a plan of one layer could take load off what the layer waits for: proposals for `local_search`.

A change is a row of numbers: the expert, the rank that gives assignments of it (or `OTHERS`, `OTHER_NODES`), the rank that gets them, the
expert whose replica on that rank makes room for it (`NOBODY`: the rank has room, or has the expert), and the number of assignments.

Shapes: E experts, D ranks, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.cost.cost_loops import LayerLoads
from hecate.parallel.cost.cost_numbers import FAR_IN, FAR_OUT, NEAR_IN, NEAR_OUT, TopologyNumbers
from hecate.parallel.loops.array_loops import where_largest
from hecate.parallel.loops.jit import loop
from hecate.parallel.loops.replica_lists import Replicas

EXPERT, SOURCE, TARGET, DROPPED, AMOUNT, EXCHANGES = range(6)
"""columns of a change; the last: 1 where the source gets the replica that makes room, in place of its own"""
NOBODY = -1
OTHERS, OTHER_NODES = -1, -2
"""instead of the rank that gives assignments: all other ranks that have the expert, or those in other nodes"""
HAS, FREE, CROWDED = range(3)
"""kinds of ranks for an expert (see `_least_busy`)"""
LEAST = 1e-6
"""as many assignments as this, or fewer, are not moved"""
CLOSED = -(2**30)
_SMALL = 1e-3
"""replicas that serve fewer assignments than this count as serving equally many"""


class Sums(NamedTuple):
    """What all experts add up to in the ranks' work and traffic, in assignments; float64 [ranks] each."""

    local_D: np.ndarray
    """the assignments that each rank serves of its own tokens"""
    served_D: np.ndarray
    near_in_D: np.ndarray
    """the assignments that each rank receives from its node"""
    far_in_D: np.ndarray
    """the assignments that each rank receives from other nodes"""
    far_out_D: np.ndarray
    """the assignments that each rank sends to other nodes"""


class Room(NamedTuple):
    """Arrays to work in."""

    ports: np.ndarray
    """[4, ranks]: rows through each port in one all-to-all"""
    terms: np.ndarray
    """[2 * ranks + nodes]: what each port inside its node, each port to other nodes and each uplink needs for these rows"""
    busy_D: np.ndarray
    """the seconds of expert compute on each rank"""
    busy_before_D: np.ndarray
    """the seconds of expert compute on each rank before the change that is being tried"""
    rows_D: np.ndarray
    share_N: np.ndarray
    """the part that leaves the node, of what leaves a rank of it"""
    sent_N: np.ndarray
    served_N: np.ndarray
    kept_rank_XD: np.ndarray
    """[2, ranks]: the replicas of the two experts of a change, as they were"""
    kept_quota_XD: np.ndarray
    kept_X: np.ndarray
    """int64 [2]: the number of replicas that each of the two experts had"""
    free_D: np.ndarray
    """int64: the slots that each rank has left; `CLOSED`: no replica may come"""
    value_E: np.ndarray


@loop
def _victim(target: int, spared: int, owner: np.ndarray, replicas: Replicas) -> int:
    """The expert whose replica on a rank serves least; -1: none but owned ones."""
    best = NOBODY
    for e in range(len(owner)):
        if not replicas.has_ED[e, target] or owner[e] == target or e == spared:
            continue
        if best < 0 or replicas.quota_ED[e, target] < replicas.quota_ED[best, target]:
            best = e
    return best


@loop
def least_busy_other(e: int, rank: int, owner: np.ndarray, busy_D: np.ndarray, replicas: Replicas) -> int:
    """Of the ranks that have an expert, apart from one, which is not its owner, the least busy; of equals its owner, then by index."""
    best = owner[e]
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        if d != rank and busy_D[d] < busy_D[best]:
            best = d
    return int(best)


@loop
def _note(
    e: int, source: int, target: int, amount: float, count: int, owner: np.ndarray, replicas: Replicas, room: Room, changes: np.ndarray
) -> int:
    """Add a change to the list, unless nothing is to be had; returns how many there are."""
    if target < 0 or amount <= LEAST or count == len(changes):
        return count
    dropped = NOBODY
    if not replicas.has_ED[e, target] and room.free_D[target] <= 0:
        if room.free_D[target] == CLOSED:
            return count
        dropped = _victim(target, e, owner, replicas)
        if dropped < 0:
            return count
    changes[count, EXPERT], changes[count, SOURCE], changes[count, TARGET] = e, source, target
    changes[count, DROPPED], changes[count, AMOUNT], changes[count, EXCHANGES] = dropped, amount, 0.0
    return count + 1


@loop
def exchange(
    place: int, count: int, owner: np.ndarray, sums: Sums, replicas: Replicas, topology: TopologyNumbers, room: Room, changes: np.ndarray
) -> int:
    """An exchange of one of the busiest device's largest replicas for one elsewhere, by which the busier of both has least to do."""
    busy_D = room.busy_D
    a = where_largest(busy_D)
    if sums.served_D[a] <= LEAST or count == len(changes) or room.free_D[a] == CLOSED:
        return count
    for e in range(len(owner)):
        room.value_E[e] = replicas.quota_ED[e, a] if replicas.has_ED[e, a] and owner[e] != a else 0.0
    e = _ranked(room.value_E, place)
    if e < 0:
        return count
    each, gives = busy_D[a] / sums.served_D[a] * topology.rate_D[a], replicas.quota_ED[e, a]
    least, best, rank = busy_D[a] * (1 - LEAST), NOBODY, NOBODY
    for f in range(len(owner)):
        if replicas.has_ED[f, a]:
            continue
        for c in range(replicas.count_E[f]):
            b = replicas.rank_EC[f, c]
            if b == owner[f] or replicas.has_ED[e, b]:
                continue
            moved = each * (gives - replicas.quota_ED[f, b])
            after = max(busy_D[a] - moved / topology.rate_D[a], busy_D[b] + moved / topology.rate_D[b])
            if after < least:
                least, best, rank = after, f, b
    if best < 0:
        return count
    changes[count, EXPERT], changes[count, SOURCE], changes[count, TARGET] = e, a, rank
    changes[count, DROPPED], changes[count, AMOUNT], changes[count, EXCHANGES] = best, gives, 1.0
    return count + 1


@loop
def _least_busy(e: int, node: int, kind: int, replicas: Replicas, topology: TopologyNumbers, room: Room) -> int:
    """The least busy rank of a node (-1: of all) that has an expert (`HAS`), has a slot for it (`FREE`) or must make room (`CROWDED`)."""
    best = NOBODY
    first = 0 if node < 0 else topology.first_N[node]
    last = len(room.busy_D) if node < 0 else topology.first_N[node + 1]
    for i in range(first, last):
        d = i if node < 0 else topology.member_D[i]
        if replicas.has_ED[e, d]:
            fits = kind == HAS
        elif room.free_D[d] > 0:
            fits = kind == FREE
        else:
            fits = kind == CROWDED
        if fits and (best < 0 or room.busy_D[d] < room.busy_D[best]):
            best = d
    return best


@loop
def _ranked(values: np.ndarray, place: int) -> int:
    """The index of the largest positive value (place 0), of the next (1), ...; the first of equals; -1: there is none."""
    found = NOBODY
    for _ in range(place + 1):
        best = NOBODY
        for i in range(len(values)):
            if values[i] > LEAST and (best < 0 or values[i] > values[best]):
                best = i
        if best < 0:
            return NOBODY
        found = best
        values[best] = -values[best]
    values[found] = -values[found]
    return found


@loop
def relieve_device(
    place: int, owner: np.ndarray, sums: Sums, replicas: Replicas, topology: TopologyNumbers, room: Room, changes: np.ndarray
) -> int:
    """Changes that bring assignments of the busiest device's largest experts to devices with time left."""
    busy_D, ranks, work, rates = room.busy_D, len(room.busy_D), 0.0, 0.0
    a, count = where_largest(busy_D), 0
    if sums.served_D[a] <= LEAST:
        return 0
    for d in range(ranks):
        work += busy_D[d] * topology.rate_D[d]
        rates += topology.rate_D[d]
    fair, each_a = work / rates, busy_D[a] / sums.served_D[a]
    for e in range(len(owner)):
        room.value_E[e] = replicas.quota_ED[e, a] if replicas.has_ED[e, a] else 0.0
    e = _ranked(room.value_E, place)
    if e >= 0:
        saved = busy_D[a]
        busy_D[a] = np.inf  # not to itself
        near, far = _least_busy(e, topology.node_D[a], FREE, replicas, topology, room), _least_busy(e, -1, FREE, replicas, topology, room)
        targets = (
            _least_busy(e, -1, HAS, replicas, topology, room),
            near,
            far if far != near else NOBODY,
            _least_busy(e, -1, CROWDED, replicas, topology, room) if far < 0 else NOBODY,
        )
        busy_D[a] = saved
        for b in targets:
            if b < 0 or busy_D[b] >= busy_D[a] or b == a:
                continue
            each_b = each_a * topology.rate_D[a] / topology.rate_D[b]
            amount = (busy_D[a] - busy_D[b]) / (each_a + each_b)
            if busy_D[b] < fair < busy_D[a]:
                amount = min(amount, (fair - busy_D[b]) / each_b)
            count = _note(e, a, b, min(amount, replicas.quota_ED[e, a]), count, owner, replicas, room, changes)
    return count


@loop
def _missing(e: int, d: int, replicas: Replicas, loads: LayerLoads) -> float:
    """Assignments of a rank's own tokens that others serve."""
    served = min(loads.tokens_SE[d, e], replicas.quota_ED[e, d]) if replicas.has_ED[e, d] else 0.0
    return loads.tokens_SE[d, e] - served


@loop
def _far_of_node(e: int, n: int, replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers) -> tuple[float, float]:
    """Assignments of an expert that leave a node, and that come to it from others."""
    sent, served = loads.tokens_NE[n, e], 0.0
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        if topology.node_D[d] == n:
            local = min(loads.tokens_SE[d, e], replicas.quota_ED[e, d])
            sent -= local
            served += replicas.quota_ED[e, d] - local
    matched = min(sent, served)
    return sent - matched, served - matched


@loop
def _node_that_sends(e: int, n: int, replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers) -> tuple[int, float]:
    """The other node with the most assignments of an expert that leave it, and how many; -1: there is none."""
    most, node = 0.0, NOBODY
    for m in range(len(topology.uplink_N)):
        sent = _far_of_node(e, m, replicas, loads, topology)[0]
        if m != n and sent > most:
            most, node = sent, m
    return node, most


@loop
def _best_in_node(e: int, n: int, replicas: Replicas, topology: TopologyNumbers, room: Room) -> int:
    for kind in (HAS, FREE, CROWDED):
        d = _least_busy(e, n, kind, replicas, topology, room)
        if d >= 0:
            return d
    return NOBODY


@loop
def relieve_port(
    place: int,
    count: int,
    owner: np.ndarray,
    replicas: Replicas,
    loads: LayerLoads,
    topology: TopologyNumbers,
    room: Room,
    changes: np.ndarray,
) -> int:
    """Changes that keep tokens away from the busiest port of the dispatch."""
    ranks, experts = len(room.busy_D), len(owner)
    worst = where_largest(room.terms)
    if room.terms[worst] <= 0:
        return count
    if worst >= 2 * ranks:
        n = worst - 2 * ranks
        out_rows = into_rows = 0.0
        for i in range(topology.first_N[n], topology.first_N[n + 1]):
            out_rows += room.ports[FAR_OUT, topology.member_D[i]]
            into_rows += room.ports[FAR_IN, topology.member_D[i]]
        leaving = out_rows >= into_rows
        for e in range(experts):
            sent, served = _far_of_node(e, n, replicas, loads, topology)
            room.value_E[e] = sent if leaving else served
        e = _ranked(room.value_E, place)
        if e >= 0:
            if leaving:
                target = _best_in_node(e, n, replicas, topology, room)
                count = _note(e, OTHER_NODES, target, room.value_E[e], count, owner, replicas, room, changes)
            else:
                other, most = _node_that_sends(e, n, replicas, loads, topology)
                if other >= 0:
                    target = _best_in_node(e, other, replicas, topology, room)
                    count = _note(e, OTHER_NODES, target, most, count, owner, replicas, room, changes)
        return count
    d, far = worst % ranks, worst >= ranks
    out = room.ports[FAR_OUT if far else NEAR_OUT, d] >= room.ports[FAR_IN if far else NEAR_IN, d]
    for e in range(experts):
        if out:
            room.value_E[e] = _missing(e, d, replicas, loads)
        else:
            room.value_E[e] = replicas.quota_ED[e, d] - loads.tokens_SE[d, e] if replicas.has_ED[e, d] else 0.0
    e = _ranked(room.value_E, place)
    if e < 0:
        return count
    if out:
        count = _note(e, OTHERS, d, room.value_E[e], count, owner, replicas, room, changes)
    else:
        most, wants = 0.0, NOBODY
        for s in range(ranks):
            missing = _missing(e, s, replicas, loads)
            if s != d and missing > most:
                most, wants = missing, s
        if wants >= 0:
            count = _note(e, d, wants, min(most, room.value_E[e]), count, owner, replicas, room, changes)
        if far:
            node, most = _node_that_sends(e, topology.node_D[d], replicas, loads, topology)
            if node >= 0:
                target = _best_in_node(e, node, replicas, topology, room)
                count = _note(e, d, target, min(most, room.value_E[e]), count, owner, replicas, room, changes)
        saved = room.busy_D[d]
        room.busy_D[d] = np.inf
        idle = _least_busy(e, -1, HAS, replicas, topology, room)
        room.busy_D[d] = saved
        if idle >= 0 and idle != d:
            count = _note(e, d, idle, room.value_E[e] / 2, count, owner, replicas, room, changes)
    return count


@loop
def give_up(place: int, count: int, owner: np.ndarray, replicas: Replicas, room: Room, changes: np.ndarray) -> int:
    """A change that gives up the replica that serves least of all (place 0), the next (1), ..."""
    for e in range(len(owner)):
        room.value_E[e] = 0.0
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            if d != owner[e]:
                room.value_E[e] = max(room.value_E[e], 1.0 / max(replicas.quota_ED[e, d], _SMALL))
    e = _ranked(room.value_E, place)
    if e < 0:
        return count
    rank = NOBODY
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        if d != owner[e] and (rank < 0 or replicas.quota_ED[e, d] < replicas.quota_ED[e, rank]):
            rank = d
    successor = least_busy_other(e, rank, owner, room.busy_D, replicas)
    return _note(e, rank, successor, max(replicas.quota_ED[e, rank], 2 * LEAST), count, owner, replicas, room, changes)
