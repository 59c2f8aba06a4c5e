"""The order in which numbers of a step are added where it must depend on no rank (`deterministic`): a fixed tree over positions.

A micro-step's sequences are cut into groups of equally many neighbours. A group has a position, from 0, and is computed by itself. Sums
over the micro-steps of one position come first, in their order. The sums of positions are then added as a tree says that depends on the
number of positions alone: all positions together are those below the largest power of two that leaves some, plus the rest, and so on. A
rank has neighbouring positions, and so some whole subtrees, which it adds up before anything travels: few numbers travel more than in any
other order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import iadd
from typing import Any, Generic, TypeVar

Block = tuple[int, int]
"""the positions of a subtree: the first, and the one after the last"""

T = TypeVar("T", bound=Any)


@dataclass(frozen=True)
class SumOrder:
    """Which positions of a micro-step each rank has."""

    ranges: tuple[range, ...]
    """the positions of each rank of the job: consecutive, from 0; some may be empty"""

    @property
    def size(self) -> int:
        """The number of positions."""
        return self.ranges[-1].stop

    @property
    def passes(self) -> int:
        """The most positions of a rank. All ranks run as many passes, so that their collectives match."""
        return max(map(len, self.ranges))

    def blocks(self, ranks: Sequence[int]) -> list[Block]:
        """The fewest subtrees that the positions of neighbouring ranks, ascending, make up."""
        return whole_blocks(self.size, range(self.ranges[ranks[0]].start, self.ranges[ranks[-1]].stop))


def whole_blocks(size: int, part: range) -> list[Block]:
    """The fewest subtrees, ascending, of a tree over `size` positions that make up some consecutive positions."""

    def inside(block: Block) -> list[Block]:
        if max(block[0], part.start) >= min(block[1], part.stop):
            return []
        if part.start <= block[0] and block[1] <= part.stop:
            return [block]
        return [found for half in halves(block) for found in inside(half)]

    return inside((0, size))


def halves(block: Block) -> tuple[Block, Block]:
    """The two subtrees of a block of at least two positions."""
    first, end = block
    middle = first + (1 << (end - first - 1).bit_length() - 1)
    return (first, middle), (middle, end)


class TreeSum(Generic[T]):
    """The sums of some blocks of a tree. Two halves of a block are added as soon as both are known, so that few are held."""

    def __init__(self, size: int) -> None:
        """Args:
        size: the number of the tree's positions.
        """
        self._size = size
        self.parts: dict[Block, T] = {}
        """the sums of blocks that are not added to their neighbours yet"""

    def add(self, block: Block, value: T) -> None:
        """Add the sum of a block, which from now on belongs to the tree, that may change it in place."""
        self.parts[block] = value
        for parent in reversed(self._above(block)):
            left, right = halves(parent)
            if left not in self.parts or right not in self.parts:
                return
            self.parts[parent] = iadd(self.parts.pop(left), self.parts.pop(right))

    @property
    def total(self) -> T:
        """The sum of all positions, all of which have been added."""
        return self.parts[0, self._size]

    def _above(self, block: Block) -> list[Block]:
        """The blocks that contain a block, the largest first."""
        found, current = [], (0, self._size)
        while current != block:
            found.append(current)
            left, right = halves(current)
            current = left if block[1] <= left[1] else right
        return found


class PositionSums(Generic[T]):
    """The sums of a rank's positions over the micro-steps of a step, and of these in turn those of whole subtrees."""

    def __init__(self, size: int) -> None:
        """Args:
        size: the number of positions of all ranks.
        """
        self.sums: TreeSum[T] = TreeSum(size)
        self._so_far: dict[int, T] = {}

    def add(self, position: int | None, value: T, *, last: bool) -> None:
        """Add what a micro-step has made of a position; None: of no position, which counts nowhere.

        Args:
            value: belongs to the sums from now on, which may change it in place.
            last: it is the step's last micro-step.
        """
        if position is None:
            return
        if position in self._so_far:
            value = iadd(self._so_far.pop(position), value)
        if last:
            self.sums.add((position, position + 1), value)
        else:
            self._so_far[position] = value
