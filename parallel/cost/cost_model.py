"""Predicts the seconds and bytes of one MoE layer in one training step. Planners decide by these, and the simulator reports them.

A plan is priced as it will be executed: `ExecutionMode` says what is gathered when, and what hides it. `hecate.parallel.cost.cost_loops`
has the arithmetic, for planners, simulator, lower bound and the choice of routes alike.

Shapes: ... any leading dimensions (layers), E experts, D ranks, N nodes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import DISPATCH_COLLECTIVES, TRAFFIC_ROWS, price_layers
from hecate.parallel.cost.cost_numbers import CostNumbers, TopologyNumbers
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.cost.route_loops import FASTEST, FLAT, SLICED, TWO_LEVEL, exchange_seconds
from hecate.parallel.loops.replica_lists import no_replicas

PlanMode = Literal["history", "calibrated", "exact", "replay"]
"""the loads that layers are planned from: those of past steps; these, but re-planned after the router if that pays; the micro-step's own,
counted after each router; the same, known before the micro-step begins"""
PlanChoice = PlanMode | Literal["auto"]
"""the mode of all layers; of auto and exact: in each step each layer goes by the mode of several that has been fastest
(`hecate.parallel.plan.measured_modes`)"""
Route = Literal["flat", "two_level", "sliced"]
"""how the replicas of a placement travel (see `hecate.parallel.transfer.routes`), simplest first"""
RouteChoice = Literal["fastest", "flat", "two_level", "sliced"]
"""always the same route, or for each placement the fastest"""
ROUTE_NUMBERS: dict[str, int] = {"flat": FLAT, "two_level": TWO_LEVEL, "sliced": SLICED, "fastest": FASTEST}
"""the numbers by which the compiled loops name routes"""


@dataclass(frozen=True)
class ExecutionMode:
    """How a plan will be executed, as far as its seconds depend on it.

    Raises:
        UserError: `prefetch` is negative, or there is no micro-step.
    """

    plan: PlanMode = "history"
    """exact: the plan is made after the router, when the attention that would hide its gather is over; replay: before the micro-step"""
    rematerialize: bool = False
    """whether replicas are freed after a layer's forward pass and gathered again before its backward pass"""
    prefetch: int = 1
    """how many decoder layers early a gather starts; 0: nothing hides it"""
    micro_steps: int = 1
    """the micro-steps of an optimizer step; without `per_micro_step` all of them share one gather and one reduction"""
    route: RouteChoice = "fastest"
    """the route of each gather of trainable parameters and of its reduction. fastest: for each placement the one that `plan_transfer`
    chooses. Frozen parts always travel flat"""

    def __post_init__(self) -> None:
        if self.prefetch < 0 or self.micro_steps < 1:
            raise UserError(f"prefetch must be >= 0 and micro_steps >= 1, got {self.prefetch} and {self.micro_steps}")

    @property
    def per_micro_step(self) -> bool:
        """Whether each micro-step gathers and reduces for itself."""
        return self.rematerialize or self.plan != "history"

    @property
    def knows_loads(self) -> bool:
        """Whether a plan is made from the loads that it will serve."""
        return self.plan in ("exact", "replay")

    @property
    def hides_gather(self) -> bool:
        """Whether attention hides the gather of the forward pass."""
        return self.plan != "exact" and self.prefetch > 0


HISTORY = ExecutionMode()


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The cost of a layer, from which planners plan together with its loads. Bytes are of one expert, FLOPs of one forward pass.

    Raises:
        UserError: a number is negative or not finite, or `top_k` or `frozen_lifetime` is less than 1.
    """

    trainable_bytes: float
    """the parameters of an expert that a SparseAllGather moves in every step"""
    chunk_numel: int = 1
    """the elements of an expert's chunk, which a sliced gather cuts into equal slices of whole elements; 1: it is never cut"""
    gradient_bytes: float | None = None
    """the gradients of an expert, which a SparseReduceScatter moves back; None: as `trainable_bytes`"""
    frozen_bytes: float = 0.0
    """the frozen part of an expert; a frozen replica never changes, so it moves once and stays as long as its placement does"""
    state_bytes: float = 0.0
    """the master parameters and moments of an expert, on its owner only: what re-sharding moves"""
    top_k: int = 1
    row_bytes: float = 0.0
    """a token's hidden row, one way"""
    row_flops: float = 0.0
    """the FLOPs for each distinct token on a rank, however many of its experts the rank serves: those of a base FFN that experts share"""
    assignment_flops: float = 0.0
    """the FLOPs for each assignment"""
    row_backward: float = 1.0
    """backward over forward FLOPs of a row; 1 for a frozen base, 2 for a trained one"""
    assignment_backward: float = 2.0
    """backward over forward FLOPs of an assignment"""
    non_moe_flops: float = 0.0
    """forward FLOPs of one rank's attention in one micro-step, which hides transfers"""
    non_moe_backward: float = 2.0
    """backward over forward FLOPs of the attention; 1 for frozen projections, 2 for trained ones"""
    hidden_from: int = 1
    """from this `ExecutionMode.prefetch` on, that work hides the forward pass's gather: 1 for experts after their layer's attention, 2 for
    those that the layer needs at its very beginning"""
    message_share: float = 1.0
    """the share of the latency of a flat gather that is paid: less than 1 where a decoder layer's units are gathered in one message"""
    frozen_lifetime: float = 20.0
    """the number of steps that a frozen replica is expected to be used; its transfer is paid once in this many steps"""
    on_every_rank: bool = False
    """whether a token's rank must have all experts of the layer, so that every policy puts all of them on every rank"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < np.inf:
                raise UserError(f"layer cost: {name} must be finite and not negative, got {value}")
        if min(self.top_k, self.frozen_lifetime, self.chunk_numel) < 1:
            raise UserError(
                "layer cost: top_k, chunk_numel and frozen_lifetime must be >= 1, "
                f"got {self.top_k}, {self.chunk_numel} and {self.frozen_lifetime}"
            )

    @property
    def reduced_bytes(self) -> float:
        return self.trainable_bytes if self.gradient_bytes is None else self.gradient_bytes

    @property
    def expert_bytes(self) -> float:
        """Bytes that one replica takes to gather in a step, with its frozen part spread over its lifetime."""
        return self.trainable_bytes + self.frozen_bytes / self.frozen_lifetime

    @property
    def replica_bytes(self) -> float:
        """Memory of one replica of another rank's expert: parameters, gradients, frozen part."""
        return self.trainable_bytes + self.reduced_bytes + self.frozen_bytes


