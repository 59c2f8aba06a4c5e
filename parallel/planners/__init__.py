"""Placement policies by name. Each is a pure function in its own file (`policies`); none needs torch.

A run that trains under a policy named after another system takes that system's placements and quotas. A simulation of it (`ROWS`) also
divides tokens among replicas, and moves experts, as that system does; there `NAME+ours` is the policy as a run trains under it.
"""

from dataclasses import replace

from hecate.io.registry import registered
from hecate.parallel.cost.cost_model import Priced
from hecate.parallel.planners.plan import Collective, LayerPlan, Plan, PlanInput, Planner, Policy
from hecate.parallel.planners.policies.full import plan_with
from hecate.parallel.planners.rivals.sharded_gather import with_sharded_gather
from hecate.parallel.planners.rivals.source_split import with_our_split
from hecate.parallel.values.policy_names import POLICY_ORDER

_FOUND: dict[str, Policy] = registered("hecate.parallel.planners.policies", "POLICY", POLICY_ORDER)
POLICIES: dict[str, Planner] = {name: with_our_split(one.plan) if one.own_split else one.plan for name, one in _FOUND.items()}
COLLECTIVES: dict[str, Collective] = {name: one.collective for name, one in _FOUND.items() if one.collective}
"""how experts travel in the systems whose collectives differ from this project's"""
_AS_PUBLISHED = {name: one.plan for name, one in _FOUND.items() if one.own_split}
"""the policies whose systems divide tokens among replicas in their own way, with that way"""
WITH_OURS: dict[str, Planner] = {f"{name}+ours": POLICIES[name] for name in _AS_PUBLISHED}
"""the same with this project's split and collectives, as they train"""
ROWS: dict[str, Planner] = POLICIES | _AS_PUBLISHED | WITH_OURS
"""what a simulation can compare"""


def price_row(name: str, plan: Plan, given: PlanInput) -> Priced:
    """Price a plan of one of `ROWS`, made from `given`, with the collectives of its system. A route that is given holds for all systems."""
    collective = COLLECTIVES.get(name) if given.execution.route == "fastest" else None
    if collective == "flat":
        return plan.price(replace(given, execution=replace(given.execution, route="flat")))
    priced = plan.price(given)
    if collective == "sharded" and plan.quota_LED is not None:
        return with_sharded_gather(priced, plan.quota_LED > 0, given.topology, given.cost, given.execution)
    return priced


__all__ = [
    "COLLECTIVES",
    "POLICIES",
    "ROWS",
    "WITH_OURS",
    "Collective",
    "LayerPlan",
    "Plan",
    "PlanInput",
    "Planner",
    "plan_with",
    "price_row",
]
