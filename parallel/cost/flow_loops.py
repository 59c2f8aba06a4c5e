"""What each rank sends and serves of a layer's assignments, under the loads that a plan was made for or under others, as compiled loops.

The same as `hecate.parallel.cost.flows` says of each expert, summed over the experts as they go by, for whoever needs the sums alone.
Under other loads every source keeps to the shares of its assignments that the plan gave to each rank; one of which the plan expected no
assignment of an expert follows topology-aware dispatch with those it has.

Shapes: L layers, E experts, D ranks as sources and as destinations, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.cost.cost_loops import LOCAL, OWN, ROUNDING, SERVED
from hecate.parallel.cost.cost_numbers import FAR_IN, FAR_OUT, NEAR_IN, NEAR_OUT, TopologyNumbers
from hecate.parallel.loops.jit import entry, loop


class ExpertFlow(NamedTuple):
    """How the assignments of one expert travel: by node or by replica, and what no plan has foreseen."""

    rank_C: np.ndarray
    """int64 [ranks]: the ranks that have the expert, as many as `copies_N` says together"""
    copies_N: np.ndarray
    near_share_N: np.ndarray
    """of what leaves the ranks of a node, the share that stays in the node"""
    near_served_C: np.ndarray
    far_served_C: np.ndarray
    """what each replica serves for other ranks of its node, and for other nodes, as planned"""
    served_N: np.ndarray
    """the first of these, summed"""
    sent_N: np.ndarray
    """what ranks send to others of their node, of what came"""
    rest_N: np.ndarray
    """assignments of ranks without the expert that no plan has foreseen"""


@loop
def add_traffic(
    where: np.ndarray, quota: np.ndarray, planned: np.ndarray, loads: np.ndarray, topology: TopologyNumbers, traffic: np.ndarray
) -> None:
    """Add up what each rank sends and serves when all sources keep to the shares that a plan gave them.

    Args:
        where: bool [experts, ranks].
        quota: float64 [experts, ranks], zero where no replica is, made for `planned`; [0, 0]: topology-aware dispatch.
        planned: float64 [experts, ranks]: the loads that the quotas were made for; [0, 0]: those that came.
        loads: float64 [experts, ranks]: the loads that came.
        traffic: float64 [7, ranks], added to (see `price_layers`).
    """
    ranks, nodes = loads.shape[1], len(topology.uplink_N)
    flow = ExpertFlow(
        np.zeros(ranks, np.int64), np.zeros(nodes), np.zeros(nodes), np.zeros(ranks), np.zeros(ranks), np.zeros(nodes), np.zeros(nodes),
        np.zeros(nodes),
    )  # fmt: skip
    unplanned_D = np.zeros(ranks)
    for e in range(len(loads)):
        count = 0
        flow.copies_N[:] = 0.0
        for d in range(ranks):
            if where[e, d]:
                flow.rank_C[count] = d
                flow.copies_N[topology.node_D[d]] += 1.0
                count += 1
        plan = unplanned_D if len(quota) == 0 else loads[e] if len(planned) == 0 else planned[e]
        quotas = unplanned_D if len(quota) == 0 else quota[e]
        rounding, far_served = _match(where[e], plan, quotas, count, topology, flow)
        far_sent = _send(where[e], plan, quotas, loads[e], rounding, far_served > 0, topology, flow, traffic)
        far_rest = 0.0
        for n in range(nodes):
            far_rest += flow.rest_N[n] if flow.copies_N[n] == 0 else 0.0
        far_scale = far_sent / far_served if far_served > 0 else 0.0
        for c in range(count):
            d, n = flow.rank_C[c], topology.node_D[flow.rank_C[c]]
            near_scale = flow.sent_N[n] / flow.served_N[n] if flow.served_N[n] > 0 else 0.0
            near = flow.near_served_C[c] * near_scale + flow.rest_N[n] / flow.copies_N[n]
            far = flow.far_served_C[c] * far_scale + far_rest / count
            traffic[NEAR_IN, d] += near
            traffic[FAR_IN, d] += far
            traffic[SERVED, d] += near + far


@loop
def _match(
    where: np.ndarray, plan: np.ndarray, quota: np.ndarray, count: int, topology: TopologyNumbers, flow: ExpertFlow
) -> tuple[float, float]:
    """Fill in what replicas serve of the planned loads of one expert, and the nodes' shares; returns what is rounding, and `far_served_C`
    summed."""
    nodes, node_D = len(topology.uplink_N), topology.node_D
    sent_N, served_N, all_planned = flow.sent_N, flow.served_N, 0.0
    for n in range(nodes):
        sent = 0.0
        for i in range(topology.first_N[n], topology.first_N[n + 1]):
            d = topology.member_D[i]
            all_planned += plan[d]
            sent += 0.0 if where[d] else plan[d]
        sent_N[n] = sent
        served_N[n] = 0.0
    rounding = all_planned * ROUNDING
    for c in range(count):
        d = flow.rank_C[c]
        local = min(plan[d], quota[d])
        flow.near_served_C[c] = quota[d] - local if quota[d] - local > rounding else 0.0
        sent_N[node_D[d]] += plan[d] - local if plan[d] - local > rounding else 0.0
        served_N[node_D[d]] += flow.near_served_C[c]
    for n in range(nodes):
        matched = min(sent_N[n], served_N[n])
        flow.near_share_N[n] = 1.0 if nodes == 1 else matched / sent_N[n] if sent_N[n] > 0 else 0.0
        sent_N[n] = 1.0 if nodes == 1 else matched / served_N[n] if served_N[n] > 0 else 0.0  # of what is served
        served_N[n] = 0.0
    far_served = 0.0
    for c in range(count):
        n = node_D[flow.rank_C[c]]
        far = flow.near_served_C[c] - flow.near_served_C[c] * sent_N[n]
        flow.far_served_C[c] = far if far > rounding else 0.0
        flow.near_served_C[c] -= flow.far_served_C[c]
        served_N[n] += flow.near_served_C[c]
        far_served += flow.far_served_C[c]
    return rounding, far_served


@loop
def _send(
    where: np.ndarray,
    plan: np.ndarray,
    quota: np.ndarray,
    load: np.ndarray,
    rounding: float,
    far_is_served: bool,
    topology: TopologyNumbers,
    flow: ExpertFlow,
    traffic: np.ndarray,
) -> float:
    """Add what ranks send of the assignments of one expert that came, and keep; fills `sent_N` and `rest_N`; returns what leaves nodes."""
    far_sent = 0.0
    for n in range(len(topology.uplink_N)):
        far_share, near_is_served = 1.0 - flow.near_share_N[n], flow.served_N[n] > 0
        rest, near_sent = 0.0, 0.0
        for i in range(topology.first_N[n], topology.first_N[n + 1]):
            d = topology.member_D[i]
            local = min(plan[d], quota[d]) if where[d] else 0.0
            sent = plan[d] - local if plan[d] - local > rounding else 0.0
            far = sent * far_share if sent * far_share > rounding else 0.0
            near = sent - far if near_is_served else 0.0
            far = far if far_is_served else 0.0
            known = local + near + far
            traffic[OWN, d] += load[d]
            if known > 0:
                scale = load[d] / known
                traffic[NEAR_OUT, d] += near * scale
                traffic[FAR_OUT, d] += far * scale
                near_sent += near * scale
                far_sent += far * scale
                kept = local * scale
            elif where[d]:
                kept = load[d]
            else:
                kept = 0.0
                rest += load[d]
                traffic[NEAR_OUT if flow.copies_N[n] > 0 else FAR_OUT, d] += load[d]
            traffic[LOCAL, d] += kept
            traffic[SERVED, d] += kept
        flow.sent_N[n], flow.rest_N[n] = near_sent, rest
    return far_sent


@entry
def executed_traffic(
    where_LED: np.ndarray, quota_LED: np.ndarray, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: TopologyNumbers,
    traffic_LXD: np.ndarray,
) -> None:  # fmt: skip
    """Fill `traffic_LXD` [layers, 7, ranks], zeros, by `add_traffic`; quotas and planned loads may be [layers, 0, 0]."""
    for layer in range(len(loads_LED)):
        add_traffic(where_LED[layer], quota_LED[layer], planned_LED[layer], loads_LED[layer], topology, traffic_LXD[layer])
