"""Choose the owner of each expert by Hecate's heterogeneous sharding (arXiv 2502.02581, Algorithm 2), and price a re-shard.

All layers are placed at once: a rank may own any number of one layer's experts, while over all layers every rank owns bytes in
proportion to its memory.

Shapes: L layers, E experts, D ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import LayerCost, busiest_port_seconds, overlap_degree
from hecate.parallel.cost.flows import node_index, node_membership
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.planners.plan import PlanInput, Planner
from hecate.parallel.planners.policies.full import plan_with

RESHARD_COLLECTIVES = 2
"""the number of collectives per layer that is re-sharded: one says which moments exist, one sends the experts"""


def heterogeneous_owners(
    loads_LE: Sequence[np.ndarray],
    topology: Topology,
    degree_L: Sequence[int],
    expert_bytes_L: Sequence[float],
    memory_D: Sequence[float],
) -> list[np.ndarray]:
    """Choose the owners of all layers' experts (Algorithm 2).

    The `degree` hottest experts of each layer are held back, because materialization will replicate them on all ranks. The other
    experts are placed first: layers in descending order of their hottest such expert, and within a layer experts by descending load.
    An expert goes to the node with the lowest load of this layer relative to its speed, and in it to the device with the lowest. The
    hottest experts then fill the remaining slots, spread over the nodes' uplinks and the devices' ports. Ties go to the candidate with
    fewer free slots, then to the lower index.

    Args:
        loads_LE: for each layer the predicted assignments of each expert, [experts]; layers may have different numbers of experts.
        degree_L: for each layer the number of experts that can be gathered without delay (`overlap_degree`); 0: none is held back.
        expert_bytes_L: for each layer the bytes of one expert on its owner.
        memory_D: the bytes for owned experts on each device, in proportion to which it owns experts (see `owned_slots`).

    Returns:
        For each layer the owner of each expert, int64 [experts].

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
        # An expert that is replicated on all ranks costs its owner the same transfers, whatever its load.
        _place(owners[layer], ranked[layer][:degree], np.ones(len(loads[layer])), free_LD[layer], uplink_N, port_D, topology)
    return owners


def owned_slots(number: Mapping[float, int], memory_D: Sequence[float]) -> dict[float, np.ndarray]:
    """Return how many experts of each size every device owns, so that its bytes are proportional to its memory.

    The proportion is exact within one expert of the largest size, unless a device has no memory for the one that would round up.

    Args:
        number: the number of experts of each size in bytes.
        memory_D: the bytes of each device.

    Returns:
        For each size the number of experts on each rank, int64 [ranks].

    Raises:
        UserError: the experts do not fit into the devices' memory.
    """
    memory = np.asarray(memory_D, dtype=np.float64)
    total = sum(size * count for size, count in number.items())
    target_D = total * memory / memory.sum()
    owned_D = np.zeros(len(memory))
    slots = {}
    for size in sorted(number, reverse=True):  # the largest first, so that smaller ones even out the differences that these leave
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
    """Write the owner of each of `experts` in turn into `owner_E`, and subtract the used slots from `free_D`."""
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
    """Return the allowed index with the least load. Ties go to the fewest free slots, then to the lowest index."""
    candidates = np.flatnonzero(allowed)
    return int(candidates[np.lexsort((candidates, free[candidates], load[candidates]))[0]])


@dataclass(frozen=True)
class ReshardGain:
    """The predicted gain of a re-shard."""

    saved: float
    """the seconds saved in each step"""
    moving: float
    """the seconds of moving the experts, once"""
    steps: int
    """the number of steps for which the new owners will stay"""

    @property
    def net(self) -> float:
        """The seconds saved over all `steps`, less those of moving."""
        return self.saved * self.steps - self.moving


