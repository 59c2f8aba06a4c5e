"""How long the ranks of a layer wait for a plan of `auto`, by sizes alone: all ranks must choose between the ways to plan alike."""

from __future__ import annotations

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import PlanMode

_SECONDS: dict[PlanMode, tuple[float, float]] = {
    "history": (0.0, 0.0),
    "calibrated": (2.0e-4, 9.0e-8),
    "exact": (1.0e-4, 3.6e-8),
    "replay": (1.0e-4, 3.6e-8),
}
"""for a layer, and for each of its experts times ranks (`benchmarks.planner`, benchmarks/results/planner.json)"""


def planning_seconds(mode: PlanMode, experts: int, topology: Topology) -> float:
    """Seconds of one layer in each micro-step, in which its ranks do nothing else.

    History's plan counts nothing: it is made while the backward pass of the step before runs (`hecate.engine.plans_ahead`).
    """
    layer, each = _SECONDS[mode]
    return topology.planning_slowdown * (layer + each * experts * topology.world_size)


def judging_seconds(experts: int, topology: Topology) -> float:
    """Seconds in which one layer is planned again in all ways, as choosing among them does after each step."""
    return planning_seconds("calibrated", experts, topology) + 3 * planning_seconds("exact", experts, topology)
