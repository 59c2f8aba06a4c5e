"""The layout without owners: every rank holds an equal slice of every expert's chunk.

Any placement is restored by one all-to-all in which every rank sends a slice of each replica, so no owner of hot experts is a bottleneck;
but replicas on every rank are rebuilt from all ranks' slices, also those that an owner would have had at home. Source: fully sharded
expert parallelism of LAER-MoE (ASPLOS 2026).

Shapes: E experts, D ranks, C elements of a chunk, P = ceil(C / D) elements of a slice, S slots here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hecate.parallel.collectives import Handle, index
from hecate.parallel.placement import Placement


def slice_numel(chunk_numel: int, world_size: int) -> int:
    """Elements of one rank's slice of a chunk; the slices of all ranks together may be longer than the chunk."""
    return -(-chunk_numel // world_size)


def slice_of(chunk_EC: Tensor, rank: int, world_size: int) -> Tensor:
    """[E, P]: a rank's slice of each chunk, with zeros behind the chunk's end."""
    numel = slice_numel(chunk_EC.shape[1], world_size)
    return F.pad(chunk_EC, (0, numel * world_size - chunk_EC.shape[1]))[:, rank * numel : (rank + 1) * numel].contiguous()


def sharded_all_gather(shard_EP: Tensor, placement: Placement, chunk_numel: int, group: dist.ProcessGroup) -> Handle[Tensor]:
    """Start putting together the experts of `placement` where they are wanted. Its owners only count as ranks that want them.

    Every rank of the group must call it, in the same order, with the same placement. `shard_EP` must not change before `wait()` returns.

    Args:
        shard_EP: [experts, P], this rank's slices (see `slice_of`), any dtype.
        chunk_numel: C.

    Returns:
        A handle whose result is [slots, C], slot s holding expert `placement.experts_on(rank)[s]`.
    """
    rank, world, slots_D = _sizes(placement, group)
    numel = slice_numel(chunk_numel, world)
    assert shard_EP.shape == (placement.num_experts, numel), (shard_EP.shape, placement.num_experts, numel)
    # By destination, then by slot there.
    send_MP = shard_EP[index(placement.where_ED.T.nonzero()[1], shard_EP.device)]
    recv_MP = shard_EP.new_empty((world * slots_D[rank], numel))
    work = dist.all_to_all_single(recv_MP, send_MP, [slots_D[rank]] * world, slots_D, group=group, async_op=True)

    def finish() -> Tensor:
        slices = [recv_SP[:, : max(0, chunk_numel - peer * numel)] for peer, recv_SP in enumerate(recv_MP.split(slots_D[rank]))]
        return torch.cat(slices, dim=1) if slots_D[rank] else shard_EP.new_empty((0, chunk_numel))

    return Handle(work.wait, finish, _bytes_to(slots_D, rank, numel * shard_EP.element_size()))


def sharded_reduce_scatter(grad_SC: Tensor, placement: Placement, group: dist.ProcessGroup) -> Handle[Tensor]:
    """Start summing the gradients of the replicas, each slice on its rank.

    Every rank of the group must call it, in the same order, with the same placement. The terms of each sum are added by rank ascending.

    Args:
        grad_SC: [slots, C], in the slot order of `sharded_all_gather`'s result.

    Returns:
        A handle whose result is [experts, P], zero behind the chunks' ends.
    """
    rank, world, slots_D = _sizes(placement, group)
    chunk_numel = grad_SC.shape[1]
    numel = slice_numel(chunk_numel, world)
    padded_SDP = F.pad(grad_SC, (0, world * numel - chunk_numel)).view(-1, world, numel)
    send_MP = padded_SDP.transpose(0, 1).reshape(-1, numel)
    recv_MP = grad_SC.new_empty((sum(slots_D), numel))
    work = dist.all_to_all_single(recv_MP, send_MP, slots_D, [slots_D[rank]] * world, group=group, async_op=True)

    def finish() -> Tensor:
        total_EP = grad_SC.new_zeros((placement.num_experts, numel))
        for peer, term_SP in enumerate(recv_MP.split(slots_D)):
            total_EP[index(placement.experts_on(peer), grad_SC.device)] += term_SP
        return total_EP

    return Handle(work.wait, finish, _bytes_to([slots_D[rank]] * world, rank, numel * grad_SC.element_size()))


def _sizes(placement: Placement, group: dist.ProcessGroup) -> tuple[int, int, list[int]]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    assert placement.world_size == world, (placement.world_size, world)
    return rank, world, placement.where_ED.sum(0).tolist()


def _bytes_to(rows_D: list[int], rank: int, row_bytes: int) -> list[int]:
    return [0 if peer == rank else rows * row_bytes for peer, rows in enumerate(rows_D)]
