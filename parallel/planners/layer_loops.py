"""The cost model and token flows of one layer as loops over experts and ranks: what `auto` calls a dozen times a layer.

The same numbers as `hecate.parallel.cost_model.layer_seconds` and `hecate.parallel.flows.even_quota`, which are the reference, in a
hundredth of the time. Plans are `Replicas`, and topology, cost and loads are tuples too (see `topology_numbers`, `cost_numbers`,
`layer_loads`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.compiled import compiled
from hecate.parallel.cost_model import DISPATCH_COLLECTIVES, LEAST_TRAFFIC, LayerCost
from hecate.parallel.planners.replica_lists import Replicas
from hecate.parallel.topology import Topology

ROUNDING = 1e-9
"""share of an expert's load; less is no traffic"""


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
    """A layer's cost as numbers."""

    trainable_bytes: float
    reduced_bytes: float
    frozen_bytes_a_step: float
    optimizer_bytes: float
    top_k: int
    row_bytes: float
    row_work: float
    choice_work: float
    attention_seconds: float


class LayerLoads(NamedTuple):
    """The choices of one layer, float64, and their sums."""

    tokens_SE: np.ndarray
    tokens_NE: np.ndarray
    load_E: np.ndarray
    load_D: np.ndarray


def topology_numbers(topology: Topology) -> TopologyNumbers:
    node_D = np.asarray(topology.node_of_rank, dtype=np.int64)
    return TopologyNumbers(
        node_D,
        np.argsort(node_D, kind="stable"),
        np.concatenate([[0], np.cumsum(np.bincount(node_D))]),
        np.asarray(topology.flops, dtype=np.float64),
        np.asarray(topology.port_bandwidth, dtype=np.float64),
        np.asarray(topology.nic_bandwidth, dtype=np.float64),
        np.asarray(topology.memory_bandwidth, dtype=np.float64),
        np.asarray(topology.uplink_bandwidth, dtype=np.float64),
        float(topology.intra_node.latency),
        float(topology.inter_node.latency),
        float(topology.exchange_latency),
        float(topology.overlap_slowdown),
    )


def cost_numbers(cost: LayerCost, topology: Topology) -> CostNumbers:
    return CostNumbers(
        float(cost.trainable_bytes),
        float(cost.reduced_bytes),
        float(cost.frozen_bytes / cost.frozen_lifetime),
        float(cost.reduced_bytes + 2 * cost.state_bytes),
        int(cost.top_k),
        float(cost.row_bytes),
        float(cost.row_flops * (1 + cost.row_backward)),
        float(cost.assignment_flops * (1 + cost.assignment_backward)),
        float(cost.non_moe_flops / min(topology.flops)),
    )


@compiled
def layer_loads(tokens_SE: np.ndarray, topology: TopologyNumbers) -> LayerLoads:
    ranks, experts = tokens_SE.shape
    tokens_NE, load_E, load_D = np.zeros((len(topology.uplink_N), experts)), np.zeros(experts), np.zeros(ranks)
    for d in range(ranks):
        n = topology.node_D[d]
        for e in range(experts):
            tokens_NE[n, e] += tokens_SE[d, e]
    for n in range(len(tokens_NE)):
        load_E += tokens_NE[n]
    for d in range(ranks):
        load_D[d] = tokens_SE[d].sum()
    return LayerLoads(tokens_SE, tokens_NE, load_E, load_D)


@compiled
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


@compiled
def busy_seconds(replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers) -> np.ndarray:
    """float64 [ranks]: seconds of expert compute, forward and backward."""
    ranks, k = len(loads.load_D), cost.top_k
    local, served, busy = np.zeros(ranks), np.zeros(ranks), np.empty(ranks)
    for e in range(len(loads.load_E)):
        for c in range(replicas.count_E[e]):
            d = replicas.rank_EC[e, c]
            local[d] += min(loads.tokens_SE[d, e], replicas.quota_ED[e, d])
            served[d] += replicas.quota_ED[e, d]
    all_tokens = loads.load_D.sum() / k
    for d in range(ranks):
        own = loads.load_D[d] / k
        rows = _distinct(local[d], own, k) + _distinct(served[d] - local[d], all_tokens - own, k)
        busy[d] = (rows * cost.row_work + served[d] * cost.choice_work) / topology.rate_D[d]
    return busy


