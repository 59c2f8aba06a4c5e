"""The cost model of one MoE layer, as loops over experts and ranks that are compiled (`hecate.parallel.jit`).

Where several links or devices work side by side the slowest decides: maxima, never sums. `auto` calls these loops a dozen times a layer;
everything else prices plans through `hecate.parallel.cost_model`, which calls the same ones. A plan is `Replicas`; topology, cost and loads
are tuples, too (see `topology_numbers`, `cost_numbers`, `layer_loads`). tests/parallel/plain_cost_model.py says the same in plain numpy.

Shapes: E experts, D = S ranks as destinations and as sources, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.array_loops import largest, total
from hecate.parallel.jit import entry, loop
from hecate.parallel.replica_lists import Replicas, fill_lists

DISPATCH_COLLECTIVES = 8
"""all-to-alls of a layer's tokens: counts, slots, rows, weights, results; backward results, rows, weights"""
LEAST_TRAFFIC = 1e-6
"""rows or experts; less is rounding, and pays no latency"""
ROUNDING = 1e-9
"""share of an expert's load; less is no traffic"""
NEAR_OUT, NEAR_IN, FAR_OUT, FAR_IN = range(4)
"""rows of an array [4, ranks]: traffic through each rank's ports inside its node, and to and from other nodes"""


class TopologyNumbers(NamedTuple):
    """A topology as arrays."""

    node_D: np.ndarray
    member_D: np.ndarray
    """ranks by node"""
    first_N: np.ndarray
    """where a node's ranks begin in `member_D`; and the number of ranks"""
    rate_D: np.ndarray
    port_D: np.ndarray
    nic_D: np.ndarray
    memory_rate_D: np.ndarray
    uplink_N: np.ndarray
    near_latency: float
    far_latency: float
    exchange_latency: float
    slowdown: float


class CostNumbers(NamedTuple):
    """A layer's cost, and how it is executed, as numbers."""

    trainable_bytes: float
    reduced_bytes: float
    frozen_bytes_a_step: float
    optimizer_bytes: float
    top_k: int
    row_bytes: float
    row_work: float
    assignment_work: float
    dispatch_messages: float
    """all-to-alls of the layer's tokens, whose latencies are paid"""
    hides_gather: float
    """seconds of work beside which the forward pass's gather travels"""
    hides_reduce: float
    """seconds of work beside which gradients travel back"""
    hides_second_gather: bool
    """the gather before the backward pass travels beside that work, too"""
    second_gathers: int
    """gathers before the backward pass: 1 where replicas were freed after the forward pass"""


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
    for d in range(ranks):
        n = topology.node_D[d]
        for e in range(experts):
            tokens_NE[n, e] += tokens_SE[d, e]
            load_D[d] += tokens_SE[d, e]
    for n in range(len(tokens_NE)):
        for e in range(experts):
            load_E[e] += tokens_NE[n, e]
    return LayerLoads(tokens_SE, tokens_NE, load_E, load_D)


@loop
def even_quota_into(replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers) -> None:
    """Topology-aware dispatch (Hecate §3.3): see `hecate.parallel.flows.even_quota`."""
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
    ranks = len(topology.node_D)
    trainable, frozen = np.zeros((4, ranks)), np.zeros((4, ranks))
    return replica_parts(owner, replicas, resident, topology, cost, trainable, frozen)[2] + optimizer_seconds(owner, topology, cost)


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

    Fills `trainable` and `frozen`, zeros [4, ranks]: the experts through each port, as `count_copies` does.
    """
    count_copies(owner, replicas, resident, False, topology, trainable)
    latency, busiest = transfer_latency(trainable, topology), port_seconds(trainable, topology)
    gather, reduce = busiest * cost.trainable_bytes + latency, busiest * cost.reduced_bytes + latency
    again = gather  # frozen parts stay
    if cost.frozen_bytes_a_step > 0:
        count_copies(owner, replicas, resident, True, topology, frozen)
        gather += port_seconds(frozen, topology) * cost.frozen_bytes_a_step + transfer_latency(frozen, topology)
    added = exposed_seconds(cost.hides_gather, gather, topology.slowdown)
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
            here = replicas.quota_ED[e, d] - loads.tokens_SE[d, e]
            if here > ROUNDING * loads.load_E[e]:
                near = here * served[topology.node_D[d]]
                ports[NEAR_IN, d] += near
                ports[FAR_IN, d] += here - near
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
    where that turns out to be nothing."""
    if far > LEAST_TRAFFIC:
        return cost.dispatch_messages * topology.far_latency
    if near > LEAST_TRAFFIC:
        return cost.dispatch_messages * topology.near_latency
    if asked:
        return cost.dispatch_messages * topology.exchange_latency
    return 0.0


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
def port_seconds(ports: np.ndarray, topology: TopologyNumbers) -> float:
    """Seconds until the busiest port is done, without latency, for each unit of traffic in `ports`, float64 [4, ranks]."""
    nodes = len(topology.uplink_N)
    seconds = 0.0
    out, into = np.zeros(nodes), np.zeros(nodes)
    for d in range(len(topology.node_D)):
        near, far = max(ports[NEAR_OUT, d], ports[NEAR_IN, d]), max(ports[FAR_OUT, d], ports[FAR_IN, d])
        seconds = max(seconds, near / topology.port_D[d], far / topology.nic_D[d])
        out[topology.node_D[d]] += ports[FAR_OUT, d]
        into[topology.node_D[d]] += ports[FAR_IN, d]
    for n in range(nodes):
        seconds = max(seconds, max(out[n], into[n]) / topology.uplink_N[n])
    return seconds


