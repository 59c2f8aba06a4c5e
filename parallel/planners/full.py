"""Everything everywhere: no token travels, every expert does (what FSDP does with a layer)."""

import numpy as np

from hecate.parallel.planners.plan import Plan, PlanInput, Planner


def plan_full(given: PlanInput) -> Plan:
    """Every expert on every rank, whatever memory that takes."""
    return Plan(given.owner_LE, np.ones((given.num_layers, given.num_experts, given.world_size), dtype=bool))


def plan_with(planner: Planner, given: PlanInput) -> Plan:
    """What all layers go by under a policy: its plan, or everything everywhere where that must be (`LayerCost.on_every_rank`)."""
    return plan_full(given) if given.cost.on_every_rank else planner(given)
