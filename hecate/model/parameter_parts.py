"""Tensor parallelism: parameters of which each rank of a tensor group holds a part, and steps it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.parallel.comm.aborts import arrived
from hecate.ranks.groups import TensorGroups


@dataclass
class TensorParts:
    """This rank's parts of parameters. Its groups change when ranks are lost."""

    parameters: dict[str, nn.Parameter]
    dims: Mapping[str, int]
    """The dimension along which each parameter is cut, into equal parts by rank ascending."""
    groups: TensorGroups

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a parameter, or of something of its shape, from all ranks' parts. Every rank of the tensor group must call it."""
        mine = part.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.groups.tp_size)]
        dist.all_gather(parts, mine, group=self.groups.tensor)
        return arrived(torch.cat(parts, self.dims[name]), self.groups.tensor)

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of it."""
        return whole.chunk(self.groups.tp_size, self.dims[name])[self.groups.tp_rank]
