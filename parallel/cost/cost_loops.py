"""The cost model of one MoE layer, as loops over experts and ranks that are compiled (`hecate.parallel.loops.jit`).

Where several links or devices work side by side the slowest decides: maxima, never sums. `auto` calls these loops a dozen times a layer;
everything else prices plans through `hecate.parallel.cost.cost_model`, which calls the same ones. A plan is `Replicas`; topology, cost and
loads are tuples, too (see `topology_numbers`, `cost_numbers`, `layer_loads`). tests/parallel/plain_cost_model.py says the same in plain
numpy.

Shapes: E experts, D = S ranks as destinations and as sources, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.cost.cost_numbers import (
    FAR_IN,
    FAR_OUT,
    NEAR_IN,
    NEAR_OUT,
    CostNumbers,
    TopologyNumbers,
    port_seconds,
    transfer_latency,
)
from hecate.parallel.cost.route_loops import (
    COPY_ROWS,
    FLAT,
    all_exchanges,
    choose_route,
    clear,
    count_copies,
    count_frozen,
    route_seconds,
)
from hecate.parallel.loops.array_loops import largest, total
from hecate.parallel.loops.jit import entry, loop
from hecate.parallel.loops.replica_lists import Replicas, fill_lists

DISPATCH_COLLECTIVES = 8
"""all-to-alls of a layer's tokens: counts, slots, rows, weights, results; backward results, rows, weights"""
LEAST_TRAFFIC = 1e-6
"""rows or experts; less is rounding, and pays no latency"""
ROUNDING = 1e-9
"""share of an expert's load; less is no traffic"""
TRAFFIC_ROWS = 7
LOCAL, SERVED, OWN = 4, 5, 6
"""rows of an array [7, ranks] of assignments, after those of the four ports: served of a rank's own tokens, served, and the rank's own"""


class LayerLoads(NamedTuple):
    """The assignments of one layer, float64, and their sums."""

    tokens_SE: np.ndarray
    tokens_NE: np.ndarray
    load_E: np.ndarray
    load_D: np.ndarray


@loop
def layer_loads(tokens_SE: np.ndarray, topology: TopologyNumbers) -> LayerLoads:
    ranks, experts = tokens_SE.shape
    tokens_NE, load_E, load_D = np.zeros((len(topology.uplink_N), experts)), np.zeros(experts), np.zeros(ranks)
    fours = ranks - ranks % 4
    for d in range(0, fours, 4):  # four sums run side by side
        own, second, third, fourth = tokens_SE[d], tokens_SE[d + 1], tokens_SE[d + 2], tokens_SE[d + 3]
        a, b, c, f = 0.0, 0.0, 0.0, 0.0
        for e in range(experts):
            a += own[e]
            b += second[e]
            c += third[e]
            f += fourth[e]
        load_D[d], load_D[d + 1], load_D[d + 2], load_D[d + 3] = a, b, c, f
    for d in range(fours, ranks):
        load_D[d] = total(tokens_SE[d])
    for d in range(ranks):
        tokens, of_node = tokens_SE[d], tokens_NE[topology.node_D[d]]
        for e in range(experts):
            of_node[e] += tokens[e]
    for n in range(len(tokens_NE)):
        for e in range(experts):
            load_E[e] += tokens_NE[n, e]
    return LayerLoads(tokens_SE, tokens_NE, load_E, load_D)


