"""How the ranks of a job are arranged, as numbers: torch's HSDP dimensions for the experts, tensor and data parallel for the rest.

    rank = replica * shard_size + place        experts: all of them are in each *sharding group* of `shard_size` neighbouring ranks; the
                                               ranks of one place own the same experts, and make a *replicate group*
    rank = data * tp_size + part           outside the experts: `tp_size` neighbouring ranks share the weights of one copy

Neighbouring ranks sit on one node, where links are fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hecate.errors import UserError
from hecate.parallel.topology import Topology


@dataclass(frozen=True)
class Mesh:
    """The arrangement of a job's ranks."""

    world_size: int
    shard_size: int
    """ranks that share one copy of all experts"""
    tp_size: int = 1
    """ranks that share one copy of the rest of the model"""

    @property
    def num_sharding_groups(self) -> int:
        """Sharding groups."""
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
    """Args:
        shard_size: `fssdp.shard_size`; None: the world.
        tp_size: `model.tensor_parallel`.

    Raises:
        UserError: the groups do not fill the world.
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


def owners_topology(topology: Topology, mesh: Mesh) -> Topology:
    """What all sharding groups, which must come to the same owners, decide them with: the first group's nodes and links; in each place the
    slowest device and the least memory of any group."""
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
    """What hides a layer's gather, in FLOPs that take a sharding group as long as `non_moe_flops` take the whole job: rows are dealt by
    speed, and all groups are through with their attention together."""
    return non_moe_flops * min(group.flops) / min(job.flops)


def _runs(world_size: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def _strides(world_size: int, size: int) -> list[list[int]]:
    return [list(range(first, world_size, size)) for first in range(size)]
