"""Placement policies by name. Each is a pure function in its own file; none needs torch."""

from hecate.parallel.planners.auto import plan_auto
from hecate.parallel.planners.echo import plan_echo
from hecate.parallel.planners.eplb import plan_eplb
from hecate.parallel.planners.fastermoe import plan_fastermoe
from hecate.parallel.planners.flexmoe import plan_flexmoe
from hecate.parallel.planners.full import plan_full, plan_with
from hecate.parallel.planners.hecate_paper import plan_hecate_paper
from hecate.parallel.planners.laer import plan_laer
from hecate.parallel.planners.llep import plan_llep
from hecate.parallel.planners.moonep import plan_moonep
from hecate.parallel.planners.plan import Plan, PlanInput, Planner
from hecate.parallel.planners.smartmoe import plan_smartmoe
from hecate.parallel.planners.static_ep import plan_static_ep
from hecate.parallel.planners.ultraep import plan_ultraep

POLICIES: dict[str, Planner] = {
    "static_ep": plan_static_ep,
    "full": plan_full,
    "fastermoe": plan_fastermoe,
    "smartmoe": plan_smartmoe,
    "flexmoe": plan_flexmoe,
    "eplb": plan_eplb,
    "llep": plan_llep,
    "echo": plan_echo,
    "laer": plan_laer,
    "ultraep": plan_ultraep,
    "moonep": plan_moonep,
    "hecate_paper": plan_hecate_paper,
    "auto": plan_auto,
}

__all__ = ["POLICIES", "Plan", "PlanInput", "Planner", "plan_with"]
