"""Improves a plan of one layer by small changes, for `auto`: each takes load off what the layer waits for, and is kept if the layer gets faster.

A layer waits for its busiest device, for the busiest port of its dispatch, and for its gather and reduction. A *change* brings assignments
of one expert from one rank to another, which gets a replica of it if it has none; where it has no slot, that replica takes the place of the
one that is worth least there. What an expert adds to each rank's work and traffic is summed over experts (`Sums`), so that trying a change
costs a pass over the ranks, and not over all experts.

Shapes: E experts, D ranks, N nodes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hecate.parallel.array_loops import largest, total, where_largest
from hecate.parallel.cost_loops import ROUNDING, LayerLoads, compute_seconds, dispatch_latency, optimizer_seconds, replica_seconds, rows_received
from hecate.parallel.cost_numbers import FAR_IN, FAR_OUT, NEAR_IN, NEAR_OUT, CostNumbers, TopologyNumbers, port_seconds
from hecate.parallel.jit import loop
from hecate.parallel.replica_lists import Replicas, add, foreign, remove

WORTH = 1 - 1e-4
"""of the seconds before: a change that gains less is not kept"""
_LEAST = 1e-6
"""assignments not worth moving"""
_SMALL = 1e-3
"""assignments of a replica; of those that serve less, none serves less than the others"""
_TRY_SECONDS, _TRY_SECONDS_RANK = 2e-6, 0.12e-6
_LOOKED_AT = 4
"""experts of a busy rank or port whose assignments are tried elsewhere, the largest first"""
_VERIFIED = 3
"""changes whose replicas are priced, the most promising first"""
_EXPOSED = 0.02
"""share of a layer's seconds from which on bringing replicas costs so much that giving one up is tried"""
NOBODY = -1
OTHERS, OTHER_NODES = -1, -2
"""instead of the rank that gives assignments (see `_move`)"""
HAS, FREE, FULL = range(3)
"""kinds of ranks for an expert (see `_least_busy`)"""


class Sums(NamedTuple):
    """What all experts together make of the ranks' work and traffic, in assignments; float64 [ranks] each."""

    local_D: np.ndarray
    """served of the rank's own tokens"""
    served_D: np.ndarray
    near_in_D: np.ndarray
    """received from its node"""
    far_in_D: np.ndarray
    """received from other nodes"""
    far_out_D: np.ndarray
    """sent to other nodes"""


class Room(NamedTuple):
    """Arrays to work in."""

    ports: np.ndarray
    """[4, ranks]: rows through each port in one all-to-all"""
    terms: np.ndarray
    """[2 * ranks + nodes]: what each port inside its node, each port to other nodes and each uplink needs for these rows"""
    busy_D: np.ndarray
    """seconds of expert compute"""
    busy_before_D: np.ndarray
    """the same before the change that is being tried"""
    rows_D: np.ndarray
    share_N: np.ndarray
    """of what leaves a rank of a node, the part that leaves the node"""
    sent_N: np.ndarray
    served_N: np.ndarray
    kept_rank_XD: np.ndarray
    """[2, ranks]: replicas of the two experts of a change, as they were"""
    kept_quota_XD: np.ndarray
    kept_X: np.ndarray
    """int64 [2]: how many there were"""
    free_D: np.ndarray
    """int64: slots left"""
    value_E: np.ndarray