@dataclass(frozen=True, eq=False)
class LayerSeconds:
    """Where the seconds of a layer go, float64 [...] each: forward and backward of one step."""

    compute: np.ndarray
    """the experts' computation, on the slowest rank"""
    dispatch: np.ndarray
    """all all-to-alls of tokens and their gradients"""
    gather: np.ndarray
    """the SparseAllGather, hidden or not"""
    reduce: np.ndarray
    """the SparseReduceScatter, hidden or not"""
    exposed: np.ndarray
    """what gather and reduce add to the step"""
    optimizer: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """What the layer adds to a step, its attention left out."""
        return self.compute + self.dispatch + self.exposed + self.optimizer


@dataclass(frozen=True, eq=False)
class Rows:
    """Distinct tokens: computed on each rank, and through its ports in one all-to-all."""

    computed_D: np.ndarray
    near: tuple[np.ndarray, np.ndarray]
    """the tokens sent to, and received from, other ranks of the node"""
    far: tuple[np.ndarray, np.ndarray]
    """the tokens sent to, and received from, other nodes"""


@dataclass(frozen=True, eq=False)
class Priced:
    """The seconds of each layer, and what they were counted from."""

    seconds: LayerSeconds
    rows: Rows
    gathered: PortBytes
    """replicas through each port, in all exchanges of a gather by the route that was priced"""
    gathered_frozen: PortBytes
    """replicas through each port whose frozen part is not resident; nothing if experts have none"""


def price_traffic(
    owner_E: np.ndarray,
    where_ED: np.ndarray,
    traffic_XD: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    *,
    execution: ExecutionMode = HISTORY,
    resident_ED: np.ndarray | None = None,
) -> Priced:
    """Predict one step of each layer, and what travels in it.

    Args:
        owner_E: int64 [..., experts].
        where_ED: bool [..., experts, ranks].
        traffic_XD: float64 [..., 7, ranks]: what each rank sends and serves (see `price_layers`).
        resident_ED: bool [..., experts, ranks]: frozen parts that are there already; None: only the owners'.
    """
    shape, (experts, ranks) = where_ED.shape[:-2], where_ED.shape[-2:]
    layers = int(np.prod(shape))
    parts_LX, rows_LXD, copies_LXD = np.empty((layers, 6)), np.empty((layers, 5, ranks)), np.empty((layers, 8, ranks))
    resident = np.zeros((layers, 0, 0), np.bool_) if resident_ED is None else contiguous(resident_ED, (layers, experts, ranks), np.bool_)
    price_layers(
        contiguous(owner_E, (layers, experts), np.int64),
        contiguous(where_ED, (layers, experts, ranks), np.bool_),
        resident,
        contiguous(traffic_XD, (layers, 7, ranks), np.float64),
        topology_numbers(topology),
        cost_numbers(cost, topology, execution),
        no_replicas(experts, ranks),
        parts_LX,
        rows_LXD,
        copies_LXD,
    )
    near_out, near_in, far_out, far_in, computed = (rows_LXD[:, x].reshape(*shape, ranks) for x in range(5))
    copies = [copies_LXD[:, x].reshape(*shape, ranks) for x in range(8)]
    return Priced(
        LayerSeconds(*(parts_LX[:, x].reshape(shape) for x in range(6))),
        Rows(computed, (near_out, near_in), (far_out, far_in)),
        PortBytes(*copies[:4]),
        PortBytes(*copies[4:]),
    )


