"""What the compiled loops of the cost model read of a topology and of a layer's cost, and how long one exchange between ranks takes.

Shapes: D ranks, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hecate.parallel.loops.array_loops import total
from hecate.parallel.loops.jit import loop

NEAR_OUT, NEAR_IN, FAR_OUT, FAR_IN = range(4)
"""rows of an array [4, ranks]: traffic through each rank's ports inside its node, and to and from other nodes"""


class TopologyNumbers(NamedTuple):
    """A topology as arrays."""

    node_D: np.ndarray
    member_D: np.ndarray
    """the ranks, sorted by node"""
    first_N: np.ndarray
    """the place in `member_D` where each node's ranks begin; and at the end the number of ranks"""
    rate_D: np.ndarray
    port_D: np.ndarray
    nic_D: np.ndarray
    memory_rate_D: np.ndarray
    uplink_N: np.ndarray
    near_latency: float
    far_latency: float
    exchange_latency: float
    latency_to_all: float
    slowdown: float


class CostNumbers(NamedTuple):
    """A layer's cost, and how it is executed, as numbers."""

    trainable_bytes: float
    reduced_bytes: float
    frozen_bytes: float
    fetched_share: float
    """the share of a replica's steps in which its frozen part travels: 1 over its lifetime"""
    optimizer_bytes: float
    top_k: int
    row_bytes: float
    row_work: float
    assignment_work: float
    dispatch_messages: float
    """the number of all-to-alls of the layer's tokens, whose latencies are paid"""
    hides_gather: float
    """the seconds of work beside which the forward pass's gather travels"""
    hides_reduce: float
    """the seconds of work beside which gradients travel back"""
    hides_second_gather: bool
    """whether the gather before the backward pass travels beside the work that hides gradients, too"""
    second_gathers: int
    """the number of gathers before the backward pass: 1 where replicas were freed after the forward pass"""
    route: int
    """the route of gather and reduction: FLAT, TWO_LEVEL, SLICED or FASTEST"""
    chunk_numel: int
    """the elements of an expert's trainable parameters, which can be cut into as many equal slices as divide this number"""
    message_share: float
    """the share of the latency of a flat gather that is paid: other units of the decoder layer pay the rest of their common message"""


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
