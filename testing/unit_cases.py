"""Clusters and planner inputs for results worked out by hand: a device does one FLOP a second, a link carries one byte a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import PlanInput

UNIT_LINK = Link(1.0, 0.0)
UNIT_COST = LayerCost(trainable_bytes=1.0, assignment_flops=1.0)


def unit_topology(
    nodes: Sequence[int],
    *,
    flops: Sequence[float] = (),
    memory: float = 1e9,
    near: Link = UNIT_LINK,
    far: Link = UNIT_LINK,
    memory_bandwidth: float | tuple[float, ...] = (),
    **others: Any,
) -> Topology:
    """Return devices of 1 FLOP/s and links of 1 byte/s without latency, unless told otherwise.

    Args:
        nodes: the node of each rank.
        flops: FLOP/s of each device; empty: 1.
        memory: bytes of every device.
        near: the links inside nodes.
        far: the links between nodes.
        memory_bandwidth: bytes/s of every device's memory, or of each.
        others: further fields of `Topology`.
    """
    world = len(nodes)
    if isinstance(memory_bandwidth, float):
        memory_bandwidth = (memory_bandwidth,) * world
    return Topology(tuple(nodes), tuple(flops) or (1.0,) * world, (memory,) * world, near, far, memory_bandwidth=memory_bandwidth, **others)


def layers_input(
    owners: list[list[int]],
    loads: Sequence[Sequence[Sequence[float]]] | None,
    slots: int | Sequence[int],
    *,
    on: Topology,
    cost: LayerCost = UNIT_COST,
    **others: Any,
) -> PlanInput:
    """Return the input of a planner.

    Args:
        owners: the owner of each expert, a row a layer.
        loads: assignments, for each layer a row a source rank; None: none are known yet.
        slots: of every device, or of each.
        others: further fields of `PlanInput`.
    """
    loads_LED = None if loads is None else np.array(loads, dtype=np.float64).swapaxes(1, 2)
    return PlanInput(np.array(owners), loads_LED, on, cost, np.broadcast_to(np.array(slots), on.world_size).copy(), **others)


def layer_input(
    owner: list[int], loads: Sequence[Sequence[float]] | None, slots: int | Sequence[int], *, on: Topology, **others: Any
) -> PlanInput:
    """As `layers_input`, of one layer."""
    return layers_input([owner], None if loads is None else [loads], slots, on=on, **others)
