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
    """How the assignments of one expert travel, as in `hecate.parallel.cost.flows.Flows`, and room to work in."""

    local_D: np.ndarray
    near_sent_D: np.ndarray
    near_served_D: np.ndarray
    far_sent_D: np.ndarray
    far_served_D: np.ndarray
    sent_N: np.ndarray
    served_N: np.ndarray
    rest_D: np.ndarray
    """assignments that no plan has foreseen"""
    quota_D: np.ndarray


@loop
def no_flow(ranks: int, nodes: int) -> ExpertFlow:
    return ExpertFlow(
        np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(nodes), np.zeros(nodes),
        np.zeros(ranks), np.zeros(ranks),
    )  # fmt: skip


@loop
def add_traffic(
    where: np.ndarray, quota: np.ndarray, planned: np.ndarray, loads: np.ndarray, topology: TopologyNumbers, flow: ExpertFlow,
    traffic: np.ndarray,
) -> None:  # fmt: skip
    """Add up what each rank sends and serves when all sources keep to the shares that a plan gave them.

    Args:
        where: bool [experts, ranks].
        quota: float64 [experts, ranks], made for `planned`; [0, 0]: topology-aware dispatch.
        planned: float64 [experts, ranks]: the loads that the quotas were made for; [0, 0]: those that came.
        loads: float64 [experts, ranks]: the loads that came.
        flow: room to work in.
        traffic: float64 [7, ranks], added to (see `price_layers`).
    """
    for e in range(len(loads)):
        if len(quota) == 0:
            _even_quota(where[e], loads[e], topology, flow)
            _match(loads[e], flow.quota_D, topology, flow)
            _add(flow, traffic)
        elif len(planned) == 0:
            _match(loads[e], quota[e], topology, flow)
            _add(flow, traffic)
        else:
            _match(planned[e], quota[e], topology, flow)
            if _rescale(loads[e], topology, flow):
                _add(flow, traffic)
                _even_quota(where[e], flow.rest_D, topology, flow)
                _match(flow.rest_D, flow.quota_D, topology, flow)
            _add(flow, traffic)
        for d in range(loads.shape[1]):
            traffic[OWN, d] += loads[e, d]


@loop
def _match(load: np.ndarray, quota: np.ndarray, topology: TopologyNumbers, flow: ExpertFlow) -> None:
    """Fill `flow` with what `hecate.parallel.cost.flows.flows` says of one expert."""
    nodes, node_D = len(topology.uplink_N), topology.node_D
    local_D, near_sent_D, near_served_D = flow.local_D, flow.near_sent_D, flow.near_served_D
    rounding = 0.0
    for d in range(len(load)):
        rounding += load[d]
    rounding *= ROUNDING
    for d in range(len(load)):
        local = min(load[d], quota[d])
        sent, served = load[d] - local, quota[d] - local
        local_D[d] = local
        near_sent_D[d] = sent if sent > rounding else 0.0
        near_served_D[d] = served if served > rounding else 0.0
    if nodes == 1:
        return
    sent_N, served_N = flow.sent_N, flow.served_N
    for n in range(nodes):
        sent_N[n] = 0.0
        served_N[n] = 0.0
    for d in range(len(load)):
        sent_N[node_D[d]] += near_sent_D[d]
        served_N[node_D[d]] += near_served_D[d]
    for n in range(nodes):
        matched = min(sent_N[n], served_N[n])
        sent_N[n] = matched / sent_N[n] if sent_N[n] > 0 else 0.0
        served_N[n] = matched / served_N[n] if served_N[n] > 0 else 0.0
    for d in range(len(load)):
        sent, served = near_sent_D[d], near_served_D[d]
        far = sent - sent * sent_N[node_D[d]]
        far = far if far > rounding else 0.0
        flow.far_sent_D[d] = far
        near_sent_D[d] = sent - far
        far = served - served * served_N[node_D[d]]
        far = far if far > rounding else 0.0
        flow.far_served_D[d] = far
        near_served_D[d] = served - far


