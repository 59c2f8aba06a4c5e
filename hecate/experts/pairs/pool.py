"""A pool: numbers that experts of several units share and train together, in the place of chunks of their own.

It is cut into blocks, one for each expert that draws on it. Ranks own blocks as they own experts, and hold replicas of the whole pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.parallel.values.layout import ExpertLayout, TensorSpec
from hecate.parallel.values.units import Unit, pool_unit


@dataclass(frozen=True, eq=False)
class Pool:
    """The pool of units of one place and shape (an `OwnedChunks`, whose chunks are the blocks)."""

    units: Sequence[tuple[Unit, int]]
    """The units that share the pool, ascending, with the number of their experts."""
    specs: tuple[TensorSpec, ...]
    """The tensors of a block."""
    initial: Callable[[Unit, int], Tensor]
    """Returns the initial block of a unit's expert, float64 [C]."""
    dtype: torch.dtype
    device: torch.device

    @property
    def unit(self) -> Unit:
        """The pool's name, which no unit with experts has."""
        return pool_unit(self.units[0][0])

    @property
    def num_experts(self) -> int:
        """The number of blocks."""
        return sum(experts for _, experts in self.units)

    @property
    def replica_dtype(self) -> torch.dtype:
        return self.dtype

    def layout(self) -> ExpertLayout:
        return ExpertLayout(self.specs)

    def init_chunk(self, expert: int) -> Tensor:
        """[C]: a function of the name of the block's expert alone."""
        named = [(unit, number) for unit, experts in self.units for number in range(experts)]
        return self.initial(*named[expert]).to(device=self.device, dtype=self.dtype)

    def no_chunks(self) -> Tensor:
        return torch.empty((0, self.layout().trainable_numel), dtype=self.dtype, device=self.device)
