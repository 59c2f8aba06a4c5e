"""The cost model and token flows of one layer as loops over experts and ranks: what `auto` calls a dozen times a layer.

The same numbers as `hecate.parallel.cost_model.layer_seconds` and `hecate.parallel.flows.even_quota`, which are the reference, in a
hundredth of the time. Arrays are [experts, ranks]; topology and cost are tuples (see `topology_numbers`, `cost_numbers`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.compiled import compiled
from hecate.parallel.cost_model import DISPATCH_COLLECTIVES, LEAST_TRAFFIC, LayerCost
from hecate.parallel.topology import Topology


class TopologyNumbers(NamedTuple):
    """A topology as arrays."""

    node_D: np.ndarray
    rate_D: np.ndarray
    port_D: np.ndarray
    nic_D: np.ndarray
    memory_rate_D: np.ndarray
    uplink_N: np.ndarray
    near_latency: float
    far_latency: float
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


def topology_numbers(topology: Topology) -> TopologyNumbers:
    return TopologyNumbers(
        np.asarray(topology.node_of_rank, dtype=np.int64),
        np.asarray(topology.flops, dtype=np.float64),
        np.asarray(topology.port_bandwidth, dtype=np.float64),
        np.asarray(topology.nic_bandwidth, dtype=np.float64),
        np.asarray(topology.memory_bandwidth, dtype=np.float64),
        np.asarray(topology.uplink_bandwidth, dtype=np.float64),
        float(topology.intra_node.latency),
        float(topology.inter_node.latency),
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
        float(cost.choice_flops * (1 + cost.choice_backward)),
        float(cost.non_moe_flops / min(topology.flops)),
    )


@compiled
def even_quota_into(where: np.ndarray, tokens: np.ndarray, topology: TopologyNumbers, quota: np.ndarray) -> None:
    """Topology-aware dispatch (Hecate §3.3): see `hecate.parallel.flows.even_quota`."""
    experts, ranks = where.shape
    nodes = len(topology.uplink_N)
    rest, copies = np.empty(nodes), np.empty(nodes)
    for e in range(experts):
        rest[:] = 0.0
        copies[:] = 0.0
        total = 0.0
        for d in range(ranks):
            n = topology.node_D[d]
            if where[e, d]:
                copies[n] += 1.0
                total += 1.0
            else:
                rest[n] += tokens[e, d]
        far = 0.0
        for n in range(nodes):
            if copies[n] > 0:
                rest[n] /= copies[n]
            else:
                far += rest[n]
        far /= total
        for d in range(ranks):
            quota[e, d] = tokens[e, d] + rest[topology.node_D[d]] + far if where[e, d] else 0.0


@compiled
def busy_seconds(tokens: np.ndarray, quota: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> np.ndarray:
    """float64 [ranks]: seconds of expert compute, forward and backward."""
    experts, ranks = quota.shape
    local, served, routed = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    for e in range(experts):
        for d in range(ranks):
            local[d] += min(tokens[e, d], quota[e, d])
            served[d] += quota[e, d]
            routed[d] += tokens[e, d]
    k = cost.top_k
    all_tokens = routed.sum() / k
    busy = np.empty(ranks)
    for d in range(ranks):
        own = routed[d] / k
        rows = _distinct(local[d], own, k) + _distinct(served[d] - local[d], all_tokens - own, k)
        busy[d] = (rows * cost.row_work + served[d] * cost.choice_work) / topology.rate_D[d]
    return busy


@compiled
def replica_seconds(owner: np.ndarray, where: np.ndarray, resident: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """What bringing the replicas and returning their gradients adds to the step, and the optimizer's time."""
    gather, reduce = _gather_seconds(owner, where, resident, topology, cost)
    exposed = _exposed(cost.attention_seconds, gather, topology.slowdown) + _exposed(2 * cost.attention_seconds, reduce, topology.slowdown)
    owned = np.zeros(len(topology.node_D))
    for e in range(len(owner)):
        owned[owner[e]] += 1.0
    return exposed + (owned * cost.optimizer_bytes / topology.memory_rate_D).max()


