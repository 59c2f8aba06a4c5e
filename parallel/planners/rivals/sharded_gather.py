"""The collectives of fully sharded expert parallelism (FSEP, LAER-MoE, ASPLOS 26), priced: each expert is cut into as many equal parts as
there are ranks, and one all-to-all gives each rank the parts of all copies that it computes with.

Every rank sends and receives as much as any other with as many copies, and no owner is a bottleneck. But each copy is put together anew in
each step, an owner's too, and between nodes each rank's copy travels by itself.

Shapes: ... any leading dimensions (layers), E experts, D ranks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, Priced, cost_numbers, transfer_seconds
from hecate.parallel.cost.flows import node_index, node_membership
from hecate.parallel.cost.gather_bytes import PortBytes


def shard_ports(copies_ED: np.ndarray, topology: Topology) -> PortBytes:
    """Experts through each port, float64 [..., ranks].

    Args:
        copies_ED: bool [..., experts, ranks]: with which experts each rank computes.
    """
    node_D, member_DN = node_index(topology), node_membership(topology)
    part, copies_D = 1 / topology.world_size, copies_ED.sum(-2).astype(np.float64)
    near_D, in_node_D = member_DN.sum(0)[node_D], (copies_D @ member_DN)[..., node_D]
    everywhere = copies_D.sum(-1, keepdims=True)
    return PortBytes(
        part * (in_node_D - copies_D),
        part * copies_D * (near_D - 1),
        part * (everywhere - in_node_D),
        part * copies_D * (topology.world_size - near_D),
    )


def with_sharded_gather(priced: Priced, copies_ED: np.ndarray, topology: Topology, cost: LayerCost, execution: ExecutionMode) -> Priced:
    """The same layers with the collectives of fully sharded experts. Frozen parts, which LAER-MoE has not, travel as they were priced.

    Args:
        copies_ED: bool [..., experts, ranks]: see `shard_ports`.
    """
    numbers, ports = cost_numbers(cost, topology, execution), shard_ports(copies_ED, topology)
    again = transfer_seconds(ports, cost.trainable_bytes, topology)
    reduce = transfer_seconds(ports.reversed(), cost.reduced_bytes, topology)
    fetch, share = transfer_seconds(priced.gathered_frozen, numbers.frozen_bytes, topology), numbers.fetched_share
    back, alone = reduce, np.zeros_like(reduce)
    if execution.rematerialize:
        back, alone = (reduce + again, alone) if numbers.hides_second_gather else (reduce, again)
    slowdown = topology.overlap_slowdown
    hidden, fetched = _exposed(numbers.hides_gather, again, slowdown), _exposed(numbers.hides_gather, again + fetch, slowdown)
    exposed = hidden + share * (fetched - hidden) + _exposed(numbers.hides_reduce, back, slowdown) + alone
    return replace(priced, seconds=replace(priced.seconds, gather=again + share * fetch, reduce=reduce, exposed=exposed), gathered=ports)


def _exposed(compute: float, transfer: np.ndarray, slowdown: float) -> np.ndarray:
    """As `hecate.parallel.cost.cost_loops.exposed_seconds`, of several."""
    both = np.minimum(compute, transfer)
    return np.asarray(transfer - both + (slowdown - 1) * both)
