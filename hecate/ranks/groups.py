"""The process groups of a mesh. All that talk among fewer ranks than the world are made here, by every rank in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from hecate.engine.engine import ExpertGroups
from hecate.model.tensor_parts import TensorGroups
from hecate.parallel.mesh import Mesh

# Long enough for one rank to evaluate while the others wait, short against gloo's half hour.
TIMEOUT = timedelta(minutes=10)


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
