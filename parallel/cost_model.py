"""Seconds and bytes of one MoE layer in one training step. What planners decide by, and what the simulator reports.

Where several links or devices work side by side the slowest decides: maxima, never sums. Planning, collectives and dispatch share
these functions, so that what is predicted is what is done.

Shapes: ... any leading dimensions (layers), E experts, D ranks, N nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hecate.errors import UserError
from hecate.parallel.flows import Flows, flows, node_membership
from hecate.parallel.gather_bytes import PortBytes, gather_ports
from hecate.parallel.placement import Placement
from hecate.parallel.routes import Moves, flat_moves, most_wanting, sliced_moves, slices_of, two_level_moves
from hecate.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What a planner must know of a layer besides its loads. Bytes are of one expert, FLOPs of one pass forward.

    Raises:
        UserError: a number is negative or not finite, or `top_k` or `frozen_lifetime` is nothing.
    """

    trainable_bytes: float
    """parameters of one expert that a SparseAllGather moves in every step"""
    gradient_bytes: float | None = None
    """of one expert, moved back by a SparseReduceScatter; None: as `trainable_bytes`"""
    frozen_bytes: float = 0.0
    """of one expert; a frozen replica never goes stale, so it moves once and stays while its placement does"""
    state_bytes: float = 0.0
    """master parameters and moments of one expert, on its owner only; what re-sharding moves"""
    top_k: int = 1
    row_bytes: float = 0.0
    """one token's hidden row, one way"""
    row_flops: float = 0.0
    """per distinct token on a rank, whatever number of its experts is there: a base FFN that the experts share"""
    assignment_flops: float = 0.0
    """per (token, expert)"""
    row_backward: float = 1.0
    """backward over forward FLOPs of a row; 1 for a frozen base, 2 for a trained one"""
    assignment_backward: float = 2.0
    """backward over forward FLOPs of a choice"""
    non_moe_flops: float = 0.0
    """of one rank: the attention that hides transfers; backward is twice as long"""
    frozen_lifetime: float = 20.0
    """steps for which a frozen replica is expected to be of use: its transfer is paid once in so many"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < np.inf:
                raise UserError(f"layer cost: {name} must be finite and not negative, got {value}")
        if self.top_k < 1 or self.frozen_lifetime == 0:
            raise UserError(f"layer cost: top_k must be >= 1 and frozen_lifetime > 0, got {self.top_k} and {self.frozen_lifetime}")

    @property
    def reduced_bytes(self) -> float:
        return self.trainable_bytes if self.gradient_bytes is None else self.gradient_bytes

    @property
    def expert_bytes(self) -> float:
        """What one replica costs to bring, in a step, with its frozen part paid over its lifetime."""
        return self.trainable_bytes + self.frozen_bytes / self.frozen_lifetime

    @property
    def replica_bytes(self) -> float:
        """Memory of one replica of another rank's expert: parameters, gradients, frozen part."""
        return self.trainable_bytes + self.reduced_bytes + self.frozen_bytes


@dataclass(frozen=True, eq=False)
class LayerSeconds:
    """Where the seconds of a layer go, float64 [...] each: forward and backward of one step."""

    compute: np.ndarray
    """experts, on the slowest rank"""
    dispatch: np.ndarray
    """all all-to-alls of tokens and their gradients"""
    gather: np.ndarray
    """SparseAllGather, hidden or not"""
    reduce: np.ndarray
    """SparseReduceScatter, hidden or not"""
    exposed: np.ndarray
    """what gather and reduce add to the step"""
    optimizer: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """What the layer adds to a step, its attention left out."""
        return self.compute + self.dispatch + self.exposed + self.optimizer


DISPATCH_COLLECTIVES = 8
"""all-to-alls of a layer's tokens in a step: counts, slots, rows, weights, results; backward results, rows, weights"""
LEAST_TRAFFIC = 1e-6
"""rows or experts; less is rounding, and pays no latency"""


