"""Improves a plan of one layer by small changes, for `auto`: each takes load off what the layer waits for, and is kept if that is faster.

A layer waits for its busiest device, for the busiest port of its dispatch, and for its gather and reduction. A *change* brings assignments
of one expert from one rank to another, which gets a replica of it if it has none; where it has no slot, that replica takes the place of the
one that serves least on that rank (`hecate.parallel.planners.plan_changes` proposes changes). What an expert adds to each rank's work and
traffic is summed over experts (`Sums`), so that trying a change costs a pass over the ranks, and not over all experts.

Shapes: E experts, D ranks, N nodes.
"""

from __future__ import annotations

import math

import numpy as np

from hecate.parallel.cost.cost_loops import (
    ROUNDING,
    LayerLoads,
    compute_seconds,
    dispatch_latency,
    optimizer_seconds,
    replica_seconds,
    rows_received,
)
from hecate.parallel.cost.cost_numbers import FAR_IN, FAR_OUT, NEAR_IN, NEAR_OUT, CostNumbers, TopologyNumbers
from hecate.parallel.loops.array_loops import largest, total
from hecate.parallel.loops.jit import loop
from hecate.parallel.loops.replica_lists import Replicas, add, foreign, remove
from hecate.parallel.planners.plan_changes import (
    AMOUNT,
    CLOSED,
    DROPPED,
    EXCHANGES,
    EXPERT,
    LEAST,
    OTHERS,
    SOURCE,
    TARGET,
    Room,
    Sums,
    exchange,
    give_up,
    least_busy_other,
    relieve_device,
    relieve_port,
)

_LARGEST_SHARE = 1 - 1e-4
"""the largest share of the seconds before that a change may leave, or it gains too little to be kept"""
_TRY_SECONDS, _TRY_SECONDS_A_RANK = 2e-6, 0.12e-6
"""about how long trying a change takes"""
_PLACES = 4
"""experts of a busy rank or port whose assignments are tried elsewhere, the largest first"""
_VERIFIED = 3
"""changes whose replicas are priced, the most promising first, where bringing replicas costs little"""
_EXPOSED = 0.02
"""the share of a layer's seconds from which on bringing replicas costs so much that all changes are priced and giving one up is tried"""
_MOST_CHANGES = 16


@loop
def no_sums(ranks: int) -> Sums:
    return Sums(np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks))


@loop
def no_room(ranks: int, experts: int, nodes: int) -> Room:
    return Room(
        np.zeros((4, ranks)), np.zeros(2 * ranks + nodes), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(nodes),
        np.zeros(nodes), np.zeros(nodes), np.zeros((2, ranks), np.int64), np.zeros((2, ranks)), np.zeros(2, np.int64),
        np.zeros(ranks, np.int64), np.zeros(experts),
    )  # fmt: skip


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
        n, foreign_sum = topology.node_D[d], replicas.quota_ED[e, d] - loads.tokens_SE[d, e]
        if foreign_sum > rounding:
            near = foreign_sum * room.served_N[n]
            sums.near_in_D[d] += sign * near
            sums.far_in_D[d] += sign * (foreign_sum - near)
        sums.far_out_D[d] -= sign * min(loads.tokens_SE[d, e], replicas.quota_ED[e, d]) * room.share_N[n]
    for n in range(nodes):
        if room.share_N[n] > 0:
            for i in range(topology.first_N[n], topology.first_N[n + 1]):
                d = topology.member_D[i]
                sums.far_out_D[d] += sign * loads.tokens_SE[d, e] * room.share_N[n]


