"""What a planner is given and what it returns, for all layers of one shape at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import TRAFFIC_ROWS
from hecate.parallel.cost.cost_model import (
    HISTORY,
    ExecutionMode,
    LayerCost,
    LayerSeconds,
    Priced,
    contiguous,
    flow_traffic,
    price,
    topology_numbers,
)
from hecate.parallel.cost.executed_flows import executed_flows
from hecate.parallel.cost.flow_loops import executed_traffic
from hecate.parallel.cost.flows import Flows, even_quota, flows
from hecate.parallel.planners.rivals.source_split import SourceSplit, flows_of_shares, stacked
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
    """int64 [layers, experts]"""
    loads_LED: np.ndarray | None
    """float64 [layers, experts, source ranks]: assignments, predicted or exact; None before the first iteration"""
    topology: Topology
    cost: LayerCost
    slots_D: np.ndarray
    """int64 [ranks]: replicas of other ranks' experts that each device has room for, in each layer"""
    resident_LED: np.ndarray | None = None
    """bool [layers, experts, ranks]: frozen parts that are there already; None: only the owners'"""
    max_imbalance: float | None = None
    """largest over mean expert compute of the ranks that a plan keeps to, where its planner can; None: whatever is fastest"""
    execution: ExecutionMode = HISTORY
    """how the plan will be executed"""
    present_LED: np.ndarray | None = None
    """bool [layers, experts, ranks]: replicas of the plan before, from which policies that change it go on; None: nothing is known of it"""

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
    """bool [layers, experts, ranks]: replicas, always one at the owner"""
    quota_LED: np.ndarray | None = field(default=None)
    """float64 [layers, experts, ranks]: assignments served at each replica, summing to the expert's load; None: topology-aware dispatch"""
    source_split: SourceSplit | None = None
    """the rule of another system by which each source divides its assignments, made for the same loads as the quotas, which it has and
    which it serves exactly under these loads; None: a rank serves its own first (`hecate.parallel.cost.flows`)"""

    def placement(self, layer: int) -> Placement:
        return Placement(self.owner_LE[layer].copy(), self.where_LED[layer].copy())

    def quotas(self, loads_LED: np.ndarray, topology: Topology) -> np.ndarray:
        """The quotas; computed by topology-aware dispatch where the plan has none."""
        return even_quota(self.where_LED, loads_LED, topology) if self.quota_LED is None else self.quota_LED

    def flow(self, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: Topology) -> Flows:
        """How the assignments of these loads, float64 [layers, experts, source ranks], travel under the plan, which was made for others."""
        if self.source_split is None or self.quota_LED is None:
            return executed_flows(self.where_LED, self.quota_LED, planned_LED, loads_LED, topology)
        layers = zip(self.where_LED, self.quota_LED, planned_LED, loads_LED, strict=True)
        return stacked(
            [
                flows_of_shares(self.source_split.of_layer(layer).shares(where_ED, quota_ED, planned_ED, topology), loads_ED, topology)
                for layer, (where_ED, quota_ED, planned_ED, loads_ED) in enumerate(layers)
            ]
        )

    def traffic(self, planned_LED: np.ndarray, loads_LED: np.ndarray, topology: Topology) -> np.ndarray:
        """float64 [layers, 7, ranks]: what each rank sends and serves of these loads (see `price_layers`), as `flow` says."""
        if self.source_split is not None and self.quota_LED is not None:
            return flow_traffic(self.flow(planned_LED, loads_LED, topology), loads_LED)
        traffic_LXD, shape = np.zeros((len(loads_LED), TRAFFIC_ROWS, topology.world_size)), self.where_LED.shape
        none_LED = np.zeros((shape[0], 0, 0))
        executed_traffic(
            contiguous(self.where_LED, shape, np.bool_),
            none_LED if self.quota_LED is None else contiguous(self.quota_LED, shape, np.float64),
            none_LED if planned_LED is loads_LED else contiguous(planned_LED, shape, np.float64),
            contiguous(loads_LED, shape, np.float64),
            topology_numbers(topology),
            traffic_LXD,
        )
        return traffic_LXD

    def seconds(self, given: PlanInput) -> LayerSeconds:
        """The predicted seconds of the plan under the loads that it was made for, executed as `given.execution` says."""
        return self.price(given).seconds

    def price(self, given: PlanInput) -> Priced:
        """The same, and what travels."""
        loads_LED, topology = given.expected_LED, given.topology
        if self.source_split is None:
            flow = flows(loads_LED, self.quotas(loads_LED, topology), topology)
        else:
            flow = self.flow(loads_LED, loads_LED, topology)
        return price(
            self.owner_LE,
            self.where_LED,
            flow,
            loads_LED,
            topology,
            given.cost,
            execution=given.execution,
            resident_ED=given.resident_LED,
        )


Planner = Callable[[PlanInput], Plan]
"""A pure function: the same input gives the same plan, and ties are broken by index."""


def with_our_split(planner: Planner) -> Planner:
    """The same placement and quotas, but a rank serves its own assignments first."""

    def planned(given: PlanInput) -> Plan:
        return replace(planner(given), source_split=None)

    return planned