def layer_seconds(
    owner_E: np.ndarray,
    where_ED: np.ndarray,
    quota_ED: np.ndarray,
    loads_ED: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    *,
    flow: Flows | None = None,
    resident_ED: np.ndarray | None = None,
    rematerialize: bool = False,
    prefetched: bool = True,
) -> LayerSeconds:
    """Predict one step of each layer.

    Args:
        owner_E: int64 [..., experts].
        where_ED: bool [..., experts, ranks].
        quota_ED: float64 [..., experts, ranks]: choices served (see `hecate.parallel.flows`).
        loads_ED: float64 [..., experts, source ranks]: choices routed.
        flow: how the choices travel; None: as `flows` matches them with the quotas.
        resident_ED: bool [..., experts, ranks]: frozen parts that are there already; None: only the owners'.
        rematerialize: a second SparseAllGather before the backward pass.
        prefetched: attention hides the forward pass's gather; not if the plan was made after the gate.
    """
    if flow is None:
        flow = flows(loads_ED, quota_ED, topology)
    rows = rows_served(flow, loads_ED, cost)
    choices_D = quota_ED.sum(-2)
    rate_D = np.asarray(topology.flops)
    row_work = cost.row_flops * (1 + cost.row_backward)
    choice_work = cost.assignment_flops * (1 + cost.assignment_backward)
    compute = ((rows.computed_D * row_work + choices_D * choice_work) / rate_D).max(-1)

    gather_ports_ = gather_ports(owner_E, where_ED, topology)
    gather = transfer_seconds(gather_ports_, cost.trainable_bytes, topology)
    reduce = transfer_seconds(gather_ports_.reversed(), cost.reduced_bytes, topology)
    again = gather  # frozen parts stay
    if cost.frozen_bytes:
        fresh_ED = where_ED if resident_ED is None else where_ED & ~resident_ED
        at_owner_ED = owner_E[..., None] == np.arange(where_ED.shape[-1])
        gather = gather + transfer_seconds(
            gather_ports(owner_E, fresh_ED | at_owner_ED, topology), cost.frozen_bytes / cost.frozen_lifetime, topology
        )
    attention = cost.non_moe_flops / rate_D.min()
    slowdown = topology.overlap_slowdown
    backward_transfer = reduce + again if rematerialize else reduce
    forward = exposed_seconds(attention if prefetched else 0.0, gather, slowdown)
    exposed = forward + exposed_seconds(2 * attention, backward_transfer, slowdown)
    owned_D = (owner_E[..., None] == np.arange(where_ED.shape[-1])).sum(-2)
    optimizer = (owned_D * (cost.reduced_bytes + 2 * cost.state_bytes) / np.asarray(topology.memory_bandwidth)).max(-1)
    asked = np.asarray(~where_ED.all((-2, -1)) & loads_ED.any((-2, -1)))
    return LayerSeconds(compute, dispatch_seconds(rows, topology, cost, asked), gather, reduce, exposed, optimizer)


@dataclass(frozen=True, eq=False)
class Rows:
    """Distinct tokens: computed on each rank, and through its ports in one all-to-all."""

    computed_D: np.ndarray
    near: tuple[np.ndarray, np.ndarray]
    """sent to and received from other ranks of the node"""
    far: tuple[np.ndarray, np.ndarray]
    """sent to and received from other nodes"""


def rows_served(flow: Flows, loads_ED: np.ndarray, cost: LayerCost) -> Rows:
    """Distinct tokens behind the choices. A token travels once to a rank however many of its experts are there.

    Loads do not say which choices belong to one token; they are taken as drawn independently: c of the k·T choices of T tokens touch
    T·(1 - (1 - c/(kT))^k) tokens.
    """
    k = cost.top_k
    tokens_D = loads_ED.sum(-2) / k
    others_D = tokens_D.sum(-1, keepdims=True) - tokens_D
    near_served, far_served = flow.near_served_ED.sum(-2), flow.far_served_ED.sum(-2)
    near_sent, far_sent = flow.near_sent_ED.sum(-2), flow.far_sent_ED.sum(-2)
    remote = near_served + far_served
    received = _distinct(remote, others_D, k)
    share = _ratio(received, remote)
    mean_share = _ratio(received.sum(-1), remote.sum(-1))[..., None]
    computed = _distinct(flow.local_ED.sum(-2), tokens_D, k) + received
    return Rows(computed, (near_sent * mean_share, near_served * share), (far_sent * mean_share, far_served * share))


def dispatch_seconds(rows: Rows, topology: Topology, cost: LayerCost, asked: np.ndarray) -> np.ndarray:
    """All all-to-alls of a layer's rows in a step. Four of them carry rows, with ports in turn sending and receiving.

    Args:
        asked: bool [...]: not every expert is everywhere, so ranks ask each other what they send, also where it turns out to be nothing.
    """
    ports = PortBytes(rows.near[0], rows.near[1], rows.far[0], rows.far[1])
    once = port_seconds(ports, cost.row_bytes, topology)
    far, near = rows.far[0].sum(-1) > LEAST_TRAFFIC, rows.near[0].sum(-1) > LEAST_TRAFFIC
    latency = np.where(far, topology.inter_node.latency, np.where(near, topology.intra_node.latency, asked * topology.exchange_latency))
    return 4 * once + DISPATCH_COLLECTIVES * latency


