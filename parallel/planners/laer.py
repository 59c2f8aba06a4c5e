"""Replicas re-laid out in every iteration (LAER-MoE, ASPLOS 26)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.flows import flows, node_index
from hecate.parallel.planners.expert_packing import even_split_in_node, pack_copies, spare_copies, spare_slots
from hecate.parallel.planners.plan import Plan, PlanInput


def plan_laer(given: PlanInput) -> Plan:
    """Two candidates for the numbers of replicas, laid out alike; each layer takes the cheaper by LAER-MoE's own cost.

    Numbers: as even as can be, the hottest first; or one by one to the highest load per replica, from one in each node if there are
    slots for that, else from one. Replicas go by load to the node with the fewest of the expert, then to the least-loaded device.
    Assignments are split evenly over the replicas in their own node, else over all. The cost sums the devices' communication, where the
    slowest would decide, assumes that all devices are equally fast, and leaves out the transfer of the replicas.
    """
    loads_LED, node_D = given.expected_LED, node_index(given.topology)
    load_LE = loads_LED.sum(-1)
    candidates = []
    for copies_LE in (_even_numbers(given, load_LE), _numbers_by_load(given, load_LE)):
        where_LED = pack_copies(load_LE, copies_LE, given.owner_LE, given.slots_D, node_B=node_D)
        quota_LED = even_split_in_node(where_LED, loads_LED, given.topology)
        candidates.append((where_LED, quota_LED, _cost(given, loads_LED, quota_LED)))
    (even_LED, even_quota_LED, even_cost_L), (by_load_LED, by_load_quota_LED, by_load_cost_L) = candidates
    by_load = (by_load_cost_L < even_cost_L)[:, None, None]
    where_LED = np.where(by_load, by_load_LED, even_LED) | given.owned_LED
    return Plan(given.owner_LE, where_LED, np.where(by_load, by_load_quota_LED, even_quota_LED))


def _even_numbers(given: PlanInput, load_LE: np.ndarray) -> np.ndarray:
    each, more = divmod(spare_slots(int(given.slots_D.sum())), given.num_experts)
    copies_LE = np.full(load_LE.shape, 1 + each, dtype=np.int64)
    np.put_along_axis(copies_LE, np.argsort(-load_LE, axis=1, kind="stable")[:, :more], 2 + each, axis=1)
    return np.minimum(copies_LE, given.world_size)


def _numbers_by_load(given: PlanInput, load_LE: np.ndarray) -> np.ndarray:
    spare, num_nodes = spare_slots(int(given.slots_D.sum())), given.topology.num_nodes
    in_each_node = given.num_experts * (num_nodes - 1)
    if in_each_node <= spare:
        return spare_copies(load_LE, spare - in_each_node, given.world_size, start=num_nodes)
    return spare_copies(load_LE, spare, given.world_size)


def _cost(given: PlanInput, loads_LED: np.ndarray, quota_LED: np.ndarray) -> np.ndarray:
    """float64 [layers], seconds: 4 · all devices' communication + the busiest one's computation."""
    cost, topology = given.cost, given.topology
    flow = flows(loads_LED, quota_LED, topology)
    near, far = flow.near_sent_ED.sum((-1, -2)), flow.far_sent_ED.sum((-1, -2))
    seconds = cost.row_bytes * (near / topology.intra_node.bandwidth + far / topology.inter_node.bandwidth)
    compute = cost.assignment_flops * (1 + cost.assignment_backward) / min(topology.flops)
    return np.asarray(4 * seconds + compute * quota_LED.sum(1).max(-1))
