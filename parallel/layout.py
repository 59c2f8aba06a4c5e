"""The tensors of one expert, and where each lies in the flat chunk that travels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class ChunkSize(NamedTuple):
    """How large the flat chunk of one expert is."""

    numel: int
    element_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.numel * self.element_bytes


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an expert, by name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ExpertLayout:
    """The tensors of one expert, split into the trainable ones and the frozen ones.

    Trainable tensors are laid out one after the other in a flat *chunk* of `trainable_numel` elements: the unit that is owned,
    gathered, reduced and stepped. Frozen tensors are never reduced nor stepped, and never go stale.
    """

    trainable: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...] = ()

    def __post_init__(self) -> None:
        names = [spec.name for spec in (*self.trainable, *self.frozen)]
        assert len(set(names)) == len(names), f"tensor names of an expert must differ: {names}"

    @property
    def trainable_numel(self) -> int:
        return sum(spec.numel for spec in self.trainable)

    @property
    def frozen_numel(self) -> int:
        return sum(spec.numel for spec in self.frozen)
