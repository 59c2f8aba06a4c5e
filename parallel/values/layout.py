"""The tensors of one expert, and the position of each in the flat chunk that is sent between ranks."""

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
    """The trainable and the frozen tensors of one expert.

    The trainable tensors are laid out one after the other in a flat *chunk* of `trainable_numel` elements, which is owned, gathered,
    reduced and stepped as a whole. The frozen tensors never change, so a copy of them never becomes stale.
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