@loop
def _count(e: int, sign: float, replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, sums: Sums, room: Room) -> None:
    """Add what an expert contributes to the sums, or with sign -1 take it away."""
    nodes, rounding = len(topology.uplink_N), ROUNDING * loads.load_E[e]
    for n in range(nodes):
        room.sent_N[n] = loads.tokens_NE[n, e]
        room.served_N[n] = 0.0
        room.share_N[n] = 0.0
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        quota = replicas.quota_ED[e, d]
        local = min(loads.tokens_SE[d, e], quota)
        sums.local_D[d] += sign * local
        sums.served_D[d] += sign * quota
        room.sent_N[topology.node_D[d]] -= local
        room.served_N[topology.node_D[d]] += quota - local
    for n in range(nodes):
        matched = min(max(room.sent_N[n], 0.0), room.served_N[n])
        if nodes > 1 and room.sent_N[n] - matched > rounding:
            room.share_N[n] = 1.0 - matched / room.sent_N[n]
        room.served_N[n] = matched / room.served_N[n] if room.served_N[n] > 0 and nodes > 1 else 1.0
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        n, here = topology.node_D[d], replicas.quota_ED[e, d] - loads.tokens_SE[d, e]
        if here > rounding:
            near = here * room.served_N[n]
            sums.near_in_D[d] += sign * near
            sums.far_in_D[d] += sign * (here - near)
        sums.far_out_D[d] -= sign * min(loads.tokens_SE[d, e], replicas.quota_ED[e, d]) * room.share_N[n]
    for n in range(nodes):
        if room.share_N[n] > 0:
            for i in range(topology.first_N[n], topology.first_N[n + 1]):
                d = topology.member_D[i]
                sums.far_out_D[d] += sign * loads.tokens_SE[d, e] * room.share_N[n]


@loop
def _seconds(sums: Sums, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers, room: Room) -> tuple[float, float]:
    """Seconds of expert compute and dispatch, and their smooth surrogate; fills `room.busy_D` and `room.ports` (rows).

    The surrogate replaces each maximum by a norm, so that a change that helps one of several equally busy ranks counts for something.
    """
    ranks = len(loads.load_D)
    busy_D = compute_seconds(sums.local_D, sums.served_D, loads.load_D, topology, cost, room.rows_D)
    ports = room.ports
    for d in range(ranks):
        room.busy_D[d] = busy_D[d]
        ports[NEAR_IN, d] = max(sums.near_in_D[d], 0.0)
        ports[FAR_IN, d] = max(sums.far_in_D[d], 0.0)
    latency = dispatch_latency(total(ports[NEAR_IN]), total(ports[FAR_IN]), True, topology, cost)
    share = rows_received(ports, loads.load_D, cost.top_k)
    out_N, into_N = room.sent_N, room.served_N
    for n in range(len(out_N)):
        out_N[n] = 0.0
        into_N[n] = 0.0
    for d in range(ranks):
        far = max(sums.far_out_D[d], 0.0)
        ports[NEAR_OUT, d] = max(loads.load_D[d] - sums.local_D[d] - far, 0.0) * share
        ports[FAR_OUT, d] = far * share
        out_N[topology.node_D[d]] += ports[FAR_OUT, d]
        into_N[topology.node_D[d]] += ports[FAR_IN, d]
    terms = room.terms
    for d in range(ranks):
        terms[d] = max(ports[NEAR_OUT, d], ports[NEAR_IN, d]) / topology.port_D[d]
        terms[ranks + d] = max(ports[FAR_OUT, d], ports[FAR_IN, d]) / topology.nic_D[d]
    for n in range(len(out_N)):
        terms[2 * ranks + n] = max(out_N[n], into_N[n]) / topology.uplink_N[n]
    busiest, worst = largest(busy_D), largest(terms)
    each = 4.0 * cost.row_bytes
    return busiest + worst * each + latency, _norm(busy_D, busiest) + _norm(terms, worst) * each + latency


@loop
def _norm(values: np.ndarray, most: float) -> float:
    """The 32nd root of the sum of 32nd powers; `most` is the largest value."""
    if most <= 0:
        return 0.0
    result = 0.0
    for i in range(len(values)):
        power = values[i] / most
        if power > 0.5:  # less adds nothing that counts
            for _ in range(5):
                power *= power
            result += power
    for _ in range(5):
        result = math.sqrt(result)
    return most * result


@loop
def _keep(e: int, x: int, replicas: Replicas, room: Room) -> int:
    """Write down an expert's replicas; returns how many there are."""
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        room.kept_rank_XD[x, c] = d
        room.kept_quota_XD[x, c] = replicas.quota_ED[e, d]
    return replicas.count_E[e]


