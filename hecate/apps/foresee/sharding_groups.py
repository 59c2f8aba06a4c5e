"""Simulate a step of several sharding groups: each works alone on its own devices, then owners' gradients are summed over the groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np

from hecate.parallel.cluster.mesh import Mesh, hiding_flops
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.simulate.simulated_step import StepBytes
from hecate.parallel.simulate.simulator import Simulated, mean_modes

SimulateGroup = Callable[[np.ndarray, Topology, LayerCost], list[Simulated]]
"""a function of loads (int64 [steps, layers, experts, source ranks]), topology and cost that returns a result for each policy"""


def simulate_groups(loads: np.ndarray, topology: Topology, cost: LayerCost, mesh: Mesh, simulate: SimulateGroup) -> list[Simulated]:
    """Return each policy's step on all ranks: the slowest group's seconds and the bytes of all groups.

    Args:
        loads: the loads of the whole job.
    """
    if mesh.num_sharding_groups == 1:
        return simulate(loads, topology, cost)
    groups = mesh.sharding_groups()
    by_group = []
    for ranks in groups:
        part = topology.take(ranks)
        hiding = hiding_flops(cost.non_moe_flops, part, topology)
        by_group.append(simulate(loads[..., ranks], part, replace(cost, non_moe_flops=hiding)))
    return [_together(of_groups, groups, topology) for of_groups in zip(*by_group, strict=True)]


def ep_group_sizes(topology: Topology, experts: int) -> list[int]:
    """Return the sizes of groups in which people run expert parallelism: the largest in which every rank owns an expert, and the largest of
    those that stays on one node."""
    world, node = topology.world_size, topology.node_of_rank
    sizes = [size for size in range(1, world + 1) if world % size == 0 and size <= experts]
    in_node = [size for size in sizes if all(len({node[rank] for rank in ranks}) == 1 for ranks in Mesh(world, size).sharding_groups())]
    return sorted({sizes[-1], in_node[-1]}, reverse=True)


def with_sum(one: Simulated, seconds: float, moved: StepBytes) -> Simulated:
    """Return a step with the sum of the owners' gradients over the groups (`sum_over_groups`) added to it."""
    together = StepBytes(**{field.name: getattr(one.bytes, field.name) + getattr(moved, field.name) for field in fields(moved)})
    return replace(
        one,
        seconds=replace(one.seconds, all_reduce=seconds),
        bytes=together,
        first_seconds=one.first_seconds + one.first_steps * seconds,
        first_bytes=one.first_bytes + one.first_steps * (moved.near + moved.far),
    )


def _together(of_groups: Sequence[Simulated], groups: list[list[int]], topology: Topology) -> Simulated:
    slowest = max(of_groups, key=lambda one: one.step_seconds)
    rate = np.array([sum(topology.flops[rank] for rank in ranks) for ranks in groups])
    compute, skew = (np.array([value(one) for one in of_groups]) for value in (lambda one: one.seconds.compute, lambda one: one.imbalance))
    shared = float((compute / skew) @ rate / rate.sum())  # the seconds if all ranks of the job shared the work in proportion to their rates
    uplinks = [0.0] * topology.num_nodes
    for one, ranks in zip(of_groups, groups, strict=True):
        for node in {topology.node_of_rank[rank] for rank in ranks}:
            uplinks[node] += one.bytes.busiest_uplink  # if groups share a node's uplink, the sum is an upper bound
    return Simulated(
        policy=slowest.policy,
        seconds=slowest.seconds,
        bytes=StepBytes(
            near=sum(one.bytes.near for one in of_groups),
            far=sum(one.bytes.far for one in of_groups),
            busiest_port=max(one.bytes.busiest_port for one in of_groups),
            busiest_uplink=max(uplinks),
        ),
        first_steps=slowest.first_steps,
        first_seconds=max(one.first_seconds for one in of_groups),
        first_bytes=sum(one.first_bytes for one in of_groups),
        imbalance=float(compute.max()) / shared if shared else slowest.imbalance,
        replica_bytes_D=tuple(size for one in of_groups for size in one.replica_bytes_D),
        replicas_D=tuple(number for one in of_groups for number in one.replicas_D),
        frozen_parts_D=tuple(number for one in of_groups for number in one.frozen_parts_D),
        served_tokens_D=tuple(rows for one in of_groups for rows in one.served_tokens_D),
        most_tokens_D=tuple(rows for one in of_groups for rows in one.most_tokens_D),
        planner_ms_per_layer=max(one.planner_ms_per_layer for one in of_groups),
        plan_modes=mean_modes([one.plan_modes for one in of_groups]),
    )


def sum_over_groups(owned_D: np.ndarray, messages: int, topology: Topology, mesh: Mesh) -> tuple[float, StepBytes]:
    """Return the seconds and bytes of summing the owners' gradients over the sharding groups, in a ring over each replicate group.

    All seconds are counted, although some overlap with the backward pass.

    Args:
        owned_D: float64 [ranks], the gradient bytes of the experts that each rank owns.
        messages: the number of all-reduces, one per layer.
    """
    if mesh.num_sharding_groups == 1:
        return 0.0, StepBytes(near=0.0, far=0.0, busiest_port=0.0, busiest_uplink=0.0)
    node_D = np.asarray(topology.node_of_rank)
    next_D = (np.arange(mesh.world_size) + mesh.shard_size) % mesh.world_size
    sent_D = 2.0 * (mesh.num_sharding_groups - 1) / mesh.num_sharding_groups * owned_D
    far_D = np.where(node_D != node_D[next_D], sent_D, 0.0)
    near_D, far_N = sent_D - far_D, np.bincount(node_D, weights=far_D, minlength=topology.num_nodes)
    ports = (near_D, topology.port_bandwidth), (far_D, topology.nic_bandwidth), (far_N, topology.uplink_bandwidth)
    latency = topology.inter_node.latency if far_D.any() else topology.intra_node.latency
    seconds = max(float((sent / np.asarray(bandwidth)).max()) for sent, bandwidth in ports) + messages * latency
    return seconds, StepBytes(
        near=float(near_D.sum()), far=float(far_D.sum()), busiest_port=float(near_D.max()), busiest_uplink=float(far_N.max())
    )
