"""Tensor parallelism: parameters of which each rank of a tensor group holds a part, and steps it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


@dataclass(frozen=True)
class TensorParts:
    """This rank's parts of parameters."""

    parameters: dict[str, nn.Parameter]
    dims: Mapping[str, int]
    """along which each is cut, into equal parts by rank ascending"""
    groups: TensorGroups

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All ranks' parts put together, of the parameter or of something of its shape. Every rank of the tensor group must call it."""
        mine = part.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.groups.tp_size)]
        dist.all_gather(parts, mine, group=self.groups.tensor)
        return torch.cat(parts, self.dims[name])

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """What this rank has of it."""
        return whole.chunk(self.groups.tp_size, self.dims[name])[self.groups.tp_rank]
