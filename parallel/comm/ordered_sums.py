"""Sums over all ranks in the order of a fixed tree (`hecate.parallel.values.summation`): the same bits at any number of ranks.

A rank sends the sums of its whole subtrees, and whoever is to have a row adds what arrives as the tree says. Gradients of experts go to
their owners, and what several sharding groups have, to the owners in all of them; vectors that all ranks need go in pieces to all ranks,
which exchange the sums. It all runs on any torch.distributed backend.

Shapes: R rows of a part, n of them for this rank, C elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hecate.parallel.comm.collectives import Handle
from hecate.parallel.comm.exchanges import all_gather_single
from hecate.parallel.values.summation import Block, SumOrder, TreeSum


def reduce_in_order(
    own: TreeSum[Tensor],
    rows_of: Sequence[Sequence[int]],
    blocks_of: Sequence[Sequence[Block]],
    size: int,
    like_nC: Tensor,
    group: dist.ProcessGroup,
) -> Handle[TreeSum[Tensor]]:
    """Start sending each rank the rows of every part that it is to have. Every rank of the group must call it, in the same order.

    Args:
        own: the sums of this rank's blocks, [R, C] each; they must not change before `wait()` returns.
        rows_of: the rows that each rank of the group gets.
        blocks_of: the blocks that each rank of the group has sums of.
        size: the number of positions.
        like_nC: any tensor of C columns, of the parts' dtype and device: a rank may have no part.

    Returns:
        A handle whose result has the sums of all blocks of the group's ranks, [n, C] each.
    """
    rank, world, width = dist.get_rank(group), dist.get_world_size(group), like_nC.shape[1]
    assert sorted(own.parts) == sorted(blocks_of[rank]), (sorted(own.parts), blocks_of[rank])
    numel = len(rows_of[rank]) * width
    receive = [0 if peer == rank else len(blocks_of[peer]) * numel for peer in range(world)]
    send = [0 if peer == rank else len(own.parts) * len(rows_of[peer]) * width for peer in range(world)]
    pieces = [own.parts[block][rows_of[peer]].flatten() for peer in range(world) if peer != rank for block in blocks_of[rank]]
    sent, arriving = torch.cat([like_nC.new_empty(0), *pieces]), like_nC.new_empty(sum(receive))  # `cat` refuses an empty list
    work = dist.all_to_all_single(arriving, sent, receive, send, group=group, async_op=True) if world > 1 else None

    def arrive() -> None:
        if work is not None:
            work.wait()

    def finish() -> TreeSum[Tensor]:
        # The tree says which sums are added to which, so the order in which blocks come to it does not change a bit of the result.
        tree: TreeSum[Tensor] = TreeSum(size)
        for peer, flat in enumerate(arriving.split(receive)):
            if peer == rank:
                for block in blocks_of[rank]:
                    tree.add(block, own.parts[block][rows_of[rank]])
            else:
                for block, part in zip(blocks_of[peer], flat.view(len(blocks_of[peer]), len(rows_of[rank]), width), strict=True):
                    tree.add(block, part)
        return tree

    return Handle(arrive, finish, [count * like_nC.element_size() for count in send])


def gather_in_order(
    own: TreeSum[Tensor], blocks_of: Sequence[Sequence[Block]], size: int, like_nC: Tensor, group: dist.ProcessGroup
) -> Handle[Tensor]:
    """Start exchanging all parts with all ranks of the group, whose blocks together are all positions. Every rank must call it.

    Args:
        own, blocks_of, size, like_nC: as in `reduce_in_order`; `like_nC` has the shape of the parts.

    Returns:
        A handle whose result is the sum of all positions, [n, C].
    """
    rank, world, most = dist.get_rank(group), dist.get_world_size(group), max(map(len, blocks_of))
    # One shape for all ranks: a rank with fewer blocks than another sends something else in their place.
    sent = torch.stack([own.parts[block] for block in blocks_of[rank]] + [like_nC] * (most - len(blocks_of[rank])))
    table = sent.new_empty((world, *sent.shape))
    work = all_gather_single(table.view(-1), sent.view(-1), group=group, async_op=True)

    def finish() -> Tensor:
        tree: TreeSum[Tensor] = TreeSum(size)
        for blocks, parts in zip(blocks_of, table, strict=True):
            for block, part in zip(blocks, parts, strict=False):  # what was sent to fill up is left out
                tree.add(block, part)
        return tree.total

    num_bytes = sent.numel() * sent.element_size()
    return Handle(work.wait, finish, [0 if peer == rank else num_bytes for peer in range(world)])


def sum_in_order(own: TreeSum[Tensor], order: SumOrder, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all positions' vectors, on all ranks of the job. Every rank must call it.

    Args:
        own: the sums of this rank's blocks, vectors like `like`.
    """
    world, numel = dist.get_world_size(group), like.numel()
    blocks_of = [order.blocks([rank]) for rank in range(world)]
    if world == 1:
        return own.total
    width = -(-numel // world)
    cut: TreeSum[Tensor] = TreeSum(order.size)
    cut.parts = {block: F.pad(part, (0, width * world - numel)).view(world, width) for block, part in own.parts.items()}
    rows_of = [[peer] for peer in range(world)]
    piece = reduce_in_order(cut, rows_of, blocks_of, order.size, like.new_empty((0, width)), group).wait().total
    whole = piece.new_empty((world, width))
    all_gather_single(whole.view(-1), piece.flatten(), group=group)
    return whole.flatten()[:numel]