@compiled
def dispatch_seconds(tokens: np.ndarray, quota: np.ndarray, topology: TopologyNumbers, cost: CostNumbers) -> float:
    """All all-to-alls of the layer's rows in a step."""
    near_out, near_in, far_out, far_in = _token_ports(tokens, quota, topology, cost)
    seconds = 4.0 * _port_seconds(near_out, near_in, far_out, far_in, topology) * cost.row_bytes
    if far_out.sum() > LEAST_TRAFFIC:
        seconds += DISPATCH_COLLECTIVES * topology.far_latency
    elif near_out.sum() > LEAST_TRAFFIC:
        seconds += DISPATCH_COLLECTIVES * topology.near_latency
    return seconds


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
def _token_ports(
    tokens: np.ndarray, quota: np.ndarray, topology: TopologyNumbers, cost: CostNumbers
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows through each port in one all-to-all: near out and in, far out and in."""
    experts, ranks = quota.shape
    nodes = len(topology.uplink_N)
    near_out, near_in, far_out, far_in = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    routed = np.zeros(ranks)
    sent_share, served_share = np.empty(nodes), np.empty(nodes)
    for e in range(experts):
        sent_share[:] = 0.0
        served_share[:] = 0.0
        for d in range(ranks):
            difference = tokens[e, d] - quota[e, d]
            if difference > 0:
                sent_share[topology.node_D[d]] += difference
            else:
                served_share[topology.node_D[d]] -= difference
        for n in range(nodes):
            matched = min(sent_share[n], served_share[n])
            sent_share[n] = matched / sent_share[n] if sent_share[n] > 0 else 0.0
            served_share[n] = matched / served_share[n] if served_share[n] > 0 else 0.0
        for d in range(ranks):
            n = topology.node_D[d]
            routed[d] += tokens[e, d]
            difference = tokens[e, d] - quota[e, d]
            if difference > 0:
                near = difference * sent_share[n] if nodes > 1 else difference
                near_out[d] += near
                far_out[d] += difference - near
            else:
                near = -difference * served_share[n] if nodes > 1 else -difference
                near_in[d] += near
                far_in[d] += -difference - near
    k = cost.top_k
    all_tokens = routed.sum() / k
    all_rows, all_choices = 0.0, 0.0
    for d in range(ranks):
        remote = near_in[d] + far_in[d]
        if remote > 0:
            rows = _distinct(remote, all_tokens - routed[d] / k, k)
            all_rows += rows
            all_choices += remote
            near_in[d] *= rows / remote
            far_in[d] *= rows / remote
    share = all_rows / all_choices if all_choices > 0 else 0.0
    return near_out * share, near_in, far_out * share, far_in


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
def _gather_seconds(
    owner: np.ndarray, where: np.ndarray, resident: np.ndarray, topology: TopologyNumbers, cost: CostNumbers
) -> tuple[float, float]:
    gather = _transfer(owner, where, resident, False, cost.trainable_bytes, cost.reduced_bytes, topology)
    seconds = gather[0]
    if cost.frozen_bytes_a_step > 0:
        seconds += _transfer(owner, where, resident, True, cost.frozen_bytes_a_step, 0.0, topology)[0]
    return seconds, gather[1]


@compiled
def _transfer(
    owner: np.ndarray,
    where: np.ndarray,
    resident: np.ndarray,
    fresh_only: bool,
    there_bytes: float,
    back_bytes: float,
    topology: TopologyNumbers,
) -> tuple[float, float]:
    """Seconds of the two-level copies to replicas, and of the same way back; without the replicas that are resident if so asked."""
    experts, ranks = where.shape
    nodes = len(topology.uplink_N)
    near_out, near_in, far_out, far_in = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    wanted, turn, leader = np.empty(nodes, np.int64), np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    for e in range(experts):
        home = owner[e]
        home_node = topology.node_D[home]
        wanted[:] = 0
        turn[:] = 0
        leader[:] = -1
        for d in range(ranks):
            if where[e, d] and d != home and not (fresh_only and resident[e, d]):
                wanted[topology.node_D[d]] += 1
        for d in range(ranks):
            if where[e, d] and d != home and not (fresh_only and resident[e, d]):
                n = topology.node_D[d]
                if n == home_node:
                    near_in[d] += 1
                elif turn[n] == e % wanted[n]:
                    far_in[d] += 1
                    leader[n] = d
                else:
                    near_in[d] += 1
                turn[n] += 1
        for n in range(nodes):
            if n == home_node:
                near_out[home] += wanted[n]
            elif leader[n] >= 0:
                far_out[home] += 1
                near_out[leader[n]] += wanted[n] - 1
    latency = topology.far_latency if far_out.sum() > 0 else 0.0
    if near_out.sum() > 0:
        latency += topology.near_latency
    busiest = _port_seconds(near_out, near_in, far_out, far_in, topology)
    return busiest * there_bytes + latency, busiest * back_bytes + latency


@compiled
def _exposed(compute: float, transfer: float, slowdown: float) -> float:
    both = min(compute, transfer)
    return transfer - both + (slowdown - 1) * both
