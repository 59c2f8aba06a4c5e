"""How assignments travel under a plan, in plain numpy: what the compiled loops are held to, for each expert where they have sums alone.

A plan splits each source's assignments of an expert into shares (`hecate.parallel.cost.flows.token_split`). When the step's true loads
differ from the predicted ones, the shares stay: `executed_flows`.

Shapes: ... any leading dimensions (layers), E experts, D ranks as destinations or sources, N nodes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import exposed_seconds
from hecate.parallel.cost.cost_model import (
    HISTORY,
    ExecutionMode,
    LayerCost,
    LayerSeconds,
    Priced,
    Rows,
    cost_numbers,
    price_missing,
    price_traffic,
)
from hecate.parallel.cost.flows import Flows, flows, node_index, node_membership
from hecate.parallel.planners import LayerPlan, Plan, PlanInput


def even_quota(where_ED: np.ndarray, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
    """Quotas of topology-aware dispatch (Hecate §3.3): an assignment stays on its rank where the expert is there; else it goes evenly over
    the replicas of the rank's node; else evenly over all replicas.

    Args:
        where_ED: bool [..., experts, ranks], each expert somewhere.
        loads_ED: float64 [..., experts, source ranks].

    Returns:
        float64 [..., experts, ranks].
    """
    member_DN = node_membership(topology)
    local_ED = np.where(where_ED, loads_ED, 0.0)
    rest_EN = (loads_ED - local_ED) @ member_DN
    copies_EN = where_ED @ member_DN
    within_EN = np.divide(rest_EN, copies_EN, out=np.zeros_like(rest_EN), where=copies_EN > 0)
    far_E = np.where(copies_EN > 0, 0.0, rest_EN).sum(-1) / copies_EN.sum(-1)
    return local_ED + np.where(where_ED, within_EN[..., node_index(topology)] + far_E[..., None], 0.0)


def quotas_of(plan: Plan, loads_LED: np.ndarray, topology: Topology) -> np.ndarray:
    """float64 [layers, experts, ranks]: a plan's quotas; those of topology-aware dispatch where it has none."""
    return even_quota(plan.where_LED, loads_LED, topology) if plan.quota_LED is None else plan.quota_LED


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


def flow_traffic(flow: Flows, loads_ED: np.ndarray) -> np.ndarray:
    """float64 [..., 7, ranks]: what each rank sends and serves (see `price_layers`)."""
    parts = flow.near_sent_ED, flow.near_served_ED, flow.far_sent_ED, flow.far_served_ED, flow.local_ED, served(flow), loads_ED
    return np.stack([part.sum(-2) for part in parts], axis=-2, dtype=np.float64)


def layer_seconds(
    owner_E: np.ndarray,
    where_ED: np.ndarray,
    quota_ED: np.ndarray,
    loads_ED: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    *,
    execution: ExecutionMode = HISTORY,
    flow: Flows | None = None,
    resident_ED: np.ndarray | None = None,
) -> LayerSeconds:
    """Predict one step of each layer.

    Args:
        owner_E: int64 [..., experts].
        where_ED: bool [..., experts, ranks].
        quota_ED: float64 [..., experts, ranks]: assignments served (see `hecate.parallel.cost.flows`).
        loads_ED: float64 [..., experts, source ranks]: assignments routed.
        flow: how the assignments travel; None: as `flows` matches them with the quotas.
        resident_ED: bool [..., experts, ranks]: frozen parts that are there already; None: only the owners'.
    """
    flow = flows(loads_ED, quota_ED, topology) if flow is None else flow
    return price_flow(owner_E, where_ED, flow, loads_ED, topology, cost, execution=execution, resident_ED=resident_ED).seconds


def price_flow(
    owner_E: np.ndarray,
    where_ED: np.ndarray,
    flow: Flows,
    loads_ED: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    *,
    execution: ExecutionMode = HISTORY,
    resident_ED: np.ndarray | None = None,
) -> Priced:
    """Predict one step of each layer, and what travels in it. For the arguments see `layer_seconds`."""
    return price_traffic(owner_E, where_ED, flow_traffic(flow, loads_ED), topology, cost, execution=execution, resident_ED=resident_ED)


def rows_served(flow: Flows, loads_ED: np.ndarray, cost: LayerCost, topology: Topology) -> Rows:
    """Distinct tokens behind the assignments of each layer."""
    owner_E, where_ED = np.zeros(loads_ED.shape[:-1], np.int64), np.ones(loads_ED.shape, np.bool_)
    return price_flow(owner_E, where_ED, flow, loads_ED, topology, cost).rows


def seconds_from_router(given: PlanInput, plan: LayerPlan, present_ED: np.ndarray) -> float:
    """As `LayerPlan.seconds_from_router`."""
    cost, loads_ED, topology = replace(given.cost, frozen_bytes=0.0), given.expected_LED[0], given.topology
    owner_E, where_ED = given.owner_LE[0], plan.placement.where_ED
    flow = executed_flows(where_ED, plan.quota_ED, plan.loads_ED, loads_ED, topology)
    seconds = price_flow(owner_E, where_ED, flow, loads_ED, topology, cost, execution=given.execution).seconds
    hides_gather = cost_numbers(cost, topology, given.execution).hides_gather
    hidden_before = exposed_seconds(hides_gather, float(seconds.gather), topology.overlap_slowdown)
    resident_ED = None if given.resident_LED is None else given.resident_LED[0]
    brought = price_missing(owner_E, present_ED, where_ED, topology, given.cost, resident_ED)
    return float(seconds.total - seconds.optimizer - hidden_before + brought.seconds.gather)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