@compiled
def replica_seconds(owner: np.ndarray, replicas: Replicas, resident: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """What bringing the replicas and returning their gradients adds to the step, and the optimizer's time.

    `resident` is bool [experts, ranks], or [0, 0] where nothing is.
    """
    gather, reduce = _transfer(owner, replicas, resident, False, cost.trainable_bytes, cost.reduced_bytes, topology)
    if cost.frozen_bytes_a_step > 0:
        gather += _transfer(owner, replicas, resident, True, cost.frozen_bytes_a_step, 0.0, topology)[0]
    exposed = _exposed(cost.attention_seconds, gather, topology.slowdown) + _exposed(2 * cost.attention_seconds, reduce, topology.slowdown)
    owned = np.zeros(len(topology.node_D))
    for e in range(len(owner)):
        owned[owner[e]] += 1.0
    return exposed + (owned * cost.optimizer_bytes / topology.memory_rate_D).max()


@compiled
def dispatch_seconds(replicas: Replicas, loads: LayerLoads, topology: TopologyNumbers, cost: CostNumbers, enough: float) -> float:
    """All all-to-alls of the layer's rows in a step; where they take `enough` seconds or more, `enough` or more."""
    experts, ranks = replicas.has_ED.shape
    nodes, k = len(topology.uplink_N), cost.top_k
    near_in, far_in, kept = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
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
                near_in[d] += near
                far_in[d] += here - near
    near_sum, far_sum = near_in.sum(), far_in.sum()
    latency = 0.0
    if far_sum > LEAST_TRAFFIC:
        latency = DISPATCH_COLLECTIVES * topology.far_latency
    elif near_sum > LEAST_TRAFFIC:
        latency = DISPATCH_COLLECTIVES * topology.near_latency
    elif not everywhere and loads.load_D.sum() > 0:
        latency = DISPATCH_COLLECTIVES * topology.exchange_latency
    all_tokens = loads.load_D.sum() / k
    all_rows, all_choices = 0.0, 0.0
    for d in range(ranks):
        remote = near_in[d] + far_in[d]
        if remote > 0:
            rows = _distinct(remote, all_tokens - loads.load_D[d] / k, k)
            all_rows += rows
            all_choices += remote
            near_in[d] *= rows / remote
            far_in[d] *= rows / remote
    share = all_rows / all_choices if all_choices > 0 else 0.0
    near_out, far_out = np.zeros(ranks), np.zeros(ranks)
    into = 4.0 * _port_seconds(near_out, near_in, far_out, far_in, topology) * cost.row_bytes + latency
    if into >= enough:  # what leaves the ranks takes a pass over all sources
        return into
    if far_sum > 0:
        _leave_nodes(replicas, loads, far_share, topology, far_out)
    for d in range(ranks):
        near_out[d] = max(loads.load_D[d] - kept[d] - far_out[d], 0.0) * share
        far_out[d] *= share
    return 4.0 * _port_seconds(near_out, near_in, far_out, far_in, topology) * cost.row_bytes + latency


@compiled
def _leave_nodes(replicas: Replicas, loads: LayerLoads, far_share: np.ndarray, topology: TopologyNumbers, far_out: np.ndarray) -> None:
    """Adds to `far_out` [ranks] the choices of each that leave its node; `far_share` [nodes, experts] of what leaves a rank does."""
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


@compiled
def _distinct(choices: float, tokens: float, k: int) -> float:
    if tokens <= 0:
        return 0.0
    share = 1.0 - min(choices / (k * tokens), 1.0)
    power = 1.0
    for _ in range(k):
        power *= share
    return tokens * (1.0 - power)


@compiled
def _port_seconds(near_out: np.ndarray, near_in: np.ndarray, far_out: np.ndarray, far_in: np.ndarray, topology: TopologyNumbers) -> float:
    nodes = len(topology.uplink_N)
    seconds = 0.0
    out, into = np.zeros(nodes), np.zeros(nodes)
    for d in range(len(near_out)):
        seconds = max(seconds, max(near_out[d], near_in[d]) / topology.port_D[d], max(far_out[d], far_in[d]) / topology.nic_D[d])
        out[topology.node_D[d]] += far_out[d]
        into[topology.node_D[d]] += far_in[d]
    for n in range(nodes):
        seconds = max(seconds, max(out[n], into[n]) / topology.uplink_N[n])
    return seconds


@compiled
def _transfer(
    owner: np.ndarray,
    replicas: Replicas,
    resident: np.ndarray,
    fresh_only: bool,
    there_bytes: float,
    back_bytes: float,
    topology: TopologyNumbers,
) -> tuple[float, float]:
    """Seconds of the two-level copies to replicas, and of the same way back; without the replicas that are resident if so asked."""
    ranks, nodes = len(topology.node_D), len(topology.uplink_N)
    near_out, near_in, far_out, far_in = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
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
                    near_in[d] += 1
                    near_out[home] += 1
                elif turn[n] == e % wanted[n]:
                    far_in[d] += 1
                    far_out[home] += 1
                    near_out[d] += wanted[n] - 1
                else:
                    near_in[d] += 1
                turn[n] += 1
        for c in range(count):
            n = topology.node_D[replicas.rank_EC[e, c]]
            wanted[n] = 0
            turn[n] = 0
    latency = topology.far_latency if far_out.sum() > 0 else 0.0
    if near_out.sum() > 0:
        latency += topology.near_latency
    busiest = _port_seconds(near_out, near_in, far_out, far_in, topology)
    return busiest * there_bytes + latency, busiest * back_bytes + latency


@compiled
def _exposed(compute: float, transfer: float, slowdown: float) -> float:
    both = min(compute, transfer)
    return transfer - both + (slowdown - 1) * both
