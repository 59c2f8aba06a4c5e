"""Who owns which expert: Hecate's heterogeneous sharding (arXiv 2502.02581, Algorithm 2), and whether moving the experts there pays.

All layers are placed together. A rank may own any number of a layer's experts while every rank owns the same bytes in all.

Shapes: L layers, E experts, D ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hecate.errors import UserError
from hecate.parallel.cost_model import LayerCost, overlap_degree, port_seconds
from hecate.parallel.flows import node_index, node_membership
from hecate.parallel.gather_bytes import PortBytes
from hecate.parallel.planners.plan import PlanInput, Planner
from hecate.parallel.topology import Topology

RESHARD_COLLECTIVES = 2
"""messages of a layer that is re-sharded: which moments there are, and the rows"""


def heterogeneous_owners(
    loads_LE: Sequence[np.ndarray],
    topology: Topology,
    degree_L: Sequence[int],
    expert_bytes_L: Sequence[float],
    memory_D: Sequence[float],
) -> list[np.ndarray]:
    """Owners of all layers' experts.

    Per layer the `degree` hottest experts are set aside, for materialization will bring them everywhere. The others are placed first,
    layers with the hottest leftovers first, experts by load descending: to the node with the least load of this layer for its rate,
    then to such a device in it. Then the hot ones fill the slots left, a layer's spread over the nodes' uplinks and the devices' ports.
    Ties: fewer free slots, then by index.

    Args:
        loads_LE: per layer the predicted choices of each expert, [experts]; layers may differ in their number.
        degree_L: experts of each layer that travel hidden (`overlap_degree`); 0: none is set aside.
        expert_bytes_L: what one expert of the layer takes on its owner.
        memory_D: bytes for owned experts on each device; each owns its share of them in proportion (see `owned_slots`).

    Returns:
        int64 [experts] per layer.

    Raises:
        UserError: the experts do not fit.
    """
    loads = [np.asarray(load_E, dtype=np.float64) for load_E in loads_LE]
    number: dict[float, int] = {}
    for load_E, size in zip(loads, expert_bytes_L, strict=True):
        number[size] = number.get(size, 0) + len(load_E)
    slots = owned_slots(number, memory_D)
    free_LD = [slots[size] for size in expert_bytes_L]  # layers of one size share one count
    ranked = [np.argsort(-load_E, kind="stable") for load_E in loads]
    cold = [order[degree:] for order, degree in zip(ranked, degree_L, strict=True)]
    hottest_left = [load_E[experts[0]] if len(experts) else -1.0 for load_E, experts in zip(loads, cold, strict=True)]
    owners = [np.empty(len(load_E), dtype=np.int64) for load_E in loads]

    rate_D = np.asarray(topology.flops)
    rate_N = rate_D @ node_membership(topology)
    for layer in np.argsort(-np.asarray(hottest_left), kind="stable"):
        _place(owners[layer], cold[layer], loads[layer], free_LD[layer], rate_N, rate_D, topology)
    uplink_N, port_D = np.asarray(topology.uplink_bandwidth), np.asarray(topology.port_bandwidth)
    for layer, degree in enumerate(degree_L):
        # An expert that goes everywhere costs its owner the same transfers whatever its load.
        _place(owners[layer], ranked[layer][:degree], np.ones(len(loads[layer])), free_LD[layer], uplink_N, port_D, topology)
    return owners


def owned_slots(number: Mapping[float, int], memory_D: Sequence[float]) -> dict[float, np.ndarray]:
    """How many experts of each size every device owns, so that its bytes are proportional to its memory.

    They are so within one expert of the largest size, unless a device has no memory for the one that would round up.

    Args:
        number: size of an expert in bytes -> how many there are.
        memory_D: bytes of each device.

    Returns:
        size -> int64 [ranks].

    Raises:
        UserError: they do not fit.
    """
    memory = np.asarray(memory_D, dtype=np.float64)
    total = sum(size * count for size, count in number.items())
    target_D = total * memory / memory.sum()
    owned_D = np.zeros(len(memory))
    slots = {}
    for size in sorted(number, reverse=True):  # the largest first: the smaller ones even out what they leave
        slots[size] = np.zeros(len(memory), dtype=np.int64)
        for _ in range(number[size]):
            over_D = np.where(owned_D + size <= memory, owned_D - target_D, np.inf)
            rank = int(over_D.argmin())
            if over_D[rank] == np.inf:
                raise UserError(
                    f"topology: no device has memory left for one more expert of {size:.3g} bytes (parameters, gradient and moments).\n"
                    f"  all experts take {total:.3g} bytes, the devices have {memory.sum():.3g} in all; "
                    "use more devices, fewer experts or a smaller lora.r"
                )
            owned_D[rank] += size
            slots[size][rank] += 1
    return slots


def _place(
    owner_E: np.ndarray,
    experts: np.ndarray,
    load_E: np.ndarray,
    free_D: np.ndarray,
    rate_N: np.ndarray,
    rate_D: np.ndarray,
    topology: Topology,
) -> None:
    """Give each of `experts` in turn its owner; takes the slots from `free_D`."""
    node_D = node_index(topology)
    load_N, load_D = np.zeros(len(rate_N)), np.zeros(len(rate_D))
    free_N = np.bincount(node_D, weights=free_D, minlength=len(rate_N))
    for expert in experts:
        node = _least(load_N / rate_N, free_N, free_N > 0)
        rank = _least(load_D / rate_D, free_D, (free_D > 0) & (node_D == node))
        owner_E[expert] = rank
        for load, free, index in ((load_N, free_N, node), (load_D, free_D, rank)):
            load[index] += load_E[expert]
            free[index] -= 1


def _least(load: np.ndarray, free: np.ndarray, allowed: np.ndarray) -> int:
    """The allowed one with the least load, then with the fewest free slots, then the first."""
    candidates = np.flatnonzero(allowed)
    return int(candidates[np.lexsort((candidates, free[candidates], load[candidates]))[0]])


@dataclass(frozen=True)
class ReshardGain:
    """What re-sharding is predicted to bring, in seconds."""

    saved: float
    """in each step"""
    moving: float
    """once"""
    steps: int
    """for which the owners will stay"""

    @property
    def net(self) -> float:
        return self.saved * self.steps - self.moving


def reshard_pays(planner: Planner, given: Sequence[PlanInput], owners: Sequence[np.ndarray], steps: int) -> ReshardGain | None:
    """The gain if `owners` save more over `steps` steps than moving there costs, under the loads of `given`; else None.

    Args:
        given: what the planner is given now, layers of one shape together.
        owners: int64 [layers, experts] for each of `given`.
    """
    saved = moving = 0.0
    for now, owner_LE in zip(given, owners, strict=True):
        then = replace(now, owner_LE=owner_LE)
        saved += float((planner(now).seconds(now).total - planner(then).seconds(then).total).sum())
        moving += reshard_seconds(now.owner_LE, owner_LE, now.topology, now.cost)
    gain = ReshardGain(saved, moving, steps)
    return gain if gain.net > 0 else None


def better_owners(planner: Planner, given: Sequence[PlanInput], steps: int) -> tuple[list[np.ndarray], ReshardGain] | None:
    """The owners to move to, int64 [layers, experts] for each of `given`, and what that brings; None: stay, or no load is known yet.

    Tried are Algorithm 2 with the overlap degree and with none, for planners that replicate as Hecate's does and for those that do not;
    the one with the larger gain wins, the former if they are equal.

    Raises:
        UserError: the experts do not fit into the devices' memory.
    """
    found: tuple[list[np.ndarray], ReshardGain] | None = None
    if any(one.loads_LED is None for one in given):
        return None
    loads_LE = [load_E for one in given for load_E in one.expected_LED.sum(-1)]
    sizes = [owned_bytes(one.cost) for one in given for _ in range(one.num_layers)]
    overlap = [min(overlap_degree(one.cost, one.topology), one.num_experts) for one in given for _ in range(one.num_layers)]
    cuts = np.cumsum([one.num_layers for one in given])[:-1]
    for degree in (overlap, [0] * len(overlap)) if given else ():
        placed = heterogeneous_owners(loads_LE, given[0].topology, degree, sizes, given[0].topology.memory)
        owners = [np.stack(placed[start:end]) for start, end in zip([0, *cuts], [*cuts, len(placed)], strict=True)]
        gain = reshard_pays(planner, given, owners, steps)
        if gain is not None and (found is None or gain.net > found[1].net):
            found = owners, gain
    return found


def owned_bytes(cost: LayerCost) -> float:
    """What one expert takes on its owner: master parameters and moments, gradient, frozen part."""
    return cost.state_bytes + cost.reduced_bytes + cost.frozen_bytes


def reshard_seconds(old_LE: np.ndarray, new_LE: np.ndarray, topology: Topology, cost: LayerCost) -> float:
    """Seconds of moving the experts from old to new owners, layer after layer: what they own but their gradients.

    Args:
        old_LE: int64 [layers, experts].
        new_LE: int64 [layers, experts].
    """
    ranks, node_D = np.arange(topology.world_size), node_index(topology)
    near_LE = (old_LE != new_LE) & (node_D[old_LE] == node_D[new_LE])
    far_LE = node_D[old_LE] != node_D[new_LE]
    out_LED, in_LED = old_LE[..., None] == ranks, new_LE[..., None] == ranks
    counts = [(at & moved[..., None]).sum(-2).astype(float) for moved in (near_LE, far_LE) for at in (out_LED, in_LED)]
    latency = np.where(far_LE.any(-1), topology.inter_node.latency, np.where(near_LE.any(-1), topology.intra_node.latency, 0.0))
    seconds_L = port_seconds(PortBytes(*counts), cost.state_bytes + cost.frozen_bytes, topology) + RESHARD_COLLECTIVES * latency
    return float(seconds_L.sum())