@loop
def even_quota_into(replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers) -> None:
    """Topology-aware dispatch (Hecate §3.3): an assignment stays on its rank where the expert is; else it
    goes evenly over the replicas of the rank's node; else evenly over all."""
    nodes = len(topology.uplink_N)
    rest, copies = np.empty(nodes), np.empty(nodes)
    for e in range(len(loads.load_E)):
        count = replicas.count_E[e]
        for n in range(nodes):
            rest[n] = loads.tokens_NE[n, e]
            copies[n] = 0.0
        for c in range(count):
            d = replicas.rank_EC[e, c]
            rest[topology.node_D[d]] -= loads.tokens_SE[d, e]
            copies[topology.node_D[d]] += 1.0
        far = 0.0
        for n in range(nodes):
            if copies[n] > 0:
                rest[n] = max(rest[n], 0.0) / copies[n]
            else:
                far += rest[n]
        far /= count
        for c in range(count):
            d = replicas.rank_EC[e, c]
            replicas.quota_ED[e, d] = loads.tokens_SE[d, e] + rest[topology.node_D[d]] + far


@loop
def busy_seconds(replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers) -> np.ndarray:
    """float64 [ranks]: seconds of expert compute, forward and backward."""
    ranks = len(loads.load_D)
    local, served, rows = np.zeros(ranks), np.zeros(ranks), np.empty(ranks)
    for e in range(len(loads.load_E)):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            local[d] += min(loads.tokens_SE[d, e], replicas.quota_ED[e, d])
            served[d] += replicas.quota_ED[e, d]
    return compute_seconds(local, served, loads.load_D, topology, cost, rows)


@loop
def compute_seconds(
    local: np.ndarray, served: np.ndarray, load: np.ndarray, topology: TopologyNumbers, cost: CostNumbers, rows: np.ndarray
) -> np.ndarray:
    """float64 [ranks]: seconds of expert compute, forward and backward; fills `rows` [ranks], distinct tokens computed.

    Args:
        local: assignments that each rank serves of its own tokens.
        served: assignments that each rank serves.
        load: assignments of each rank's own tokens.
    """
    busy, k = np.empty(len(load)), cost.top_k
    all_tokens = total(load) / k
    for d in range(len(load)):
        own = load[d] / k
        rows[d] = distinct(local[d], own, k) + distinct(served[d] - local[d], all_tokens - own, k)
        busy[d] = (rows[d] * cost.row_work + served[d] * cost.assignment_work) / topology.rate_D[d]
    return busy


