"""What a planner is given and what it returns, for all layers of one shape at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.after_router_loops import seconds_after_router
from hecate.parallel.cost.cost_loops import SERVED, TRAFFIC_ROWS
from hecate.parallel.cost.cost_model import (
    HISTORY,
    ExecutionMode,
    LayerCost,
    LayerSeconds,
    Priced,
    contiguous,
    cost_numbers,
    price_traffic,
    topology_numbers,
)
from hecate.parallel.cost.flow_loops import executed_traffic
from hecate.parallel.cost.flows import nothing_travels, token_split
from hecate.parallel.cost.route_loops import FASTEST
from hecate.parallel.loops.replica_lists import room_for_plans
from hecate.parallel.values.placement import Placement


def check_loads(loads: np.ndarray, shape: tuple[int, ...]) -> None:
    """Check loads, [..., experts, source ranks]: counts of assignments (see `hecate.parallel.values.loads`).

    Raises:
        UserError: they are of another shape, negative or not finite.
    """
    if loads.shape != shape:
        raise UserError(f"loads must be [..., experts, source ranks] of shape {shape}, got {loads.shape}")
    if loads.size and not (loads.min() >= 0 and loads.max() < np.inf):  # neither holds of NaN
        raise UserError(f"loads must be finite and >= 0, got numbers from {loads.min()} to {loads.max()}")


@dataclass(frozen=True, eq=False)
class PlanInput:
    """Everything a plan depends on. The same on every rank, so that the plan is, too, without a message.

    Shapes: L layers, E experts, S = D ranks as sources and as destinations.

    Raises:
        UserError: loads or slots are of another shape, negative or not finite.
    """

    owner_LE: np.ndarray
    """int64 [layers, experts]: the owner of each expert"""
    loads_LED: np.ndarray | None
    """float64 [layers, experts, source ranks]: assignments, predicted or exact; None before the first iteration"""
    topology: Topology
    cost: LayerCost
    slots_D: np.ndarray
    """int64 [ranks]: replicas of other ranks' experts that each device has room for, in each layer"""
    resident_LED: np.ndarray | None = None
    """bool [layers, experts, ranks]: the frozen parts that ranks hold already; None: only the owners'"""
    max_imbalance: float | None = None
    """largest over mean expert compute of the ranks that a plan keeps to, where its planner can; None: whatever is fastest"""
    execution: ExecutionMode = HISTORY
    """how the plan will be executed"""
    present_LED: np.ndarray | None = None
    """bool [layers, experts, ranks]: the replicas of the last plan, from which some policies go on; None: nothing is known of it"""
    waited_for: bool = False
    """whether ranks wait for the plan, as after a layer's router"""

    def __post_init__(self) -> None:
        layers, experts = self.owner_LE.shape
        if self.slots_D.shape != (self.world_size,) or self.slots_D.min() < 0:
            raise UserError(f"slots_D must be {self.world_size} numbers >= 0, one a device, got {self.slots_D}")
        if self.loads_LED is not None:
            check_loads(self.loads_LED, (layers, experts, self.world_size))

    @property
    def num_layers(self) -> int:
        return self.owner_LE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.owner_LE.shape[1]

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def expected_LED(self) -> np.ndarray:
        """float64 [layers, experts, source ranks]: the loads, or ones before any are known."""
        if self.loads_LED is None:
            return np.ones((self.num_layers, self.num_experts, self.world_size))
        return self.loads_LED

    @cached_property
    def tokens_LSE(self) -> np.ndarray:
        """float64 [layers, source ranks, experts]: the same for compiled loops, which read a source's loads one after the other"""
        return np.ascontiguousarray(self.expected_LED.swapaxes(1, 2), dtype=np.float64)

    @property
    def owned_LED(self) -> np.ndarray:
        """bool [layers, experts, ranks]"""
        return self.owner_LE[..., None] == np.arange(self.world_size)


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the experts of each layer are in this step, and who serves how many of their assignments."""

    owner_LE: np.ndarray
    """int64 [layers, experts]; equal to the input's, because only re-sharding changes owners"""
    where_LED: np.ndarray
    """bool [layers, experts, ranks]: which ranks have a replica of an expert; the owner always has"""
    quota_LED: np.ndarray | None = field(default=None)
    """float64 [layers, experts, ranks]: assignments served at each replica, summing to the expert's load; None: topology-aware dispatch"""

    def placement(self, layer: int) -> Placement:
        return Placement(self.owner_LE[layer].copy(), self.where_LED[layer].copy())

    def layer(self, given: PlanInput, index: int) -> LayerPlan:
        """One layer's part of this plan of `given`; `index` is the layer's place in both."""
        return LayerPlan(self.placement(index), given.expected_LED[index], None if self.quota_LED is None else self.quota_LED[index])

    def traffic(self, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: Topology) -> np.ndarray:
        """float64 [layers, 7, ranks]: what each rank sends and serves of these loads (see `price_layers`).

        Args:
            planned_LED: float64 [layers, experts, source ranks]: the loads that the plan was made for.
            loads_LED: float64 [layers, experts, source ranks]: the loads that came.
        """
        return _quota_traffic(self.where_LED, self.quota_LED, planned_LED, loads_LED, topology)

    def seconds(self, given: PlanInput) -> LayerSeconds:
        """The predicted seconds of the plan under the loads that it was made for, executed as `given.execution` says."""
        return self.price(given).seconds

    def price(self, given: PlanInput) -> Priced:
        """The same, and what travels."""
        loads_LED, topology = given.expected_LED, given.topology
        return price_traffic(
            self.owner_LE,
            self.where_LED,
            self.traffic(loads_LED, loads_LED, topology),
            topology,
            given.cost,
            execution=given.execution,
            resident_ED=given.resident_LED,
        )


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's part of a plan, and the loads it was made for."""

    placement: Placement
    loads_ED: np.ndarray
    """float64 [experts, source ranks]: the loads that the layer was planned from"""
    quota_ED: np.ndarray | None
    """see `Plan.quota_LED`"""

    def dispatches(self, topology: Topology) -> bool:
        """Whether a token may have to leave its rank."""
        return not nothing_travels(self.placement.where_ED, self.loads_ED, self.quota_ED, topology)

    def split(self, topology: Topology, source: int) -> np.ndarray:
        """float64 [experts, ranks]: see `token_split`."""
        return token_split(self.placement.where_ED, self.loads_ED, self.quota_ED, topology, source)

    def traffic(self, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
        """float64 [7, ranks]: what each rank sends and serves of these loads, which may be others than the plan was made for."""
        quota_LED = None if self.quota_ED is None else self.quota_ED[None]
        return _quota_traffic(self.placement.where_ED[None], quota_LED, self.loads_ED[None], loads_ED[None], topology)[0]

    def served(self, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
        """float64 [ranks]: number of assignments that each rank serves under these loads."""
        return self.traffic(loads_ED, topology)[SERVED]

    def seconds_from_router(self, given: PlanInput, present_ED: np.ndarray, enough: float = np.inf) -> float:
        """Seconds of a micro-step from the layer's router on, and of the gather of what the plan needs besides what is present.

        Args:
            given: this layer alone, under its true loads.
            present_ED: bool [experts, ranks]: replicas that have been gathered.
            enough: where it takes so many seconds, they need not be exact, only be as many.
        """
        where_ED, loads_ED = self.placement.where_ED, given.expected_LED[0]
        cost = cost_numbers(given.cost, given.topology, given.execution)
        none_ED, shape = np.zeros((0, 0)), where_ED.shape
        fresh = self.quota_ED is None or np.array_equal(self.loads_ED, loads_ED)
        return seconds_after_router(
            contiguous(given.owner_LE[0], shape[:1], np.int64),
            contiguous(where_ED, shape, np.bool_),
            contiguous(present_ED, shape, np.bool_),
            np.zeros((0, 0), np.bool_) if given.resident_LED is None else contiguous(given.resident_LED[0], shape, np.bool_),
            none_ED if self.quota_ED is None else contiguous(self.quota_ED, shape, np.float64),
            none_ED if fresh else contiguous(self.loads_ED, shape, np.float64),
            none_ED if fresh else contiguous(loads_ED, shape, np.float64),
            given.tokens_LSE[0],
            topology_numbers(given.topology),
            cost._replace(frozen_bytes=0.0),
            cost._replace(fetched_share=1.0, route=FASTEST),  # a frozen part that comes now is paid now
            room_for_plans(*shape)[0],
            enough,
        )


Planner = Callable[[PlanInput], Plan]
"""A pure function: the same input gives the same plan, and ties are broken by index."""
Collective = Literal["flat", "sharded"]
"""how experts travel in other systems: each owner sends to each replica, or every rank a part of each (`sharded_gather`)"""


@dataclass(frozen=True)
class Policy:
    """A placement policy, as its file in `hecate.parallel.planners.policies` says it."""

    plan: Planner
    own_split: bool = False
    """whether its system divides tokens among replicas in a way of its own, which plans then have and only a simulation carries out"""
    collective: Collective | None = None
    """how experts travel in its system; None: as in this project, by the fastest of its routes"""


def _quota_traffic(
    where_LED: np.ndarray, quota_LED: np.ndarray | None, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: Topology
) -> np.ndarray:
    """float64 [layers, 7, ranks], where a rank serves its own assignments first, then its node's, then the others'."""
    shape, none_LED = where_LED.shape, np.zeros((len(loads_LED), 0, 0))
    traffic_LXD = np.zeros((len(loads_LED), TRAFFIC_ROWS, topology.world_size))
    fresh = planned_LED is loads_LED or np.array_equal(planned_LED, loads_LED)
    executed_traffic(
        contiguous(where_LED, shape, np.bool_),
        none_LED if quota_LED is None else contiguous(quota_LED, shape, np.float64),
        none_LED if fresh else contiguous(planned_LED, shape, np.float64),
        contiguous(loads_LED, shape, np.float64),
        topology_numbers(topology),
        traffic_LXD,
    )
    return traffic_LXD
