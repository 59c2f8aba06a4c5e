"""Placement policies by name. Each is a pure function in its own file; none needs torch."""

from hecate.parallel.planners.full import plan_full
from hecate.parallel.planners.hecate import plan_hecate
from hecate.parallel.planners.plan import Plan, PlanInput, Planner
from hecate.parallel.planners.static_ep import plan_static_ep

POLICIES: dict[str, Planner] = {
    "static_ep": plan_static_ep,
    "full": plan_full,
    "hecate": plan_hecate,
}

__all__ = ["POLICIES", "Plan", "PlanInput", "Planner"]
