"""Where the experts of one layer are: their owners, and the ranks on which they are materialized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Placement:
    """Owners of a layer's experts and their materialization for one iteration (P0 and P1 of Hecate §3.1).

    *Owned shard*: an expert's master parameters and optimizer state, on its one owner. *Replica*: a copy of its parameters
    for this iteration, the owner's own included. *Slot*: the index of a replica among those of a rank, by expert ascending.
    """

    owner_E: np.ndarray
    """int64 [experts]: the owner rank of each expert"""
    where_ED: np.ndarray
    """bool [experts, ranks]: the ranks that hold a replica; always true at the owner"""

    def __post_init__(self) -> None:
        experts, ranks = self.where_ED.shape
        assert self.owner_E.shape == (experts,), (self.owner_E.shape, self.where_ED.shape)
        assert self.where_ED.dtype == np.bool_, self.where_ED.dtype
        assert ((self.owner_E >= 0) & (self.owner_E < ranks)).all(), self.owner_E
        assert self.where_ED[np.arange(experts), self.owner_E].all(), "an owner must hold its own experts"
        self.owner_E.setflags(write=False)
        self.where_ED.setflags(write=False)

    @property
    def num_experts(self) -> int:
        return self.where_ED.shape[0]

    @property
    def world_size(self) -> int:
        return self.where_ED.shape[1]

    def owned_by(self, rank: int) -> np.ndarray:
        """Experts that `rank` owns, ascending."""
        return np.flatnonzero(self.owner_E == rank)

    def experts_on(self, rank: int) -> np.ndarray:
        """Experts materialized on `rank`, ascending: slot s holds `experts_on(rank)[s]`."""
        return np.flatnonzero(self.where_ED[:, rank])

    def slot_of_expert(self, rank: int) -> np.ndarray:
        """int64 [experts]: the slot of each expert on `rank`, -1 where it is not materialized."""
        held_E = self.where_ED[:, rank]
        return np.where(held_E, np.cumsum(held_E) - 1, -1)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Placement) and self._value == other._value)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _value(self) -> tuple[bytes, bytes, tuple[int, ...]]:
        return self.owner_E.tobytes(), self.where_ED.tobytes(), self.where_ED.shape

    @cached_property
    def _hash(self) -> int:
        return hash(self._value)


def contiguous_owners(num_experts: int, world_size: int) -> np.ndarray:
    """int64 [experts]: equal runs of consecutive experts per rank (expert parallelism's homes), for any two numbers."""
    return np.arange(num_experts, dtype=np.int64) * world_size // num_experts


def owners_by_memory(num_experts: int, memory_D: Sequence[float]) -> np.ndarray:
    """int64 [experts]: runs of consecutive experts, of as many on each rank as its share of the memory says; equal ones on equal ranks."""
    if len(set(memory_D)) == 1:
        return contiguous_owners(num_experts, len(memory_D))
    ends_D = np.cumsum(memory_D) / np.sum(memory_D) * num_experts
    return np.minimum(np.searchsorted(ends_D, np.arange(num_experts) + 0.5), len(memory_D) - 1).astype(np.int64)


def redealt_owners(holders: Sequence[np.ndarray], world_size: int) -> list[np.ndarray]:
    """Owners on another number of ranks: who holds an expert keeps it, as far as all ranks then own equally many, within one.

    Experts that nobody holds go first, each to the rank that owns fewest of all layers, of those to the one that owns fewest of its
    layer; then ranks that own more than one too many lose their last ones. Ties go to the lowest rank. It is a pure function.

    Args:
        holders: of each layer int64 [experts]: a rank below `world_size`, or any other number for nobody.

    Returns:
        Per layer int64 [experts].
    """
    owners = [np.where((holder_E >= 0) & (holder_E < world_size), holder_E, -1) for holder_E in holders]
    owned_LD = np.zeros((len(owners), world_size), dtype=np.int64)
    for layer, owner_E in enumerate(owners):
        owned_LD[layer] = np.bincount(owner_E[owner_E >= 0], minlength=world_size)
    if not owners:
        return owners

    def give(layer: int, expert: int) -> None:
        rank = int(np.lexsort((owned_LD[layer], owned_LD.sum(0)))[0])
        owners[layer][expert] = rank
        owned_LD[layer, rank] += 1

    for layer, owner_E in enumerate(owners):
        for expert in np.flatnonzero(owner_E < 0).tolist():
            give(layer, expert)
    while (owned_D := owned_LD.sum(0)).max() - owned_D.min() > 1:
        fullest = int(owned_D.argmax())
        most = int(owned_LD[:, fullest].argmax())
        owned_LD[most, fullest] -= 1
        give(most, int(np.flatnonzero(owners[most] == fullest)[-1]))
    return owners


def new_copies(before: Placement | None, after: Placement) -> int:
    """Return how many replicas that are not their owners' own a layer has in `after` on ranks where it had none in `before`.

    Args:
        before: None, or of other ranks or experts: ranks had no replica.
    """
    if before is None or before.where_ED.shape != after.where_ED.shape:
        return int(np.count_nonzero(after.where_ED)) - after.num_experts  # an owner always holds its own
    if before is after:
        return 0
    where_ED = after.where_ED & ~before.where_ED
    where_ED[np.arange(after.num_experts), after.owner_E] = False
    return int(np.count_nonzero(where_ED))


def everything_everywhere(owner_E: np.ndarray, world_size: int) -> Placement:
    """Every expert on every rank."""
    return Placement(owner_E.copy(), np.ones((len(owner_E), world_size), dtype=bool))


def owners_only(owner_E: np.ndarray, world_size: int) -> Placement:
    """Every expert on its owner and nowhere else."""
    return Placement(owner_E.copy(), owner_E[:, None] == np.arange(world_size)[None, :])
