"""What a plan does to loads it was not made for: the executed quotas.

A plan splits each source's assignments of an expert into shares (`hecate.parallel.cost.flows.token_split`). When the step's true loads
differ from the predicted ones, the shares stay. This module works that out for all sources at once, without a [sources, experts, ranks]
array.

Shapes: ... any leading dimensions (layers), E experts, D ranks as destinations or sources, N nodes.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.flows import Flows, even_quota, flows, node_index, node_membership


def executed_flows(
    where_ED: np.ndarray, quota_ED: np.ndarray | None, planned_ED: np.ndarray, loads_ED: np.ndarray, topology: Topology
) -> Flows:
    """How `loads_ED` travel when every source keeps to the shares of its assignments that the plan gave to each rank.

    A source of which the plan expected no assignment of an expert follows topology-aware dispatch with those it has.

    Args:
        where_ED: bool [..., experts, ranks].
        quota_ED: float64 [..., experts, ranks], made for `planned_ED`; None: topology-aware dispatch.
        planned_ED: float64 [..., experts, source ranks]: the loads that the quotas were made for.
        loads_ED: float64 [..., experts, source ranks]: the loads that came.
    """
    if quota_ED is None:
        return flows(loads_ED, even_quota(where_ED, loads_ED, topology), topology)
    member_DN, node_D = node_membership(topology), node_index(topology)
    plan = flows(planned_ED, quota_ED, topology)
    near_served_EN = plan.near_served_ED @ member_DN
    far_served_E = plan.far_served_ED.sum(-1, keepdims=True)
    near_sent_ED = np.where(near_served_EN[..., node_D] > 0, plan.near_sent_ED, 0.0)
    far_sent_ED = np.where(far_served_E > 0, plan.far_sent_ED, 0.0)
    known_ED = plan.local_ED + near_sent_ED + far_sent_ED
    scale_ED = _ratio(loads_ED, known_ED)

    near_sent_ED = near_sent_ED * scale_ED
    far_sent_ED = far_sent_ED * scale_ED
    near_scale_EN = _ratio(near_sent_ED @ member_DN, near_served_EN)
    executed = Flows(
        plan.local_ED * scale_ED,
        near_sent_ED,
        plan.near_served_ED * near_scale_EN[..., node_D],
        far_sent_ED,
        plan.far_served_ED * _ratio(far_sent_ED.sum(-1, keepdims=True), far_served_E),
    )
    unforeseen_ED = np.where(known_ED > 0, 0.0, loads_ED)
    if not unforeseen_ED.any():
        return executed
    even = flows(unforeseen_ED, even_quota(where_ED, unforeseen_ED, topology), topology)
    return Flows(
        executed.local_ED + even.local_ED,
        executed.near_sent_ED + even.near_sent_ED,
        executed.near_served_ED + even.near_served_ED,
        executed.far_sent_ED + even.far_sent_ED,
        executed.far_served_ED + even.far_served_ED,
    )


def served(flow: Flows) -> np.ndarray:
    """float64 [..., experts, ranks]: assignments that each rank serves."""
    return flow.local_ED + flow.near_served_ED + flow.far_served_ED


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
