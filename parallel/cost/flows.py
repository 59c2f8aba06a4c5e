"""Who serves which token, and through which ports it travels. Tokens are counted as assignments (see `hecate.parallel.values.loads`).

A *quota* says how many assignments of an expert each rank serves. It decides whose those are: a rank serves its own first, then those of
its node, then the others', each in proportion. Sums are exact, and every rank computes its own row.

Shapes: ... any leading dimensions (layers), E experts, D ranks as destinations or sources, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hecate.parallel.cluster.topology import Topology


@dataclass(frozen=True, eq=False)
class Flows:
    """How the assignments of each expert travel, under given quotas."""

    local_ED: np.ndarray
    """the assignments that a rank serves of its own tokens"""
    near_sent_ED: np.ndarray
    """the assignments that leave a rank for another of its node"""
    near_served_ED: np.ndarray
    """the assignments that a rank serves for others of its node"""
    far_sent_ED: np.ndarray
    """the assignments that leave a rank for another node"""
    far_served_ED: np.ndarray
    """the assignments that a rank serves for other nodes"""


def flows(loads_ED: np.ndarray, quota_ED: np.ndarray, topology: Topology) -> Flows:
    """Match the assignments of all sources with the quotas of all ranks: own first, then the node's, then the rest."""
    local, load_E = np.minimum(loads_ED, quota_ED), loads_ED.sum(-1, keepdims=True)
    sent, served = _above_rounding(loads_ED - local, load_E), _above_rounding(quota_ED - local, load_E)
    if topology.num_nodes == 1:
        zero = np.zeros_like(local)
        return Flows(local, sent, served, zero, zero)
    member_DN, node_D = node_membership(topology), node_index(topology)
    sent_EN, served_EN = sent @ member_DN, served @ member_DN
    matched_EN = np.minimum(sent_EN, served_EN)
    far_sent = _above_rounding(sent - sent * _share(matched_EN, sent_EN)[..., node_D], load_E)
    far_served = _above_rounding(served - served * _share(matched_EN, served_EN)[..., node_D], load_E)
    return Flows(local, sent - far_sent, served - far_served, far_sent, far_served)


def token_split(
    where_ED: np.ndarray, loads_ED: np.ndarray | None, quota_ED: np.ndarray | None, topology: Topology, source: int
) -> np.ndarray:
    """Shares of `source`'s assignments of each expert that go to each rank.

    Args:
        where_ED: bool [experts, ranks].
        loads_ED: float64 [experts, source ranks], the loads that the quotas were made for; None with `quota_ED` None.
        quota_ED: float64 [experts, ranks], only where replicas are, each row summing to the expert's load; None: topology-aware dispatch.

    Returns:
        float64 [experts, ranks]; rows sum to 1. An expert of which the source was expected to have no assignment has the shares of
        topology-aware dispatch.
    """
    even_ED = _even_split(where_ED, topology, source)
    if quota_ED is None or loads_ED is None:
        return even_ED
    flow = flows(loads_ED, quota_ED, topology)
    near_D = topology.same_node()[source]
    planned_ED = flow.near_sent_ED[:, source, None] * _normalized(flow.near_served_ED * near_D)
    planned_ED += flow.far_sent_ED[:, source, None] * _normalized(flow.far_served_ED)
    planned_ED[:, source] += flow.local_ED[:, source]
    total_E = planned_ED.sum(1, keepdims=True)
    return np.where(total_E > 0, _normalized(planned_ED), even_ED)


def nothing_travels(where_ED: np.ndarray, loads_ED: np.ndarray | None, quota_ED: np.ndarray | None, topology: Topology) -> bool:
    """Whether `token_split` leaves every assignment on its source, so that ranks need not exchange how many tokens they send."""
    if not where_ED.all():
        return False
    if quota_ED is None or loads_ED is None:
        return True
    flow = flows(loads_ED, quota_ED, topology)
    return not (flow.near_sent_ED.any() or flow.far_sent_ED.any())


def node_membership(topology: Topology) -> np.ndarray:
    """float64 [ranks, nodes]: 1 where a rank is in a node."""
    return np.eye(topology.num_nodes)[node_index(topology)]


def node_index(topology: Topology) -> np.ndarray:
    """int64 [ranks]: the node of each rank."""
    return np.asarray(topology.node_of_rank)


def _even_split(where_ED: np.ndarray, topology: Topology, source: int) -> np.ndarray:
    near = np.zeros(where_ED.shape[1], dtype=bool)
    near[source] = True
    candidates = where_ED.copy()
    for reach in (topology.same_node()[source], near):  # the nearer reach, later, overrides the wider one
        within = where_ED & reach[None, :]
        candidates = np.where(within.any(axis=1, keepdims=True), within, candidates)
    return candidates / candidates.sum(axis=1, keepdims=True)


def _above_rounding(assignments_ED: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    # Whoever sees traffic counts a latency for it, which a trace left over by rounding must not cost.
    return np.where(assignments_ED > 1e-9 * load_E, assignments_ED, 0.0)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def _normalized(rows: np.ndarray) -> np.ndarray:
    return _share(rows, np.broadcast_to(rows.sum(-1, keepdims=True), rows.shape))