@loop
def _put_back(e: int, x: int, count: int, replicas: Replicas, room: Room) -> None:
    for c in range(replicas.count_E[e]):
        replicas.has_ED[e, replicas.rank_EC[e, c]] = False
    replicas.count_E[e] = 0
    for c in range(count):
        d = room.kept_rank_XD[x, c]
        add(replicas, e, d)
        replicas.quota_ED[e, d] = room.kept_quota_XD[x, c]


@loop
def _move(e: int, source: int, target: int, amount: float, replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers) -> None:
    """Bring assignments of an expert to a rank that has a replica of it.

    Args:
        source: the rank that gives them; `OTHERS`: all other replicas, by what each serves of other ranks' tokens, those of the target's
            node before others; `OTHER_NODES`: those of other nodes.
    """
    if source >= 0:
        moved = min(amount, replicas.quota_ED[e, source])
        replicas.quota_ED[e, source] -= moved
        replicas.quota_ED[e, target] += moved
        return
    node = topology.node_D[target]
    for near in range(2 if source == OTHERS else 1):
        # First pass: replicas of the target's node, unless only other nodes' count; second pass: of other nodes.
        same = near == 0 and source == OTHERS
        foreign_sum = 0.0
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            if d != target and (topology.node_D[d] == node) == same:
                foreign_sum += max(replicas.quota_ED[e, d] - loads.tokens_SE[d, e], 0.0)
        if foreign_sum <= _LEAST:
            continue
        moved = min(amount, foreign_sum)
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            if d != target and (topology.node_D[d] == node) == same:
                replicas.quota_ED[e, d] -= moved * max(replicas.quota_ED[e, d] - loads.tokens_SE[d, e], 0.0) / foreign_sum
        replicas.quota_ED[e, target] += moved
        amount -= moved
        if amount <= _LEAST:
            return


@loop
def _change(
    changes: np.ndarray,
    x: int,
    owner: np.ndarray,
    replicas: Replicas,
    loads: LayerLoads,
    topology: TopologyNumbers,
    room: Room,
) -> bool:
    """Carry out a change; returns whether a replica came or went."""
    e, source, target, victim = int(changes[x, 0]), int(changes[x, 1]), int(changes[x, 2]), int(changes[x, 3])
    placed = False
    if victim >= 0:
        heir = owner[victim]
        for c in range(replicas.count_E[victim]):
            d = replicas.rank_EC[victim, c]
            if d != target and room.busy_before_D[d] < room.busy_before_D[heir]:
                heir = d
        replicas.quota_ED[victim, heir] += replicas.quota_ED[victim, target]
        remove(replicas, victim, target)
        placed = True
    if not replicas.has_ED[e, target]:
        add(replicas, e, target)
        placed = True
    _move(e, source, target, changes[x, 4], replicas, loads, topology)
    c = 0
    while c < replicas.count_E[e]:
        d = replicas.rank_EC[e, c]
        if replicas.quota_ED[e, d] <= _LEAST and d != owner[e] and d != target:
            replicas.quota_ED[e, target] += replicas.quota_ED[e, d]
            remove(replicas, e, d)
            placed = True
        else:
            c += 1
    return placed


@loop
def _victim(target: int, spared: int, owner: np.ndarray, replicas: Replicas) -> int:
    """The expert whose replica on a rank serves least; -1: none but owned ones."""
    best = NOBODY
    for e in range(len(owner)):
        if replicas.has_ED[e, target] and owner[e] != target and e != spared:
            if best < 0 or replicas.quota_ED[e, target] < replicas.quota_ED[best, target]:
                best = e
    return best


@loop
def _note(
    e: int, source: int, target: int, amount: float, count: int, owner: np.ndarray, replicas: Replicas, room: Room, changes: np.ndarray
) -> int:
    """Add a change to the list, unless nothing is to be had; returns how many there are."""
    if target < 0 or amount <= _LEAST or count == len(changes):
        return count
    victim = NOBODY
    if not replicas.has_ED[e, target] and room.free_D[target] <= 0:
        victim = _victim(target, e, owner, replicas)
        if victim < 0:
            return count
    changes[count, 0], changes[count, 1], changes[count, 2] = e, source, target
    changes[count, 3], changes[count, 4] = victim, amount
    return count + 1


