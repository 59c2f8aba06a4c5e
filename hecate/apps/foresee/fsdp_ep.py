"""FSDP over experts beside expert parallelism, as torchtitan, Megatron and LAER-MoE's paper run it: a baseline of `hecate simulate`.

Each expert-parallel group of neighbouring ranks holds all experts once. The ranks with the same place in their groups share what they hold
of an expert in equal parts: parameters, gradients, optimizer state, frozen part. A layer's parameters are gathered before its forward pass,
in each micro-step, and again before its backward pass where they were freed; its gradients are reduced and scattered. Collectives are
rings, which cross each link as rarely as any, and hide behind the same work as a policy's gathers, whatever the loads are planned from.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hecate.apps.foresee.sharding_groups import with_sum
from hecate.parallel.cluster.mesh import Mesh
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import exposed_seconds
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, cost_numbers, transfer_seconds
from hecate.parallel.cost.flows import node_index
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.plan.sharding import owned_bytes
from hecate.parallel.simulate.simulated_step import StepBytes
from hecate.parallel.simulate.simulator import Simulated

FSDP_EP = "fsdp_ep"
_LAYERS_AT_ONCE = 2
"""the layers of which a rank has all parameters, where these are freed between the passes: one that is computed, and the next"""


def fsdp_ep_sizes(world_size: int, experts: int) -> list[int]:
    """Return the sizes that expert-parallel groups can have: those that divide both ranks and experts."""
    return [size for size in range(1, world_size + 1) if world_size % size == 0 and experts % size == 0]


def fsdp_ep_bytes(cost: LayerCost, mesh: Mesh, *, num_layers: int, num_experts: int, resharded: bool) -> float:
    """Return what a rank holds of all experts: its parts, the layers that are gathered, and gradients that are being reduced.

    Args:
        resharded: whether parameters are freed after the forward pass.
    """
    each, copies = num_experts // mesh.shard_size, mesh.num_sharding_groups
    if copies == 1:
        return each * num_layers * (cost.trainable_bytes + owned_bytes(cost))
    few = min(_LAYERS_AT_ONCE, num_layers)
    gathered = (few if resharded else num_layers) * (cost.trainable_bytes + cost.frozen_bytes) + few * cost.reduced_bytes
    return each * (num_layers * owned_bytes(cost) / copies + gathered)


def with_fsdp(
    static: Simulated, topology: Topology, cost: LayerCost, mesh: Mesh, execution: ExecutionMode, *, num_layers: int, num_experts: int
) -> Simulated:
    """Return a step of static expert parallelism in groups, without the sum over these, as one with fully sharded experts.

    Args:
        topology: of the whole job.
        mesh: the expert-parallel groups.
        execution: `rematerialize` says whether parameters are freed after the forward pass.
    """
    numbers, passes = cost_numbers(cost, topology, replace(execution, plan="history")), 2 if execution.rematerialize else 1
    copies, size = mesh.num_sharding_groups, cost.trainable_bytes + cost.frozen_bytes
    ports = _ring_ports(topology, mesh, num_experts // mesh.shard_size * (copies - 1) / copies)
    gather = float(transfer_seconds(ports, size, topology))
    reduce = float(transfer_seconds(ports, cost.reduced_bytes, topology))
    slowdown, again = topology.overlap_slowdown, gather if execution.rematerialize else 0.0
    hidden, alone = (reduce + again, 0.0) if numbers.hides_second_gather else (reduce, again)
    exposed = exposed_seconds(numbers.hides_gather, gather, slowdown) + exposed_seconds(numbers.hides_reduce, hidden, slowdown) + alone
    times = num_layers * execution.micro_steps
    seconds = replace(
        static.seconds,
        gather=times * gather,
        reduce=times * reduce,
        exposed=times * exposed,
        optimizer=static.seconds.optimizer / copies,
    )
    more = static.first_steps * (seconds.total - static.seconds.total)
    moved = _moved(ports, times * (passes * size + cost.reduced_bytes), topology)
    return replace(with_sum(static, 0.0, moved), policy=FSDP_EP, seconds=seconds, first_seconds=static.first_seconds + more)


def _ring_ports(topology: Topology, mesh: Mesh, sent: float) -> PortBytes:
    """Experts through each rank's ports, float64 [ranks] each, where each rank sends so many to the next of its replicate group."""
    node_D = node_index(topology)
    far_D = node_D != np.roll(node_D, -mesh.shard_size)  # to the rank `shard_size` places further on
    from_far_D = np.roll(far_D, mesh.shard_size)
    return PortBytes(*(sent * at_D.astype(np.float64) for at_D in (~far_D, ~from_far_D, far_D, from_far_D)))


def _moved(ports: PortBytes, unit_bytes: float, topology: Topology) -> StepBytes:
    """Gathers go round the ring one way, and reductions the same way."""
    out_N, in_N = (np.bincount(node_index(topology), weights=far_D) for far_D in (ports.far_out_D, ports.far_in_D))
    return StepBytes(
        near=unit_bytes * float(ports.near_out_D.sum()),
        far=unit_bytes * float(ports.far_out_D.sum()),
        busiest_port=unit_bytes * float(np.maximum(ports.near_out_D, ports.near_in_D).max()),
        busiest_uplink=unit_bytes * float(np.maximum(out_N, in_N).max()),
    )