@loop
def _surrogate_seconds(sums: Sums, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers, room: Room) -> float:
    """Seconds of expert compute and dispatch, with a norm in place of each maximum; fills `room.busy_D` and `room.ports` (rows).

    With maxima a change that helps one of several equally busy ranks would count for nothing.
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
    return _norm(busy_D, largest(busy_D)) + 4.0 * cost.row_bytes * _norm(terms, largest(terms)) + latency


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
        if foreign_sum <= LEAST:
            continue
        moved = min(amount, foreign_sum)
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            if d != target and (topology.node_D[d] == node) == same:
                replicas.quota_ED[e, d] -= moved * max(replicas.quota_ED[e, d] - loads.tokens_SE[d, e], 0.0) / foreign_sum
        replicas.quota_ED[e, target] += moved
        amount -= moved
        if amount <= LEAST:
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
    e, source, target, dropped = int(changes[x, EXPERT]), int(changes[x, SOURCE]), int(changes[x, TARGET]), int(changes[x, DROPPED])
    placed = False
    if changes[x, EXCHANGES] > 0:
        given, taken = replicas.quota_ED[e, source], replicas.quota_ED[dropped, target]
        remove(replicas, e, source)
        remove(replicas, dropped, target)
        add(replicas, e, target)
        add(replicas, dropped, source)
        replicas.quota_ED[e, target] = given
        replicas.quota_ED[dropped, source] = taken
        return True
    if dropped >= 0:
        successor = least_busy_other(dropped, target, owner, room.busy_before_D, replicas)
        replicas.quota_ED[dropped, successor] += replicas.quota_ED[dropped, target]
        remove(replicas, dropped, target)
        placed = True
    if not replicas.has_ED[e, target]:
        add(replicas, e, target)
        placed = True
    _move(e, source, target, changes[x, AMOUNT], replicas, loads, topology)
    c = 0
    while c < replicas.count_E[e]:
        d = replicas.rank_EC[e, c]
        if replicas.quota_ED[e, d] <= LEAST and d != owner[e] and d != target:
            replicas.quota_ED[e, target] += replicas.quota_ED[e, d]
            remove(replicas, e, d)
            placed = True
        else:
            c += 1
    return placed


@loop
def _possible(changes: np.ndarray, x: int, replicas: Replicas, room: Room) -> bool:
    """Whether a change can still be carried out after others were."""
    e, source, target, dropped = int(changes[x, EXPERT]), int(changes[x, SOURCE]), int(changes[x, TARGET]), int(changes[x, DROPPED])
    if dropped >= 0 and not replicas.has_ED[dropped, target]:
        return False
    if source >= 0 and not replicas.has_ED[e, source]:
        return False
    if changes[x, EXCHANGES] > 0 and (replicas.has_ED[e, target] or replicas.has_ED[dropped, source]):
        return False
    return dropped >= 0 or replicas.has_ED[e, target] or room.free_D[target] > 0


@loop
def _try(
    changes: np.ndarray, x: int, owner: np.ndarray, replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, sums: Sums, room: Room
) -> bool:
    """Carry out a change, in the sums too; returns whether replicas came or went. `_undo` takes it back."""
    e, dropped = int(changes[x, EXPERT]), int(changes[x, DROPPED])
    room.kept_X[0] = _keep(e, 0, replicas, room)
    _count(e, -1.0, replicas, loads, topology, sums, room)
    if dropped >= 0:
        room.kept_X[1] = _keep(dropped, 1, replicas, room)
        _count(dropped, -1.0, replicas, loads, topology, sums, room)
    placed = _change(changes, x, owner, replicas, loads, topology, room)
    _count(e, 1.0, replicas, loads, topology, sums, room)
    if dropped >= 0:
        _count(dropped, 1.0, replicas, loads, topology, sums, room)
    return placed


@loop
def _undo(changes: np.ndarray, x: int, replicas: Replicas, sums: Sums, before: Sums, room: Room) -> None:
    e, dropped = int(changes[x, EXPERT]), int(changes[x, DROPPED])
    _put_back(e, 0, room.kept_X[0], replicas, room)
    if dropped >= 0:
        _put_back(dropped, 1, room.kept_X[1], replicas, room)
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
def _set_free(slots: np.ndarray, owner: np.ndarray, only_split: bool, replicas: Replicas, room: Room) -> None:
    held = foreign(replicas, owner)
    for d in range(len(slots)):
        room.free_D[d] = CLOSED if only_split else slots[d] - held[d]


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
    only_split: bool,
) -> float:
    """Make a plan of one layer faster by small changes; changes `replicas`. Returns the seconds that this took, by an estimate.

    In each round changes are tried one by one, and those kept that gain, the one first that gains most before what it costs to bring
    replicas. A round in which nothing gains is followed by one that looks at the next largest experts. The estimate, and no clock, ends
    the search, so that all ranks come to the same plan.

    Args:
        slots: int64 [ranks]: replicas of other ranks' experts that fit.
        resident: bool [experts, ranks], or [0, 0] where nothing is.
        allowance: seconds after which no further round begins.
        only_split: the replicas stay as they are, whether they serve anything or not: none comes, and none is paid for.
    """
    ranks, experts, nodes = len(topology.node_D), len(owner), len(topology.uplink_N)
    sums, before = no_sums(ranks), no_sums(ranks)
    room = no_room(ranks, experts, nodes)
    for e in range(experts):
        _count(e, 1.0, replicas, loads, topology, sums, room)
    optimizer, fixed = 0.0, 0.0
    if not only_split:
        optimizer = optimizer_seconds(owner, topology, cost)
        fixed = replica_seconds(owner, replicas, resident, topology, cost)
    changes, value_X = np.zeros((_MOST_CHANGES, 6)), np.empty(_MOST_CHANGES)
    place, spent, each = 0, 0.0, _TRY_SECONDS + _TRY_SECONDS_A_RANK * ranks
    while place < _PLACES and spent <= allowance:
        _set_free(slots, owner, only_split, replicas, room)
        seconds = _surrogate_seconds(sums, loads, topology, cost, room) + fixed
        costly = fixed - optimizer > _EXPOSED * seconds
        count = relieve_device(place, owner, sums, replicas, topology, room, changes)
        count = relieve_port(place, count, owner, replicas, loads, topology, room, changes)
        count = exchange(place, count, owner, sums, replicas, topology, room, changes)
        if costly:
            count = give_up(place, count, owner, replicas, room, changes)
        for d in range(ranks):
            room.busy_before_D[d] = room.busy_D[d]
        _copy_sums(sums, before)
        seconds_to_beat = (seconds - optimizer) * _LARGEST_SHARE
        for x in range(count):
            _try(changes, x, owner, replicas, loads, topology, sums, room)
            value_X[x] = _surrogate_seconds(sums, loads, topology, cost, room)
            _undo(changes, x, replicas, sums, before, room)
        kept = 0
        for _ in range(count if costly else min(count, _VERIFIED)):
            best = 0
            for x in range(1, count):
                if value_X[x] < value_X[best]:
                    best = x
            if value_X[best] >= seconds_to_beat:
                break
            value_X[best] = np.inf
            if not _possible(changes, best, replicas, room):
                continue
            placed = _try(changes, best, owner, replicas, loads, topology, sums, room)
            now, then = _surrogate_seconds(sums, loads, topology, cost, room), fixed
            if placed and not only_split and now + optimizer < seconds * _LARGEST_SHARE:
                then = replica_seconds(owner, replicas, resident, topology, cost)
            if now + then >= seconds * _LARGEST_SHARE:
                _undo(changes, best, replicas, sums, before, room)
                continue
            fixed, seconds, kept = then, now + then, kept + 1
            _copy_sums(sums, before)
            _set_free(slots, owner, only_split, replicas, room)
        place = 0 if kept > 0 else place + 1
        spent += (count + kept + 1) * each
    return spent