def port_seconds(ports: PortBytes, unit_bytes: float, topology: Topology) -> np.ndarray:
    """Seconds until the busiest port is done, without latency; traffic counted in units of `unit_bytes`."""
    near = np.maximum(ports.near_out_D, ports.near_in_D) / np.asarray(topology.port_bandwidth)
    seconds = near.max(-1)
    if topology.num_nodes > 1:
        member_DN = node_membership(topology)
        nic = np.maximum(ports.far_out_D, ports.far_in_D) / np.asarray(topology.nic_bandwidth)
        uplink = np.maximum(ports.far_out_D @ member_DN, ports.far_in_D @ member_DN) / np.asarray(topology.uplink_bandwidth)
        seconds = np.maximum(seconds, np.maximum(nic.max(-1), uplink.max(-1)))
    return seconds * unit_bytes


Collective = Literal["flat", "two_level", "sliced"]
CLEARLY_LESS = 1 - 1e-9
"""of the seconds of two ways; a smaller difference is rounding"""


def choose_collective(placement: Placement, chunk_numel: int, element_bytes: float, topology: Topology) -> Collective:
    """The fastest way for a layer's SparseAllGather and, as it takes the same way back, its SparseReduceScatter; the simpler one if equal.

    The two exchanges of a collective over leaders follow one another, so their seconds add up. A pure function: all ranks choose alike.

    Args:
        chunk_numel: elements of a chunk, on which depends into how many slices it can be cut.
    """
    most = most_wanting(placement, topology)
    if most < 2:
        return "flat"

    chunk_bytes = chunk_numel * element_bytes

    def seconds(exchanges: Sequence[Moves], unit_bytes: float) -> float:
        return sum(float(transfer_seconds(moves.ports(topology), unit_bytes, topology)) for moves in exchanges)

    ways: dict[Collective, float] = {"flat": seconds([flat_moves(placement)], chunk_bytes)}
    if topology.num_nodes > 1:
        ways["two_level"] = seconds(two_level_moves(placement, topology).gather, chunk_bytes)
    slices = slices_of(chunk_numel, most)
    if slices > 1:
        ways["sliced"] = seconds(sliced_moves(placement, topology, slices).moves.gather, chunk_bytes / slices)
    best: Collective = "flat"
    for way in ways:
        if ways[way] < CLEARLY_LESS * ways[best]:
            best = way
    return best


def fuse_gathers(layers: Sequence[tuple[Placement, float]], topology: Topology) -> list[list[int]]:
    """Which flat gathers that start at one moment travel in one exchange: the layers' numbers in runs, in order.

    One exchange pays its latency once, but no layer has its experts before all have. So a layer joins a run while all that joined it takes
    no longer than one latency: then the run's first layer waits at most that much longer than alone, and every other one no longer than it
    would after those before it. This also bounds the bytes in flight. A pure function: all ranks fuse alike.

    Args:
        layers: placement and bytes of a chunk of each, in the order in which they are needed.
    """
    runs: list[list[int]] = []
    total_PD, first, latency = np.zeros((4, topology.world_size)), 0.0, 0.0
    for layer, (placement, chunk_bytes) in enumerate(layers):
        ports = flat_moves(placement).ports(topology)
        bytes_PD = chunk_bytes * np.stack([ports.near_out_D, ports.near_in_D, ports.far_out_D, ports.far_in_D])
        together = PortBytes(*(total_PD + bytes_PD))
        if runs and float(port_seconds(together, 1.0, topology)) - first <= latency:
            runs[-1].append(layer)
            total_PD = total_PD + bytes_PD
        else:
            runs.append([layer])
            total_PD, first = bytes_PD, float(port_seconds(ports, chunk_bytes, topology))
            latency = float(transfer_seconds(ports, chunk_bytes, topology)) - first
    return runs


def exposed_seconds(compute: float | np.ndarray, transfer: np.ndarray, slowdown: float) -> np.ndarray:
    """What a transfer beside `compute` seconds of work adds: both are slowed down while both run."""
    both = np.minimum(compute, transfer)
    return np.asarray(transfer - both + (slowdown - 1) * both)


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


def transfer_seconds(ports: PortBytes, unit_bytes: float, topology: Topology) -> np.ndarray:
    """Seconds of one exchange of chunks, latency included; traffic counted in units of `unit_bytes`."""
    far, near = ports.far_out_D.sum(-1) > 0, ports.near_out_D.sum(-1) > 0
    latency = np.where(far, topology.inter_node.latency, 0.0) + np.where(near, topology.intra_node.latency, 0.0)
    return port_seconds(ports, unit_bytes, topology) + latency


def _distinct(choices: np.ndarray, tokens: np.ndarray, k: int) -> np.ndarray:
    return tokens * (1 - (1 - np.minimum(_ratio(choices, k * tokens), 1.0)) ** k)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