def price_missing(
    owner_E: np.ndarray, present_ED: np.ndarray, better_ED: np.ndarray, topology: Topology, cost: LayerCost, resident_ED: np.ndarray | None
) -> Priced:
    """The price of the gather of what a better plan needs besides.

    Args:
        owner_E: int64 [..., experts].
        present_ED: bool [..., experts, ranks]: replicas that have been gathered.
        better_ED: bool [..., experts, ranks]: replicas of the better plan.
        resident_ED: bool [..., experts, ranks]: frozen parts that are there; None: only the owners'.
    """
    where_ED = (better_ED & ~present_ED) | (owner_E[..., None] == np.arange(topology.world_size))
    nothing_XD = np.zeros((*better_ED.shape[:-2], TRAFFIC_ROWS, topology.world_size))
    # A frozen part that comes now is paid now.
    return price_traffic(owner_E, where_ED, nothing_XD, topology, replace(cost, frozen_lifetime=1.0), resident_ED=resident_ED)


def contiguous(values: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array for compiled loops; one that lay otherwise, or could not be written, would be compiled for anew."""
    array: np.ndarray = np.ascontiguousarray(values, dtype=dtype).reshape(shape)
    return array if array.flags.writeable else array.copy()


@lru_cache(maxsize=64)
def topology_numbers(topology: Topology) -> TopologyNumbers:
    """A topology for the loops, which do not change it."""
    node_D = np.asarray(topology.node_of_rank, dtype=np.int64)
    return TopologyNumbers(
        node_D,
        np.argsort(node_D, kind="stable"),
        np.concatenate([[0], np.cumsum(np.bincount(node_D))]),
        np.asarray(topology.flops, dtype=np.float64),
        np.asarray(topology.port_bandwidth, dtype=np.float64),
        np.asarray(topology.nic_bandwidth, dtype=np.float64),
        np.asarray(topology.memory_bandwidth, dtype=np.float64),
        np.asarray(topology.uplink_bandwidth, dtype=np.float64),
        float(topology.intra_node.latency),
        float(topology.inter_node.latency),
        float(topology.exchange_latency),
        float(topology.latency_to_all),
        float(topology.overlap_slowdown),
    )


def cost_numbers(cost: LayerCost, topology: Topology, execution: ExecutionMode) -> CostNumbers:
    """A layer's cost, and how it is executed, for the loops."""
    attention = float(cost.non_moe_flops / min(topology.flops))
    return CostNumbers(
        float(cost.trainable_bytes),
        float(cost.reduced_bytes),
        float(cost.frozen_bytes),
        float(1 / cost.frozen_lifetime),
        float(cost.reduced_bytes + 2 * cost.state_bytes),
        int(cost.top_k),
        float(cost.row_bytes),
        float(cost.row_flops * (1 + cost.row_backward)),
        float(cost.assignment_flops * (1 + cost.assignment_backward)),
        float(DISPATCH_COLLECTIVES * (1 if execution.per_micro_step else execution.micro_steps)),
        attention if execution.hides_gather and execution.prefetch >= cost.hidden_from else 0.0,
        float(cost.non_moe_backward * attention),
        execution.prefetch > 0,
        int(execution.rematerialize),
        ROUTE_NUMBERS[execution.route],
        int(cost.chunk_numel),
        float(cost.message_share),
    )


def busiest_port_seconds(ports: PortBytes, unit_bytes: float, topology: Topology) -> np.ndarray:
    """Seconds [...] until the busiest port is done, without latency; traffic counted in units of `unit_bytes`."""
    return _exchanges(ports, topology)[..., 0] * unit_bytes


def transfer_seconds(ports: PortBytes, unit_bytes: float, topology: Topology) -> np.ndarray:
    """Seconds [...] of one exchange of chunks, latency included; traffic counted in units of `unit_bytes`."""
    seconds = _exchanges(ports, topology)
    return seconds[..., 0] * unit_bytes + seconds[..., 1]


def _exchanges(ports: PortBytes, topology: Topology) -> np.ndarray:
    """float64 [..., 2]: seconds of a unit through the busiest port, and latency."""
    traffic = np.stack([ports.near_out_D, ports.near_in_D, ports.far_out_D, ports.far_in_D], axis=-2, dtype=np.float64)
    shape = traffic.shape[:-2]
    seconds_XP = np.empty((int(np.prod(shape)), 2))
    exchange_seconds(np.ascontiguousarray(traffic).reshape(-1, 4, topology.world_size), topology_numbers(topology), seconds_XP)
    return seconds_XP.reshape(*shape, 2)


def overlap_degree(cost: LayerCost, topology: Topology) -> int:
    """How many experts can travel to a rank hidden behind the non-MoE compute: t = T_nonMoE · bw / expert_bytes (Hecate §3.2).

    T is taken on the fastest device and bw on the slowest link, so that t never promises more than every rank can hide.
    Of experts without bytes any number travels.
    """
    seconds = cost.non_moe_flops / max(topology.flops)
    hidden = seconds - topology.slowest_link.latency
    if hidden <= 0:
        return 0
    if cost.expert_bytes == 0:
        return sys.maxsize
    return int(hidden * topology.slowest_link.bandwidth / cost.expert_bytes)
