"""Everything everywhere: no token travels, every expert does (what FSDP does with a layer)."""

import numpy as np

from hecate.parallel.placement import Placement
from hecate.parallel.planners.plan import PlanInput


def plan_full(given: PlanInput) -> Placement:
    """Every expert on every rank, whatever memory that takes."""
    return Placement(given.owner_E.copy(), np.ones((len(given.owner_E), given.topology.world_size), dtype=bool))
