"""Makes the process groups of a mesh. No other file makes groups of fewer ranks than the world; every rank makes them in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from hecate.parallel.cluster.mesh import Mesh
from hecate.ranks.backend import plain_options

# This is long enough for one rank to evaluate while the others wait, and shorter than gloo's half hour.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class ExpertGroups:
    """The process groups in which one rank exchanges experts and tokens (`hecate.parallel.cluster.mesh`).

    The ranks of a sharding group share one copy of all experts. This rank's sharding group exists twice, so that expert chunks and tokens
    never queue behind each other.
    """

    experts: dist.ProcessGroup
    """The sharding group, for expert chunks and their gradients."""
    tokens: dist.ProcessGroup
    """The sharding group, for tokens."""
    replicate: dist.ProcessGroup | None = None
    """The replicate group: this rank and the ranks that own the same experts in other sharding groups; None: there are none."""
    everyone: dist.ProcessGroup | None = None
    """All ranks of the job; None: the job is one sharding group."""

    @property
    def world(self) -> dist.ProcessGroup:
        """The group of all ranks of the job."""
        return self.everyone or self.tokens

    def all(self) -> list[dist.ProcessGroup]:
        """Each group once."""
        return [group for group in (self.experts, self.tokens, self.replicate, self.everyone) if group is not None]


@dataclass(frozen=True)
class TensorGroups:
    """The process groups of one rank for the part of the model outside its experts, where tensor parallelism splits it."""

    tensor: dist.ProcessGroup
    """The tensor group: this rank and the ranks with the other parts of the same copy; they compute the same sequences."""
    data: dist.ProcessGroup
    """This rank and the ranks with the same part of other copies; each of them computes sequences of its own."""

    @property
    def tp_size(self) -> int:
        """Number of ranks in the tensor group."""
        return dist.get_world_size(self.tensor)

    @property
    def tp_rank(self) -> int:
        """This rank's number in its tensor group."""
        return dist.get_rank(self.tensor)

    @property
    def dp_rank(self) -> int:
        return dist.get_rank(self.data)


def expert_groups(mesh: Mesh, chunks: Any = None, limit: timedelta = TIMEOUT) -> ExpertGroups:
    """Make the expert groups of this rank, which has joined the default group of `mesh.world_size` ranks. Every rank must call it.

    The default group carries expert chunks where there is one sharding group, and is then made with the options of such a group.

    They are not made with torch's DeviceMesh, because it makes one group for a dimension, and experts and tokens need one each.

    Args:
        chunks: the options of the group for expert chunks (`hecate.ranks.backend.chunk_options`).
        limit: how long the ranks may take to connect.
    """
    default = dist.group.WORLD
    assert default is not None
    if mesh.num_sharding_groups == 1:
        return ExpertGroups(experts=default, tokens=own_group([list(range(mesh.world_size))], limit))
    shards = mesh.sharding_groups()
    return ExpertGroups(
        experts=own_group(shards, limit, chunks),
        tokens=own_group(shards, limit),
        replicate=own_group(mesh.replicate_groups(), limit),
        everyone=default,
    )


def tensor_groups(mesh: Mesh, limit: timedelta = TIMEOUT) -> TensorGroups | None:
    """Make the tensor groups of this rank; None: every rank has all of the model outside its experts. Every rank must call it."""
    if mesh.tp_size == 1:
        return None
    return TensorGroups(tensor=own_group(mesh.tensor_groups(), limit), data=own_group(mesh.data_groups(), limit))


def own_group(groups: Sequence[Sequence[int]], limit: timedelta = TIMEOUT, options: Any = None) -> dist.ProcessGroup:
    """Make a process group of each of `groups`, and return the one that this rank is in. Every rank must call it.

    NCCL makes them by one split of the default group, whatever their number.

    Args:
        groups: lists of ranks. Each rank of the job is in exactly one of them.
        limit: how long the ranks may take to connect, and the group's limit for a collective until `set_limit`.
        options: of their backend; None: `hecate.ranks.backend.plain_options`.
    """
    own, backend = None, str(dist.get_backend())
    options = options or plain_options(backend)
    if backend == "nccl":
        own = dist.split_group(split_ranks=[list(ranks) for ranks in groups], timeout=limit, pg_options=options)
        assert own is not None
        return own
    # Also the groups that this rank is not in: torch numbers groups by their calls, and its members meet under that number.
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=limit, pg_options=options)
        if dist.get_rank() in ranks:
            own = group
    assert isinstance(own, dist.ProcessGroup)  # torch gives a rank outside all groups a number
    return own


def set_limit(groups: Sequence[dist.ProcessGroup]) -> None:
    """Give groups that have connected their limit for a collective."""
    for group in groups:
        distributed_c10d._set_pg_timeout(TIMEOUT, group)
