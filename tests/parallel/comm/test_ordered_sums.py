"""Sums over ranks in a fixed order: bit for bit the tree by hand, however positions are divided."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.ordered_sums import gather_in_order, reduce_in_order, sum_in_order
from hecate.parallel.values.summation import SumOrder, TreeSum
from testing.ranks import run_ranks

ROWS, WIDTH = 4, 7
DIVISIONS = [(5,), (2, 3), (1, 4), (3, 0, 2), (0, 1, 4)]


def position(number: int) -> Tensor:
    """Of sizes so different that each order of the sum rounds otherwise."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number)) * 10.0 ** (number % 3)


def by_hand() -> Tensor:
    a, b, c, d, e = map(position, range(5))
    assert not torch.equal(((a + b) + (c + d)) + e, (((a + b) + c) + d) + e), "the order does not show"
    return ((a + b) + (c + d)) + e


def summed(rank: int, world: int, shares: tuple[int, ...]) -> None:
    group = dist.group.WORLD
    assert group is not None
    ends = [sum(shares[:peer]) for peer in range(world + 1)]
    order = SumOrder(tuple(range(ends[peer], ends[peer + 1]) for peer in range(world)))
    blocks_of = [order.blocks([peer]) for peer in range(world)]

    def own(shape: tuple[int, ...] = (ROWS, WIDTH)) -> TreeSum[Tensor]:
        sums: TreeSum[Tensor] = TreeSum(5)
        for number in order.ranges[rank]:
            sums.add((number, number + 1), position(number).view(shape))
        return sums

    wanted = by_hand()
    # The first rank gets most rows, and another one none.
    rows_of = [[0, 2, 3], [1], []][:world] if world > 1 else [[2, 0, 1, 3]]
    handle = reduce_in_order(own(), rows_of, blocks_of, 5, wanted, group)
    got = handle.wait()
    assert torch.equal(got.total, wanted[rows_of[rank]])
    sent = [0 if peer == rank else len(blocks_of[rank]) * len(rows_of[peer]) * WIDTH * 4 for peer in range(world)]
    assert handle.bytes_to == sent
    assert torch.equal(gather_in_order(own(), blocks_of, 5, wanted, group).wait(), wanted)
    assert torch.equal(sum_in_order(own((ROWS * WIDTH,)), order, wanted.flatten(), group), wanted.flatten())


def test_all_divisions() -> None:
    for shares in DIVISIONS:
        run_ranks(len(shares), summed, shares)
