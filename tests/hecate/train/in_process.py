"""Trainings of ranks that a test starts itself, without the launcher."""

from __future__ import annotations

import torch

from hecate.parallel.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks

# Five experts in two layers never share out evenly over these ranks; dropout is on.
OVERRIDES = ("model.dtype=float64", "data.eval=[]", "eval.generate=false", "moe.num_experts=5", "micro_batch_size=1", "fssdp.policy=hecate")


def ranks_of_default_group(rank: int, world: int, shard_size: int | None = None) -> Ranks:
    return Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world, shard_size)))


Losses = list[tuple[float, float, float]]
