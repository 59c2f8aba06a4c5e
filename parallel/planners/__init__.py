"""Placement policies by name. Each is a pure function in its own file; none needs torch.

A run that trains under a policy named after another system takes that system's placements and quotas. A simulation of it (`ROWS`) also
divides tokens among replicas, and moves experts, as that system does; there `NAME+ours` is the policy as a run trains under it.
"""

from dataclasses import replace
from typing import Literal

from hecate.parallel.cost.cost_model import Priced
from hecate.parallel.planners.auto import plan_auto
from hecate.parallel.planners.full import plan_full, plan_with
from hecate.parallel.planners.hecate_paper import plan_hecate_paper
from hecate.parallel.planners.plan import LayerPlan, Plan, PlanInput, Planner
from hecate.parallel.planners.rivals.echo import plan_echo
from hecate.parallel.planners.rivals.eplb import plan_eplb
from hecate.parallel.planners.rivals.fastermoe import plan_fastermoe
from hecate.parallel.planners.rivals.flexmoe import plan_flexmoe
from hecate.parallel.planners.rivals.laer import plan_laer
from hecate.parallel.planners.rivals.llep import plan_llep
from hecate.parallel.planners.rivals.moonep import plan_moonep
from hecate.parallel.planners.rivals.sharded_gather import with_sharded_gather
from hecate.parallel.planners.rivals.smartmoe import plan_smartmoe
from hecate.parallel.planners.rivals.source_split import with_our_split
from hecate.parallel.planners.rivals.ultraep import plan_ultraep
from hecate.parallel.planners.static_ep import plan_static_ep

Collective = Literal["flat", "sharded"]
"""how experts travel in other systems: each owner sends to each replica, or every rank a part of each (`sharded_gather`)"""

POLICIES: dict[str, Planner] = {
    "static_ep": plan_static_ep,
    "full": plan_full,
    "fastermoe": plan_fastermoe,
    "smartmoe": plan_smartmoe,
    "flexmoe": with_our_split(plan_flexmoe),
    "eplb": with_our_split(plan_eplb),
    "llep": with_our_split(plan_llep),
    "echo": with_our_split(plan_echo),
    "laer": with_our_split(plan_laer),
    "ultraep": plan_ultraep,
    "moonep": with_our_split(plan_moonep),
    "hecate_paper": plan_hecate_paper,
    "auto": plan_auto,
}

COLLECTIVES: dict[str, Collective] = {"laer": "sharded", "llep": "flat", "moonep": "flat"}
"""how experts travel in the systems whose collectives differ from this project's, which takes the fastest of its routes: LLEP's owners send
their experts to each rank, MoonEP's ranks read them where they lie, LAER-MoE restores them from parts"""
_AS_PUBLISHED: dict[str, Planner] = {
    "flexmoe": plan_flexmoe,
    "eplb": plan_eplb,
    "llep": plan_llep,
    "echo": plan_echo,
    "laer": plan_laer,
    "moonep": plan_moonep,
}
"""the policies whose systems divide tokens among replicas in their own way, with that way"""
WITH_OURS: dict[str, Planner] = {f"{name}+ours": POLICIES[name] for name in _AS_PUBLISHED}
"""the policies of other systems with this project's split and collectives, as they train"""
ROWS: dict[str, Planner] = POLICIES | _AS_PUBLISHED | WITH_OURS
"""the policies that a simulation can compare"""


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
