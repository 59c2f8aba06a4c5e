"""Expert parallelism: no replicas, tokens travel."""

from hecate.parallel.placement import Placement, owners_only
from hecate.parallel.planners.plan import PlanInput


def plan_static_ep(given: PlanInput) -> Placement:
    """Every expert on its owner alone."""
    return owners_only(given.owner_E, given.topology.world_size)
