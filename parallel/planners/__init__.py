"""Placement policies by name. Each is a pure function in its own file (`policies`); none needs torch.

A run that trains under a policy named after another system takes that system's placements and quotas. A simulation of it (`ROWS`) also
divides tokens among replicas, and moves experts, as that system does; there `NAME+ours` is the policy as a run trains under it.
"""

from hecate.io.registry import registered
from hecate.parallel.planners.plan import Collective, LayerPlan, Plan, PlanInput, Planner, Policy
from hecate.parallel.planners.policies.full import plan_with
from hecate.parallel.planners.rivals.source_split import with_our_split
from hecate.parallel.values.policy_names import POLICY_ORDER

_FOUND: dict[str, Policy] = registered("hecate.parallel.planners.policies", "POLICY", POLICY_ORDER)
POLICIES: dict[str, Planner] = {name: with_our_split(one.plan) if one.own_split else one.plan for name, one in _FOUND.items()}
COLLECTIVES: dict[str, Collective] = {name: one.collective for name, one in _FOUND.items() if one.collective}
"""how experts travel in the systems whose collectives differ from this project's"""
_AS_PUBLISHED = {name: one.plan for name, one in _FOUND.items() if one.own_split}
"""the policies whose systems divide tokens among replicas in their own way, with that way"""
WITH_OURS: dict[str, Planner] = {f"{name}+ours": POLICIES[name] for name in _AS_PUBLISHED}
"""the policies of other systems with this project's split and collectives, as they train"""
ROWS: dict[str, Planner] = POLICIES | _AS_PUBLISHED | WITH_OURS
"""the policies that a simulation can compare"""


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
]
