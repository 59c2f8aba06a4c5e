"""The topology of a job as a value: its nodes and devices, their speed and memory, and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from hecate.errors import UserError


@dataclass(frozen=True)
class Link:
    """One direction of a link between two devices."""

    bandwidth: float
    """the bytes per second"""
    latency: float
    """the seconds before the first byte arrives"""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and np.isfinite(self.bandwidth)):
            raise UserError(f"link bandwidth must be a positive number of bytes/s, got {self.bandwidth}")
        if not (self.latency >= 0 and np.isfinite(self.latency)):
            raise UserError(f"link latency must be a non-negative number of seconds, got {self.latency}")


@dataclass(frozen=True)
class Topology:
    """The devices of a job, one per rank, grouped into nodes. Rank r uses device r; the ranks of a node need not be adjacent.

    Devices, nodes and links may all differ. Traffic inside a node is limited by the ports of the sending and the receiving rank;
    traffic between nodes by the NICs of the two ranks and the uplinks of the two nodes. The two directions do not limit each other.
    """

    node_of_rank: tuple[int, ...]
    """the node of each rank; nodes are numbered 0..N-1"""
    flops: tuple[float, ...]
    """the sustained FLOP/s of each rank's device in the training dtype"""
    memory: tuple[float, ...]
    """the bytes that each rank's device may use"""
    intra_node: Link
    inter_node: Link
    port_bandwidth: tuple[float, ...] = ()
    """the bytes/s of each rank inside its node; empty: the bandwidth of `intra_node`"""
    uplink_bandwidth: tuple[float, ...] = ()
    """the bytes/s of each node to other nodes, shared by its ranks; empty: the bandwidth of `inter_node`"""
    nic_bandwidth: tuple[float, ...] = ()
    """the bytes/s of each rank to other nodes; empty: the bandwidth of its node's uplink"""
    memory_bandwidth: tuple[float, ...] = ()
    """the bytes/s of each device's memory; empty: one byte per 150 FLOPs, as on the GPUs of the last ten years"""
    overlap_slowdown: float = 1.0
    """the factor by which computation and communication slow each other down while both run; 2: overlapping gains nothing"""
    planning_slowdown: float = 1.0
    """how many times as long the slowest host takes for a plan as the one of benchmarks/results/planner.json"""
    price_per_hour: tuple[float, ...] = ()
    """what each rank's device costs in an hour, in any currency; empty: not known"""
    card: tuple[str, ...] = ()
    """the name of each rank's GPU as the driver gives it, without "NVIDIA"; empty: CPUs, or not known"""
    measured: bool = False
    """whether `hecate profile` has measured the rates"""

    def __post_init__(self) -> None:
        world = len(self.node_of_rank)
        if world == 0:
            raise UserError("a topology needs at least one device")
        if len(self.flops) != world or len(self.memory) != world:
            raise UserError(f"topology: {world} ranks, but {len(self.flops)} rates and {len(self.memory)} memories")
        if set(self.node_of_rank) != set(range(max(self.node_of_rank) + 1)):
            raise UserError(f"topology: nodes must be numbered 0..N-1 without gaps, got {sorted(set(self.node_of_rank))}")
        node = np.asarray(self.node_of_rank)
        defaults: dict[str, tuple[float, ...]] = {
            "port_bandwidth": (self.intra_node.bandwidth,) * world,
            "uplink_bandwidth": (self.inter_node.bandwidth,) * self.num_nodes,
            "memory_bandwidth": tuple(rate / 150 for rate in self.flops),
        }
        for name, values in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or values)
        if not self.nic_bandwidth:
            object.__setattr__(self, "nic_bandwidth", tuple(self.uplink_bandwidth[n] for n in node))
        for name in ("flops", "memory", *defaults, "nic_bandwidth"):
            values = getattr(self, name)
            if len(values) != (self.num_nodes if name == "uplink_bandwidth" else world):
                raise UserError(f"topology: {world} ranks on {self.num_nodes} nodes, but {len(values)} values of {name}")
            if not all(np.isfinite(v) and v > 0 for v in values):
                raise UserError(f"topology: every {name} must be positive and finite, got {values}")
        if self.price_per_hour and len(self.price_per_hour) != world:
            raise UserError(f"topology: {world} ranks, but {len(self.price_per_hour)} values of price_per_hour")
        if not all(np.isfinite(price) and price > 0 for price in self.price_per_hour):
            raise UserError(f"topology: every price_per_hour must be positive and finite, got {self.price_per_hour}")
        if self.card and len(self.card) != world:
            raise UserError(f"topology: {world} ranks, but {len(self.card)} values of card")
        if not 1 <= self.overlap_slowdown <= 2:
            raise UserError(f"topology: overlap_slowdown must be from 1 to 2, got {self.overlap_slowdown}")
        if not 0 <= self.planning_slowdown < np.inf:
            raise UserError(f"topology: planning_slowdown must be a finite number >= 0, got {self.planning_slowdown}")

    @property
    def world_size(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1

    @property
    def slowest_link(self) -> Link:
        """The link that bounds a collective over all ranks."""
        if self.num_nodes == 1:
            return Link(min(self.port_bandwidth), self.intra_node.latency)
        return Link(min(*self.uplink_bandwidth, *self.nic_bandwidth), self.inter_node.latency)

    @property
    def exchange_latency(self) -> float:
        """Return the seconds that an exchange takes even if no rank sends anything: the latency inside nodes with several ranks."""
        if self.world_size > self.num_nodes:
            return self.intra_node.latency
        return self.inter_node.latency if self.num_nodes > 1 else 0.0

    @property
    def latency_to_all(self) -> float:
        """Return the seconds until every rank has heard of every other one."""
        return max(self.exchange_latency, self.inter_node.latency if self.num_nodes > 1 else 0.0)

    def ranks_of_node(self, node: int) -> list[int]:
        return [rank for rank, n in enumerate(self.node_of_rank) if n == node]

    def take(self, ranks: Sequence[int]) -> Topology:
        """Return the topology of some of the devices. Its rank r is this topology's rank `ranks[r]`. Nodes without ranks are left out."""
        nodes = sorted({self.node_of_rank[rank] for rank in ranks})

        def of_ranks(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(values[rank] for rank in ranks)

        return replace(
            self,
            node_of_rank=tuple(nodes.index(self.node_of_rank[rank]) for rank in ranks),
            flops=of_ranks(self.flops),
            memory=of_ranks(self.memory),
            port_bandwidth=of_ranks(self.port_bandwidth),
            uplink_bandwidth=tuple(self.uplink_bandwidth[node] for node in nodes),
            nic_bandwidth=of_ranks(self.nic_bandwidth),
            memory_bandwidth=of_ranks(self.memory_bandwidth),
            price_per_hour=of_ranks(self.price_per_hour) if self.price_per_hour else (),
            card=tuple(self.card[rank] for rank in ranks) if self.card else (),
        )

    def same_node(self) -> np.ndarray:
        """Return whether two ranks share a node, bool [ranks, ranks]."""
        node = np.asarray(self.node_of_rank)
        return node[:, None] == node[None, :]


def uniform_topology(
    nodes: int,
    devices_per_node: int,
    *,
    flops: float,
    memory: float,
    intra_node: Link,
    inter_node: Link | None = None,
) -> Topology:
    """Return a topology of `nodes` x `devices_per_node` equal devices. Ranks fill node 0 first."""
    world = nodes * devices_per_node
    return Topology(
        node_of_rank=tuple(rank // devices_per_node for rank in range(world)),
        flops=(flops,) * world,
        memory=(memory,) * world,
        intra_node=intra_node,
        inter_node=inter_node or intra_node,
    )


class _Figures(TypedDict):
    """What `uniform_topology` needs to know of a device."""

    flops: float
    memory: float
    intra_node: Link


CPU_DEVICE: _Figures = {"flops": 5e10, "memory": 8e9, "intra_node": Link(1e9, 2e-4)}
"""what a rank on a CPU is taken for, if nothing has measured it: round numbers, good enough to plan with"""
UNKNOWN_GPU: _Figures = {"flops": 4e14, "memory": 80e9, "intra_node": Link(2e11, 1e-5)}
"""what a GPU is taken for if nothing has measured it and its name says nothing: a card for servers, on NVLink"""


def local_topology(world_size: int, *, cuda: bool) -> Topology:
    """Return one node of ranks whose devices are not known: for uses in which only the number of ranks matters, and for CPUs.

    For GPUs that can be asked, see `hecate.parallel.cluster.topology_cards`.
    """
    return uniform_topology(1, world_size, **(UNKNOWN_GPU if cuda else CPU_DEVICE))


def nodes_of_hosts(hosts: Sequence[str]) -> tuple[int, ...]:
    """Return the node of each rank: ranks with one host name share a node, and nodes are numbered in the order of their first ranks."""
    order = list(dict.fromkeys(hosts))
    return tuple(order.index(host) for host in hosts)