@loop
def replica_seconds(owner: np.ndarray, replicas: Replicas, resident: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """What bringing the replicas and returning their gradients adds to the step, and the optimizer's time.

    `resident` is bool [experts, ranks], or [0, 0] where nothing is.
    """
    trainable, frozen = np.empty((4, len(topology.node_D))), np.empty((4, len(topology.node_D)))
    added = replica_parts(owner, replicas, resident, topology, cost, trainable, frozen)[2]
    return added + optimizer_seconds(owner, topology, cost)


@loop
def replica_parts(
    owner: np.ndarray,
    replicas: Replicas,
    resident: np.ndarray,
    topology: TopologyNumbers,
    cost: CostNumbers,
    trainable: np.ndarray,
    frozen: np.ndarray,
) -> tuple[float, float, float]:
    """Seconds of the gather, of the reduction, and what both add to the step.

    Fills `trainable` and `frozen` [4, ranks]: the experts through each port, in all exchanges of a gather.
    """
    copies = np.zeros((COPY_ROWS, len(topology.node_D)))
    most = count_copies(owner, replicas, topology, copies)
    route, slices = choose_route(owner, replicas, most, topology, cost, copies, trainable)
    again = route_seconds(route, slices, False, cost.trainable_bytes, topology, copies, trainable)
    reduce = again
    if route == FLAT:
        again -= transfer_latency(trainable, topology) * (1.0 - cost.message_share)
    if route != FLAT or cost.reduced_bytes != cost.trainable_bytes:
        reduce = route_seconds(route, slices, True, cost.reduced_bytes, topology, copies, trainable)
    all_exchanges(route, slices, copies, trainable)
    gather, added = again, exposed_seconds(cost.hides_gather, again, topology.slowdown)
    if cost.frozen_bytes > 0:
        # Frozen parts travel in one step and stay: that step may have to wait for them, though all steps together would hide as many bytes.
        count_frozen(owner, replicas, resident, topology, frozen)
        fetch = port_seconds(frozen, topology) * cost.frozen_bytes + transfer_latency(frozen, topology)
        gather += cost.fetched_share * fetch
        added += cost.fetched_share * (exposed_seconds(cost.hides_gather, again + fetch, topology.slowdown) - added)
    else:
        clear(frozen)
    if cost.second_gathers == 0:
        added += exposed_seconds(cost.hides_reduce, reduce, topology.slowdown)
    elif cost.hides_second_gather:
        added += exposed_seconds(cost.hides_reduce, reduce + again, topology.slowdown)
    else:
        added += exposed_seconds(cost.hides_reduce, reduce, topology.slowdown) + again
    return gather, reduce, added


@loop
def optimizer_seconds(owner: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    owned, seconds = np.zeros(len(topology.node_D)), 0.0
    for e in range(len(owner)):
        owned[owner[e]] += 1.0
    for d in range(len(owned)):
        seconds = max(seconds, owned[d] * cost.optimizer_bytes / topology.memory_rate_D[d])
    return seconds


@loop
def dispatch_seconds(replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers, enough: float) -> float:
    """All all-to-alls of the layer's rows in a step; where they take `enough` seconds or more, `enough` or more."""
    experts, ranks = replicas.has_ED.shape
    nodes, k = len(topology.uplink_N), cost.top_k
    ports, kept = np.zeros((4, ranks)), np.zeros(ranks)
    sent, served = np.empty(nodes), np.empty(nodes)
    far_share = np.zeros((nodes, experts))
    everywhere = True
    for e in range(experts):
        everywhere = everywhere and replicas.count_E[e] == ranks
        for n in range(nodes):
            sent[n] = loads.tokens_NE[n, e]
            served[n] = 0.0
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            local = min(loads.tokens_SE[d, e], replicas.quota_ED[e, d])
            kept[d] += local
            sent[topology.node_D[d]] -= local
            served[topology.node_D[d]] += replicas.quota_ED[e, d] - local
        for n in range(nodes):
            matched = min(max(sent[n], 0.0), served[n])
            if nodes > 1 and sent[n] - matched > ROUNDING * loads.load_E[e]:
                far_share[n, e] = 1.0 - matched / sent[n]
            served[n] = matched / served[n] if served[n] > 0 and nodes > 1 else 1.0
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            foreign = replicas.quota_ED[e, d] - loads.tokens_SE[d, e]
            if foreign > ROUNDING * loads.load_E[e]:
                near = foreign * served[topology.node_D[d]]
                ports[NEAR_IN, d] += near
                ports[FAR_IN, d] += foreign - near
    far_sum = total(ports[FAR_IN])
    latency = dispatch_latency(total(ports[NEAR_IN]), far_sum, not everywhere and total(loads.load_D) > 0, topology, cost)
    share = rows_received(ports, loads.load_D, k)
    into = 4.0 * port_seconds(ports, topology) * cost.row_bytes + latency
    if into >= enough:  # what leaves the ranks takes a pass over all sources
        return into
    far_out = ports[FAR_OUT]
    if far_sum > 0:
        _leave_nodes(replicas, loads, far_share, topology, far_out)
    for d in range(ranks):
        ports[NEAR_OUT, d] = max(loads.load_D[d] - kept[d] - far_out[d], 0.0) * share
        far_out[d] *= share
    return 4.0 * port_seconds(ports, topology) * cost.row_bytes + latency


@loop
def rows_received(ports: np.ndarray, load: np.ndarray, k: int) -> float:
    """Turn what ranks receive from assignments into distinct tokens; returns distinct tokens per assignment, for what they send.

    A token travels once to a rank however many of its experts are there.

    Args:
        ports: float64 [4, ranks]: changed in its two incoming rows.
        load: float64 [ranks]: assignments of each rank's own tokens.
    """
    all_tokens = total(load) / k
    all_rows, all_assignments = 0.0, 0.0
    for d in range(len(load)):
        remote = ports[NEAR_IN, d] + ports[FAR_IN, d]
        if remote > 0:
            rows = distinct(remote, all_tokens - load[d] / k, k)
            all_rows += rows
            all_assignments += remote
            ports[NEAR_IN, d] *= rows / remote
            ports[FAR_IN, d] *= rows / remote
    return all_rows / all_assignments if all_assignments > 0 else 0.0


@loop
def dispatch_latency(near: float, far: float, asked: bool, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """Seconds of all messages of a layer's dispatch, by how much travels near and far; `asked`: ranks ask each other what they send, also
    where that turns out to be nothing. Counts go to all ranks, rows only where they are sent. No message is through before an empty one
    would be, so far rows do not make it any faster."""
    counts = cost.dispatch_messages / DISPATCH_COLLECTIVES
    if far > LEAST_TRAFFIC:
        return cost.dispatch_messages * topology.latency_to_all
    if near > LEAST_TRAFFIC:
        return (cost.dispatch_messages - counts) * topology.near_latency + counts * topology.latency_to_all
    if asked:
        return (cost.dispatch_messages - counts) * topology.exchange_latency + counts * topology.latency_to_all
    return 0.0


@loop
def moved_bytes(
    owner: np.ndarray, replicas: Replicas, resident: np.ndarray, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers
) -> float:
    """Bytes that a layer sends between ranks in a step: experts, their gradients, and all rows; of frozen parts a step's share.

    Rows and experts count once for each rank that they come to, experts by the route that is fastest once for each exchange.
    """
    ranks, k = len(topology.node_D), cost.top_k
    trainable, frozen = np.empty((4, ranks)), np.empty((4, ranks))
    replica_parts(owner, replicas, resident, topology, cost, trainable, frozen)
    gathered = total(trainable[NEAR_OUT]) + total(trainable[FAR_OUT])
    fetched = cost.fetched_share * (total(frozen[NEAR_OUT]) + total(frozen[FAR_OUT]))
    moved = gathered * ((1 + cost.second_gathers) * cost.trainable_bytes + cost.reduced_bytes) + fetched * cost.frozen_bytes
    remote_D, rows = np.zeros(ranks), 0.0
    for e in range(len(owner)):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            foreign = replicas.quota_ED[e, d] - loads.tokens_SE[d, e]
            if foreign > ROUNDING * loads.load_E[e]:
                remote_D[d] += foreign
    all_tokens = total(loads.load_D) / k
    for d in range(ranks):
        rows += distinct(remote_D[d], all_tokens - loads.load_D[d] / k, k)
    return moved + 4.0 * cost.row_bytes * rows


@loop
def _leave_nodes(replicas: Replicas, loads: LayerLoads, far_share: np.ndarray, topology: TopologyNumbers, far_out: np.ndarray) -> None:
    """Adds to `far_out` [ranks] the assignments of each that leave its node; `far_share` [nodes, experts] of what leaves a rank does."""
    ranks, experts = loads.tokens_SE.shape
    fours = experts - experts % 4
    for d in range(ranks):
        tokens, share = loads.tokens_SE[d], far_share[topology.node_D[d]]
        a, b, c, f = 0.0, 0.0, 0.0, 0.0  # four sums run side by side
        for e in range(0, fours, 4):
            a += tokens[e] * share[e]
            b += tokens[e + 1] * share[e + 1]
            c += tokens[e + 2] * share[e + 2]
            f += tokens[e + 3] * share[e + 3]
        for e in range(fours, experts):
            a += tokens[e] * share[e]
        far_out[d] += (a + b) + (c + f)
    for e in range(experts):
        for i in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, i]
            far_out[d] -= min(loads.tokens_SE[d, e], replicas.quota_ED[e, d]) * far_share[topology.node_D[d], e]


@loop
def distinct(assignments: float, tokens: float, k: int) -> float:
    """Distinct tokens behind assignments, of `tokens` tokens with `k` each.

    Loads do not say which assignments belong to one token; they are taken as drawn independently: c of the k·T assignments of T tokens
    touch T·(1 - (1 - c/(kT))^k) tokens.
    """
    if tokens <= 0:
        return 0.0
    share = 1.0 - min(assignments / (k * tokens), 1.0)
    power = 1.0
    for _ in range(k):
        power *= share
    return tokens * (1.0 - power)


@loop
def exposed_seconds(compute: float, transfer: float, slowdown: float) -> float:
    """What a transfer beside `compute` seconds of work adds: both are slowed down while both run."""
    both = min(compute, transfer)
    return transfer - both + (slowdown - 1) * both


@loop
def traffic_seconds(
    assignments: np.ndarray, everywhere: bool, topology: TopologyNumbers, cost: CostNumbers, rows: np.ndarray
) -> tuple[float, float]:
    """Seconds of expert compute on the slowest rank, and of all all-to-alls.

    Args:
        assignments: float64 [7, ranks], see `price_layers`.
        everywhere: whether every expert is.
        rows: filled, float64 [5, ranks]: rows through the four ports in one all-to-all, and computed.
    """
    load = assignments[OWN]
    compute = largest(compute_seconds(assignments[LOCAL], assignments[SERVED], load, topology, cost, rows[4]))
    for d in range(len(load)):
        rows[NEAR_IN, d] = assignments[NEAR_IN, d]
        rows[FAR_IN, d] = assignments[FAR_IN, d]
    asked = not everywhere and total(load) > 0
    latency = dispatch_latency(total(assignments[NEAR_IN]), total(assignments[FAR_IN]), asked, topology, cost)
    share = rows_received(rows, load, cost.top_k)
    for d in range(len(load)):
        rows[NEAR_OUT, d] = assignments[NEAR_OUT, d] * share
        rows[FAR_OUT, d] = assignments[FAR_OUT, d] * share
    return compute, 4.0 * port_seconds(rows, topology) * cost.row_bytes + latency


@entry
def price_layers(
    owner_LE: np.ndarray,
    where_LED: np.ndarray,
    resident_LED: np.ndarray,
    assignments_LXD: np.ndarray,
    topology: TopologyNumbers,
    cost: CostNumbers,
    replicas: Replicas,
    parts_LX: np.ndarray,
    rows_LXD: np.ndarray,
    copies_LXD: np.ndarray,
) -> None:
    """Seconds of each layer, and the rows and copies through each port.

    Args:
        resident_LED: bool [layers, experts, ranks], or [layers, 0, 0] where nothing is.
        assignments_LXD: float64 [layers, 7, ranks]: sent near, received near, sent far, received far, served of a rank's own tokens,
            served, and the rank's own.
        replicas: room to work in.
        parts_LX: filled, float64 [layers, 6]: compute, dispatch, gather, reduce, exposed, optimizer.
        rows_LXD: filled, float64 [layers, 5, ranks]: rows through the four ports in one all-to-all, and computed.
        copies_LXD: filled, [layers, 8, ranks]: experts through the four ports, of trainable and of frozen parts.
    """
    for layer in range(len(owner_LE)):
        owner, assignments, parts = owner_LE[layer], assignments_LXD[layer], parts_LX[layer]
        rows, copies = rows_LXD[layer], copies_LXD[layer]
        everywhere = fill_lists(where_LED[layer], replicas)
        parts[0], parts[1] = traffic_seconds(assignments, everywhere, topology, cost, rows)
        gather, reduce, added = replica_parts(owner, replicas, resident_LED[layer], topology, cost, copies[:4], copies[4:])
        parts[2] = gather
        parts[3] = reduce
        parts[4] = added
        parts[5] = optimizer_seconds(owner, topology, cost)
