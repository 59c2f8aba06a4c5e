"""The ranks of a test, in the form that a run has them."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks


def ranks_of(rank: int, world_size: int) -> Ranks:
    world, tokens = dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=60))
    assert world is not None
    assert isinstance(tokens, dist.ProcessGroup)
    return Ranks(rank, world_size, torch.device("cpu"), ExpertGroups(experts=world, tokens=tokens))