@loop
def _least_busy(e: int, node: int, kind: int, replicas: Replicas, topology: TopologyNumbers, room: Room) -> int:
    """The least busy rank of a node (-1: of all) that has an expert (`HAS`), has a slot for it (`FREE`) or would have to make room (`FULL`)."""
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
            fits = kind == FULL
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
            if values[i] > _LEAST and (best < 0 or values[i] > values[best]):
                best = i
        if best < 0:
            return NOBODY
        found = best
        values[best] = -values[best]
    values[found] = -values[found]
    return found


@loop
def _relieve_device(place: int, owner: np.ndarray, sums: Sums, replicas: Replicas, topology: TopologyNumbers, room: Room, changes: np.ndarray) -> int:
    """Changes that bring assignments of the busiest device's largest experts to devices with time left."""
    busy_D, ranks, work, rates = room.busy_D, len(room.busy_D), 0.0, 0.0
    a, count = where_largest(busy_D), 0
    if sums.served_D[a] <= _LEAST:
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
            _least_busy(e, -1, FULL, replicas, topology, room) if far < 0 else NOBODY,
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
    for kind in (HAS, FREE, FULL):
        d = _least_busy(e, n, kind, replicas, topology, room)
        if d >= 0:
            return d
    return NOBODY


@loop
def _relieve_port(
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
def _drop(place: int, count: int, owner: np.ndarray, replicas: Replicas, room: Room, changes: np.ndarray) -> int:
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
    rank, heir = NOBODY, owner[e]
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        if d != owner[e] and (rank < 0 or replicas.quota_ED[e, d] < replicas.quota_ED[e, rank]):
            rank = d
    for c in range(replicas.count_E[e]):
        d = replicas.rank_EC[e, c]
        if d != rank and room.busy_D[d] < room.busy_D[heir]:
            heir = d
    return _note(e, rank, heir, max(replicas.quota_ED[e, rank], 2 * _LEAST), count, owner, replicas, room, changes)


@loop
def _possible(changes: np.ndarray, x: int, replicas: Replicas, room: Room) -> bool:
    """Whether a change can still be carried out after others were."""
    e, source, target, victim = int(changes[x, 0]), int(changes[x, 1]), int(changes[x, 2]), int(changes[x, 3])
    if victim >= 0 and not replicas.has_ED[victim, target]:
        return False
    if source >= 0 and not replicas.has_ED[e, source]:
        return False
    return victim >= 0 or replicas.has_ED[e, target] or room.free_D[target] > 0


@loop
def _try(
    changes: np.ndarray, x: int, owner: np.ndarray, replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, sums: Sums, room: Room
) -> bool:
    """Carry out a change, in the sums too; returns whether replicas came or went. `_undo` takes it back."""
    e, victim = int(changes[x, 0]), int(changes[x, 3])
    room.kept_X[0] = _keep(e, 0, replicas, room)
    _count(e, -1.0, replicas, loads, topology, sums, room)
    if victim >= 0:
        room.kept_X[1] = _keep(victim, 1, replicas, room)
        _count(victim, -1.0, replicas, loads, topology, sums, room)
    placed = _change(changes, x, owner, replicas, loads, topology, room)
    _count(e, 1.0, replicas, loads, topology, sums, room)
    if victim >= 0:
        _count(victim, 1.0, replicas, loads, topology, sums, room)
    return placed


@loop
def _undo(changes: np.ndarray, x: int, replicas: Replicas, sums: Sums, before: Sums, room: Room) -> None:
    e, victim = int(changes[x, 0]), int(changes[x, 3])
    _put_back(e, 0, room.kept_X[0], replicas, room)
    if victim >= 0:
        _put_back(victim, 1, room.kept_X[1], replicas, room)
    _copy_sums(before, sums)


@loop
def _copy_sums(source: Sums, target: Sums) -> None:
    for d in range(len(source.local_D)):
        target.local_D[d] = source.local_D[d]
        target.served_D[d] = source.served_D[d]
        target.near_in_D[d] = source.near_in_D[d]
        target.far_in_D[d] = source.far_in_D[d]
        target.far_out_D[d] = source.far_out_D[d]


@loop
def improve(
    owner: np.ndarray,
    slots: np.ndarray,
    resident: np.ndarray,
    loads: LayerLoads,
    topology: TopologyNumbers,
    cost: CostNumbers,
    replicas: Replicas,
    allowance: float,
) -> float:
    """Make a plan of one layer faster by up to `most_changes` changes; changes `replicas`.

    Each time the change is kept that gains most before what it costs to bring replicas, if it still gains afterwards; else the next.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
        resident: bool [experts, ranks], or [0, 0] where nothing is.
    """
    ranks, experts, nodes = len(topology.node_D), len(owner), len(topology.uplink_N)
    sums = Sums(np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks))
    room = Room(
        np.zeros((4, ranks)), np.zeros(2 * ranks + nodes), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(nodes),
        np.zeros(nodes), np.zeros(nodes), np.zeros((2, ranks), np.int64), np.zeros((2, ranks)), np.zeros(2, np.int64),
        np.zeros(ranks, np.int64), np.zeros(experts),
    )  # fmt: skip
    for e in range(experts):
        _count(e, 1.0, replicas, loads, topology, sums, room)
    optimizer = optimizer_seconds(owner, topology, cost)
    fixed = replica_seconds(owner, replicas, resident, topology, cost)
    before = Sums(np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks))
    changes, value_X = np.zeros((16, 5)), np.empty(16)
    place, spent, each = 0, 0.0, _TRY_SECONDS + _TRY_SECONDS_RANK * ranks
    while True:
        held = foreign(replicas, owner)
        for d in range(ranks):
            room.free_D[d] = slots[d] - held[d]
        smooth = _seconds(sums, loads, topology, cost, room)[1] + fixed
        first = smooth
        count = _relieve_device(place, owner, sums, replicas, topology, room, changes)
        count = _relieve_port(place, count, owner, replicas, loads, topology, room, changes)
        costly = fixed - optimizer > _EXPOSED * smooth
        if costly:
            count = _drop(place, count, owner, replicas, room, changes)
        for d in range(ranks):
            room.busy_before_D[d] = room.busy_D[d]
        _copy_sums(sums, before)
        for x in range(count):
            _try(changes, x, owner, replicas, loads, topology, sums, room)
            value_X[x] = _seconds(sums, loads, topology, cost, room)[1]
            _undo(changes, x, replicas, sums, before, room)
        kept, tries = 0, count if costly else min(count, _VERIFIED)
        while tries > 0:
            best = 0
            for x in range(1, count):
                if value_X[x] < value_X[best]:
                    best = x
            if value_X[best] + optimizer >= first * WORTH:
                break
            tries -= 1
            now, value_X[best] = value_X[best], np.inf
            if not _possible(changes, best, replicas, room):
                continue
            placed = _try(changes, best, owner, replicas, loads, topology, sums, room)
            if kept > 0:
                now = _seconds(sums, loads, topology, cost, room)[1]
            then = fixed
            if placed and now + optimizer < smooth * WORTH:
                then = replica_seconds(owner, replicas, resident, topology, cost)
            if now + then >= smooth * WORTH:
                _undo(changes, best, replicas, sums, before, room)
                continue
            fixed, smooth, kept = then, now + then, kept + 1
            _copy_sums(sums, before)
            if placed:
                held = foreign(replicas, owner)
                for d in range(ranks):
                    room.free_D[d] = slots[d] - held[d]
        place = 0 if kept > 0 else place + 1
        spent += (count + kept + 1) * each
        if place == _LOOKED_AT or spent > allowance:
            return spent
