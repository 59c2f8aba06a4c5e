"""Shadowing of popular experts (FasterMoE, PPoPP 22)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.planners.plan import Plan, PlanInput, Policy


def plan_fastermoe(given: PlanInput) -> Plan:
    """The k hottest experts go to all ranks, with the k of the lowest latency among those that fit in the slots.

    latency(k) = 3·comp·B + 4·feat·B + k·model, with B the assignments on the busiest device once each rank computes its own of the k
    hottest, and the seconds of an assignment's forward pass, of a row and of an expert on the slowest device and link. FasterMoE counts up
    while the latency falls, with B the load of the hottest expert left. The load of the busiest device stays the same for some k, and
    stopping at these would make FasterMoE look worse than it is. FasterMoE assumes equal devices: B counts assignments, whatever the
    devices' rates.
    """
    loads_LED, cost, topology = given.expected_LED, given.cost, given.topology
    order_LE = np.argsort(-loads_LED.sum(-1), axis=1, kind="stable")
    sorted_LED = np.take_along_axis(loads_LED, order_LE[..., None], axis=1)
    owned_LED = np.take_along_axis(given.owned_LED, order_LE[..., None], axis=1)
    # Shadowing an expert takes its assignments off its owner and puts each rank's own on it.
    served_LED = owned_LED * sorted_LED.sum(-1, keepdims=True)
    served_LKD = np.zeros((given.num_layers, given.num_experts + 1, given.world_size))
    np.cumsum(sorted_LED - served_LED, axis=1, out=served_LKD[:, 1:])
    served_LKD += served_LED.sum(1, keepdims=True)
    busiest_LK = served_LKD.max(-1)
    compute = cost.assignment_flops * (1 + cost.assignment_backward) / min(topology.flops)
    bandwidth = topology.slowest_link.bandwidth
    backups = np.arange(given.num_experts + 1)
    latency_LK = (compute + 4 * cost.row_bytes / bandwidth) * busiest_LK + backups * cost.expert_bytes / bandwidth
    fits_LE = (np.cumsum(~owned_LED, axis=1) <= given.slots_D).all(-1)
    latency_LK[:, 1:][~fits_LE] = np.inf
    shadowed_LE = backups[:-1] < latency_LK.argmin(axis=1)[:, None]
    where_LED = given.owned_LED
    where_LED[np.arange(given.num_layers)[:, None], order_LE] |= shadowed_LE[..., None]
    return Plan(given.owner_LE, where_LED)


POLICY = Policy(plan_fastermoe)
