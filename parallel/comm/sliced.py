"""The collectives over leaders with every expert cut into slices: no owner's port carries a hot expert once for each replica.

An owner sends each slice to another one of the ranks that want the expert, and these hand their slices on to each other, so all ports
carry about the same. A reduction takes the same way back: each leader sums its slice of its node's gradients by rank ascending, then the
owner adds up the leaders' sums by rank ascending; deterministic, and rounded otherwise than the flat one.

Shapes: as in `hecate.parallel.comm.collectives`.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.collectives import Handle
from hecate.parallel.comm.two_level import two_level_all_gather, two_level_reduce_scatter
from hecate.parallel.routes import SlicedMoves


def sliced_all_gather(owned_nC: Tensor, moves: SlicedMoves, group: dist.ProcessGroup, into_SC: Tensor | None = None) -> Handle[Tensor]:
    """`sparse_all_gather` in slices: same conditions, same result.

    Args:
        moves: of the placement (see `sliced_moves`); rank r of its topology is rank r of the group.
    """
    if into_SC is None:
        slots = int(moves.placement.where_ED[:, dist.get_rank(group)].sum()) // moves.slices
        into_SC = owned_nC.new_empty((slots, owned_nC.shape[1]))
    into = into_SC
    gathering = two_level_all_gather(_in_slices(owned_nC, moves), moves.placement, moves.moves, group, _in_slices(into, moves))

    def finish() -> Tensor:
        gathering.wait()
        return into

    return Handle(lambda: None, finish, gathering.bytes_to)


def sliced_reduce_scatter(grad_SC: Tensor, moves: SlicedMoves, group: dist.ProcessGroup) -> Handle[Tensor]:
    """`sparse_reduce_scatter` in slices: same conditions, same result but for the order of the sums."""
    chunk_numel = grad_SC.shape[1]
    reducing = two_level_reduce_scatter(_in_slices(grad_SC, moves), moves.placement, moves.moves, group)

    def finish() -> Tensor:
        total = reducing.wait()
        return total.view(len(total) // moves.slices, chunk_numel)

    return Handle(lambda: None, finish, reducing.bytes_to)


def _in_slices(chunk_nC: Tensor, moves: SlicedMoves) -> Tensor:
    """[n · slices, C / slices], on the same memory where the chunks are contiguous."""
    return chunk_nC.reshape(len(chunk_nC) * moves.slices, chunk_nC.shape[1] // moves.slices)
