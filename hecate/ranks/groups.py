"""The process groups of a mesh. All that talk among fewer ranks than the world are made here, by every rank in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from hecate.parallel.mesh import Mesh

# Long enough for one rank to evaluate while the others wait, short against gloo's half hour.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class ExpertGroups:
    """The process groups of one rank that have to do with experts (`hecate.parallel.mesh`).

    A sharding group is made of ranks that share one copy of all experts. This rank's sharding group exists twice, so that expert chunks
    and tokens never queue behind each other.
    """

    experts: dist.ProcessGroup
    """the sharding group, for expert chunks and their gradients"""
    tokens: dist.ProcessGroup
    """the sharding group, for tokens"""
    replicate: dist.ProcessGroup | None = None
    """the replicate group: this rank and those that own the same experts in the other sharding groups; None: there is no other"""
    everyone: dist.ProcessGroup | None = None
    """all ranks of the job; None: the job is one sharding group"""

    @property
    def world(self) -> dist.ProcessGroup:
        """The group of all ranks of the job."""
        return self.everyone or self.tokens

    def all(self) -> list[dist.ProcessGroup]:
        """Each group once."""
        return [group for group in (self.experts, self.tokens, self.replicate, self.everyone) if group is not None]


@dataclass(frozen=True)
class TensorGroups:
    """Who holds what of the model outside its experts."""

    tensor: dist.ProcessGroup
    """this rank and those that hold the other parts of one copy; they compute the same rows"""
    data: dist.ProcessGroup
    """this rank and those that hold the same part, in other copies; each computes rows of its own"""

    @property
    def tp_size(self) -> int:
        """Parts of a copy."""
        return dist.get_world_size(self.tensor)

    @property
    def tp_rank(self) -> int:
        """Which of them this rank has."""
        return dist.get_rank(self.tensor)

    @property
    def dp_rank(self) -> int:
        return dist.get_rank(self.data)


def expert_groups(mesh: Mesh) -> ExpertGroups:
    """The groups of this rank, which has joined the default group of `mesh.world_size` ranks. Every rank must call it.

    Not torch's DeviceMesh, which makes one group for a dimension, where experts and tokens need one each.
    """
    default = dist.group.WORLD
    assert default is not None
    if mesh.num_sharding_groups == 1:
        return ExpertGroups(experts=default, tokens=own_group([list(range(mesh.world_size))]))
    shards = mesh.sharding_groups()
    return ExpertGroups(experts=own_group(shards), tokens=own_group(shards), replicate=own_group(mesh.replicate_groups()), everyone=default)


def tensor_groups(mesh: Mesh) -> TensorGroups | None:
    """As `expert_groups`; None: every rank has all of the model outside its experts."""
    if mesh.tp_size == 1:
        return None
    return TensorGroups(tensor=own_group(mesh.tensor_groups()), data=own_group(mesh.data_groups()))


def own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """A new process group for each of `groups`, which share out all ranks; the one that this rank is in. Every rank must call it."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=TIMEOUT)
        if dist.get_rank() in ranks:
            own = group
    assert isinstance(own, dist.ProcessGroup)  # a rank outside all groups would get a number
    return own