@loop
def _rescale(load: np.ndarray, topology: TopologyNumbers, flow: ExpertFlow) -> bool:
    """Make of how the planned loads of one expert travel how these do; returns whether some were not foreseen, and fills `rest_D`."""
    nodes, node_D = len(topology.uplink_N), topology.node_D
    sent_N, served_N = flow.sent_N, flow.served_N
    far_sent, far_served, unforeseen = 0.0, 0.0, False
    for n in range(nodes):
        sent_N[n] = 0.0
        served_N[n] = 0.0
    for d in range(len(load)):
        served_N[node_D[d]] += flow.near_served_D[d]
        far_served += flow.far_served_D[d]
    for d in range(len(load)):
        near = flow.near_sent_D[d] if served_N[node_D[d]] > 0 else 0.0
        far = flow.far_sent_D[d] if far_served > 0 else 0.0
        known = flow.local_D[d] + near + far
        scale = load[d] / known if known > 0 else 0.0
        flow.rest_D[d] = 0.0 if known > 0 else load[d]
        unforeseen = unforeseen or flow.rest_D[d] > 0
        flow.local_D[d] *= scale
        flow.near_sent_D[d] = near * scale
        flow.far_sent_D[d] = far * scale
        sent_N[node_D[d]] += near * scale
        far_sent += far * scale
    for n in range(nodes):
        served_N[n] = sent_N[n] / served_N[n] if served_N[n] > 0 else 0.0
    far_scale = far_sent / far_served if far_served > 0 else 0.0
    for d in range(len(load)):
        flow.near_served_D[d] *= served_N[node_D[d]]
        flow.far_served_D[d] *= far_scale
    return unforeseen


@loop
def _even_quota(where: np.ndarray, load: np.ndarray, topology: TopologyNumbers, flow: ExpertFlow) -> None:
    """Fill `quota_D` as `hecate.parallel.cost.cost_loops.even_quota_into` does, for one expert."""
    nodes, node_D = len(topology.uplink_N), topology.node_D
    rest_N, copies_N = flow.sent_N, flow.served_N
    for n in range(nodes):
        rest_N[n] = 0.0
        copies_N[n] = 0.0
    copies, far = 0.0, 0.0
    for d in range(len(load)):
        if where[d]:
            copies_N[node_D[d]] += 1.0
            copies += 1.0
        else:
            rest_N[node_D[d]] += load[d]
    for n in range(nodes):
        if copies_N[n] > 0:
            rest_N[n] /= copies_N[n]
        else:
            far += rest_N[n]
    far /= copies
    for d in range(len(load)):
        flow.quota_D[d] = load[d] + rest_N[node_D[d]] + far if where[d] else 0.0


@loop
def _add(flow: ExpertFlow, traffic: np.ndarray) -> None:
    for d in range(len(flow.local_D)):
        traffic[NEAR_OUT, d] += flow.near_sent_D[d]
        traffic[NEAR_IN, d] += flow.near_served_D[d]
        traffic[FAR_OUT, d] += flow.far_sent_D[d]
        traffic[FAR_IN, d] += flow.far_served_D[d]
        traffic[LOCAL, d] += flow.local_D[d]
        traffic[SERVED, d] += flow.local_D[d] + flow.near_served_D[d] + flow.far_served_D[d]


@entry
def executed_traffic(
    where_LED: np.ndarray, quota_LED: np.ndarray, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: TopologyNumbers,
    traffic_LXD: np.ndarray,
) -> None:  # fmt: skip
    """Fill `traffic_LXD` [layers, 7, ranks], zeros, by `add_traffic`; quotas and planned loads may be [layers, 0, 0]."""
    flow = no_flow(len(topology.node_D), len(topology.uplink_N))
    for layer in range(len(loads_LED)):
        add_traffic(where_LED[layer], quota_LED[layer], planned_LED[layer], loads_LED[layer], topology, flow, traffic_LXD[layer])