@loop
def transfer_latency(ports: np.ndarray, topology: TopologyNumbers) -> float:
    """Seconds before anything of an exchange of experts arrives."""
    latency = topology.far_latency if total(ports[FAR_OUT]) > 0 else 0.0
    if total(ports[NEAR_OUT]) > 0:
        latency += topology.near_latency
    return latency


@loop
def count_copies(
    owner: np.ndarray, replicas: Replicas, resident: np.ndarray, fresh_only: bool, topology: TopologyNumbers, ports: np.ndarray
) -> None:
    """Add to `ports` [4, ranks] the experts through each port when replicas come by way of one leader a node.

    Args:
        resident: bool [experts, ranks], or [0, 0] where nothing is.
        fresh_only: without the replicas that are resident.
    """
    nodes = len(topology.uplink_N)
    wanted, turn = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    for e in range(len(owner)):
        count, home = replicas.count_E[e], owner[e]
        if count == 1:
            continue
        for c in range(count):
            d = replicas.rank_EC[e, c]
            if d != home and not (fresh_only and len(resident) > 0 and resident[e, d]):
                wanted[topology.node_D[d]] += 1
        for c in range(count):
            d = replicas.rank_EC[e, c]
            if d != home and not (fresh_only and len(resident) > 0 and resident[e, d]):
                n = topology.node_D[d]
                if n == topology.node_D[home]:
                    ports[NEAR_IN, d] += 1
                    ports[NEAR_OUT, home] += 1
                elif turn[n] == e % wanted[n]:
                    ports[FAR_IN, d] += 1
                    ports[FAR_OUT, home] += 1
                    ports[NEAR_OUT, d] += wanted[n] - 1
                else:
                    ports[NEAR_IN, d] += 1
                turn[n] += 1
        for c in range(count):
            n = topology.node_D[replicas.rank_EC[e, c]]
            wanted[n] = 0
            turn[n] = 0


@loop
def exposed_seconds(compute: float, transfer: float, slowdown: float) -> float:
    """What a transfer beside `compute` seconds of work adds: both are slowed down while both run."""
    both = min(compute, transfer)
    return transfer - both + (slowdown - 1) * both


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
        copies_LXD: filled, zeros [layers, 8, ranks]: experts through the four ports, of trainable and of frozen parts.
    """
    for layer in range(len(owner_LE)):
        owner, assignments, parts = owner_LE[layer], assignments_LXD[layer], parts_LX[layer]
        rows, copies = rows_LXD[layer], copies_LXD[layer]
        everywhere = fill_lists(where_LED[layer], replicas)
        load = assignments[6]
        parts[0] = largest(compute_seconds(assignments[4], assignments[5], load, topology, cost, rows[4]))

        for d in range(len(load)):
            rows[NEAR_IN, d] = assignments[NEAR_IN, d]
            rows[FAR_IN, d] = assignments[FAR_IN, d]
        asked = not everywhere and total(load) > 0
        latency = dispatch_latency(total(assignments[NEAR_IN]), total(assignments[FAR_IN]), asked, topology, cost)
        share = rows_received(rows, load, cost.top_k)
        for d in range(len(load)):
            rows[NEAR_OUT, d] = assignments[NEAR_OUT, d] * share
            rows[FAR_OUT, d] = assignments[FAR_OUT, d] * share
        parts[1] = 4.0 * port_seconds(rows, topology) * cost.row_bytes + latency

        gather, reduce, added = replica_parts(owner, replicas, resident_LED[layer], topology, cost, copies[:4], copies[4:])
        parts[2] = gather
        parts[3] = reduce
        parts[4] = added
        parts[5] = optimizer_seconds(owner, topology, cost)


@entry
def exchange_seconds(ports_XPD: np.ndarray, topology: TopologyNumbers, seconds_XP: np.ndarray) -> None:
    """Fill `seconds_XP` [exchanges, 2]: `port_seconds` and `transfer_latency` of each of several exchanges [exchanges, 4, ranks]."""
    for x in range(len(ports_XPD)):
        seconds_XP[x, 0] = port_seconds(ports_XPD[x], topology)
        seconds_XP[x, 1] = transfer_latency(ports_XPD[x], topology)