def reshard_pays(planner: Planner, given: Sequence[PlanInput], owners: Sequence[np.ndarray], steps: int) -> ReshardGain | None:
    """Return the gain of moving to `owners`, under the loads of `given`, or None if moving costs more than `steps` steps save.

    Args:
        given: the planner's current inputs, one for all layers of the same shape.
        owners: for each of `given` the new owners, int64 [layers, experts].
    """
    saved = moving = 0.0
    for now, owner_LE in zip(given, owners, strict=True):
        then = replace(now, owner_LE=owner_LE)
        saved += float((plan_with(planner, now).seconds(now).total - plan_with(planner, then).seconds(then).total).sum())
        moving += reshard_seconds(now.owner_LE, owner_LE, now.topology, now.cost)
    gain = ReshardGain(saved, moving, steps)
    return gain if gain.net > 0 else None


def better_owners(planner: Planner, given: Sequence[PlanInput], steps: int) -> tuple[list[np.ndarray], ReshardGain] | None:
    """Return the owners to move to and the gain, or None if no move pays or no loads are known yet.

    Algorithm 2 is run twice: with the overlap degree, for planners that replicate hot experts as Hecate's does, and with a degree of 0,
    for those that do not. The result with the larger gain is returned; the former if they are equal.

    Returns:
        For each of `given` the new owners, int64 [layers, experts], and their gain.

    Raises:
        UserError: the experts do not fit into the devices' memory.
    """
    found: tuple[list[np.ndarray], ReshardGain] | None = None
    if any(layers.loads_LED is None for layers in given):
        return None
    loads_LE = [load_E for layers in given for load_E in layers.expected_LED.sum(-1)]
    sizes = [owned_bytes(layers.cost) for layers in given for _ in range(layers.num_layers)]
    overlap = [min(overlap_degree(layers.cost, layers.topology), layers.num_experts) for layers in given for _ in range(layers.num_layers)]
    cuts = np.cumsum([layers.num_layers for layers in given])[:-1]
    for degree in (overlap, [0] * len(overlap)) if given else ():
        placed = heterogeneous_owners(loads_LE, given[0].topology, degree, sizes, given[0].topology.memory)
        owners = [np.stack(placed[start:end]) for start, end in zip([0, *cuts], [*cuts, len(placed)], strict=True)]
        gain = reshard_pays(planner, given, owners, steps)
        if gain is not None and (found is None or gain.net > found[1].net):
            found = owners, gain
    return found


def owned_bytes(cost: LayerCost) -> float:
    """Return the bytes of one expert on its owner: master parameters, moments, gradient and frozen part."""
    return cost.state_bytes + cost.reduced_bytes + cost.frozen_bytes


def reshard_ports(old_LE: np.ndarray, new_LE: np.ndarray, topology: Topology) -> PortBytes:
    """Return the experts through each port, float64 [layers, ranks] each, that move from old to new owners, int64 [layers, experts]."""
    ranks, node_D = np.arange(topology.world_size), node_index(topology)
    far_LE = node_D[old_LE] != node_D[new_LE]
    near_LE = (old_LE != new_LE) & ~far_LE
    out_LED, in_LED = old_LE[..., None] == ranks, new_LE[..., None] == ranks
    return PortBytes(*((at & moved[..., None]).sum(-2).astype(float) for moved in (near_LE, far_LE) for at in (out_LED, in_LED)))


def reshard_seconds(old_LE: np.ndarray, new_LE: np.ndarray, topology: Topology, cost: LayerCost) -> float:
    """Return the seconds of moving experts from old to new owners, one layer after the other. Gradients are not moved.

    Args:
        old_LE: the old owners, int64 [layers, experts].
        new_LE: the new owners, int64 [layers, experts].
    """
    ports = reshard_ports(old_LE, new_LE, topology)
    near_latency = np.where(ports.near_out_D.any(-1), topology.intra_node.latency, 0.0)
    latency = np.where(ports.far_out_D.any(-1), topology.inter_node.latency, near_latency)
    seconds_L = busiest_port_seconds(ports, cost.state_bytes + cost.frozen_bytes, topology) + RESHARD_COLLECTIVES * latency
    return float(seconds_L.sum())
