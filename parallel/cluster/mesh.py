"""The arrangement of a job's ranks into groups, as numbers: one for the experts, and one for the weights outside the experts.

Experts. Each *sharding group* of `shard_size` neighbouring ranks holds one copy of all experts. The ranks with the same index in
their sharding groups own the same experts and form a *replicate group*. These are the two dimensions of torch's HSDP:

    rank = sharding_group * shard_size + shard_rank

Weights outside the experts. Each *tensor group* of `tp_size` neighbouring ranks splits one copy of these weights; the tensor groups
compute different data:

    rank = dp_rank * tp_size + tp_rank

Groups are made of neighbouring ranks, because these are usually on one node, where links are fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Topology


@dataclass(frozen=True)
class Mesh:
    """The arrangement of a job's ranks."""

    world_size: int
    shard_size: int
    """the number of ranks that share one copy of all experts"""
    tp_size: int = 1
    """the number of ranks that split one copy of the weights outside the experts"""

    @property
    def num_sharding_groups(self) -> int:
        """The number of sharding groups."""
        return self.world_size // self.shard_size

    def sharding_groups(self) -> list[list[int]]:
        return _runs(self.world_size, self.shard_size)

    def replicate_groups(self) -> list[list[int]]:
        return _strides(self.world_size, self.shard_size)

    def tensor_groups(self) -> list[list[int]]:
        return _runs(self.world_size, self.tp_size)

    def data_groups(self) -> list[list[int]]:
        return _strides(self.world_size, self.tp_size)


def make_mesh(world_size: int, shard_size: int | None = None, tp_size: int = 1) -> Mesh:
    """Return the arrangement of `world_size` ranks.

    Args:
        shard_size: `fssdp.shard_size`; None: all ranks are one sharding group.
        tp_size: `model.tensor_parallel`.

    Raises:
        UserError: a group size does not divide the number of ranks.
    """
    divisors = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
    if world_size % tp_size:
        raise UserError(
            f"model.tensor_parallel: must divide the number of ranks, which is {world_size}, got {tp_size}\n  give one of {divisors}"
        )
    if shard_size is not None and world_size % shard_size:
        raise UserError(
            f"fssdp.shard_size: must divide the number of ranks, which is {world_size}, got {shard_size}\n"
            f"  give one of {divisors}, or null for all ranks"
        )
    return Mesh(world_size, shard_size or world_size, tp_size)


def shard_size_for(world_size: int, shard_size: int | None, backups: int) -> int | None:
    """Return the size of sharding groups with which a run goes on when it has other ranks than it began with.

    It is the smallest one that divides the number of ranks, is not below `shard_size`, and leaves more groups than `backups`, so that each
    expert is held as often as was asked for. If there is none, all ranks are one group, whose experts have backups.

    Args:
        shard_size: `fssdp.shard_size`; None: all ranks are one sharding group, however many they are.
        backups: `fssdp.redundancy`.
    """
    if shard_size is None:
        return None
    sizes = (size for size in range(shard_size, world_size) if world_size % size == 0 and world_size // size > backups)
    return next(sizes, world_size)


def owners_topology(topology: Topology, mesh: Mesh) -> Topology:
    """Return the topology with which owners are chosen, which must be the same in all sharding groups.

    It has the first group's nodes and links. Each of its ranks has the lowest speed and the least memory among the ranks of one
    replicate group.
    """
    first, *others = (topology.take(group) for group in mesh.sharding_groups())
    if not others:
        return topology
    groups = [first, *others]
    return replace(
        first,
        flops=tuple(map(min, *(group.flops for group in groups))),
        memory=tuple(map(min, *(group.memory for group in groups))),
    )


def hiding_flops(non_moe_flops: float, group: Topology, job: Topology) -> float:
    """Return the FLOPs that one sharding group can overlap with a layer's gather.

    They take the group as long as `non_moe_flops` take the whole job, because sequences are shared out by speed and all groups finish
    their attention at the same time.
    """
    return non_moe_flops * min(group.flops) / min(job.flops)


def _runs(world_size: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def _strides(world_size: int, size: int) -> list[list[int]]:
    return [list(range(first, world_size, size)) for first in range(size)]
