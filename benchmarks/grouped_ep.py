"""Expert parallelism in groups of ranks, as people run it beside sharding groups of data parallelism: what planners are compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hecate.apps.foresee.sharding_groups import ep_group_sizes, sum_over_groups
from hecate.parallel.cluster.mesh import hiding_flops, make_mesh
from hecate.parallel.plan.sharding import owned_bytes
from hecate.parallel.planners import PlanInput
from hecate.parallel.planners.policies.static_ep import plan_static_ep
from hecate.parallel.values.placement import contiguous_owners


def grouped_ep_seconds(given: PlanInput, layer: int) -> float:
    """Return the seconds of a layer under expert parallelism in groups of the fastest of `ep_group_sizes`, the sum of gradients included.

    Owners are those of expert parallelism. A size counts only if the experts that a rank owns beside those of one group of all ranks are
    no larger than the replicas for which it has slots.
    """
    topology, cost, loads_ED, experts = given.topology, given.cost, given.expected_LED[layer], given.num_experts
    room, found = float(given.slots_D.min()) * cost.replica_bytes, []
    for size in ep_group_sizes(topology, experts):
        mesh = make_mesh(topology.world_size, size)
        more = -(-experts // size) - -(-experts // topology.world_size)
        if more * (cost.trainable_bytes + owned_bytes(cost)) > room:
            continue
        owner_LE = contiguous_owners(experts, size)[None]
        groups = []
        for ranks in mesh.sharding_groups():
            part = topology.take(ranks)
            hiding = replace(cost, non_moe_flops=hiding_flops(cost.non_moe_flops, part, topology))
            of_group = PlanInput(owner_LE, loads_ED[None][..., ranks], part, hiding, np.zeros(size, np.int64), execution=given.execution)
            groups.append(float(plan_static_ep(of_group).seconds(of_group).total[0]))
        owned_D = np.tile(np.bincount(owner_LE[0], minlength=size) * cost.reduced_bytes, mesh.num_sharding_groups)
        found.append(max(groups) + sum_over_groups(owned_D, 1, topology, mesh)[0])
    return min(found, default=np.inf)
