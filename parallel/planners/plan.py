"""What a planner is given and what it returns, for one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hecate.parallel.cost_model import LayerCost
from hecate.parallel.placement import Placement
from hecate.parallel.topology import Topology


@dataclass(frozen=True, eq=False)
class PlanInput:
    """Everything a plan depends on. The same on every rank, so that the plan is, too, without a message."""

    owner_E: np.ndarray
    """int64 [experts]"""
    loads_SE: np.ndarray | None
    """float64 [source ranks, experts], predicted or exact; None before the first iteration"""
    topology: Topology
    cost: LayerCost
    memory_slots: int
    """replicas of other ranks' experts that a device has room for in this layer"""


Planner = Callable[[PlanInput], Placement]
"""A pure function: same input, same placement; ties by index."""
