"""SparseAllGather and SparseReduceScatter: expert chunks from their owners to their replicas, and gradients back.

Both carry out a Placement and decide nothing. They are one uneven all-to-all each, so they run on any torch.distributed backend
and a rank that sends or receives nothing costs nothing, but still takes part.

Shapes: n owned experts here, S slots here, C elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.placement import Placement


class Handle:
    """A collective under way. `wait()` returns its result; calling it again returns the same tensor."""

    def __init__(self, work: dist.Work | None, finish: Callable[[], Tensor], bytes_sent: int) -> None:
        self._work = work
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None
        self.bytes_sent = bytes_sent
        """bytes that this rank sends to other ranks"""

    def wait(self) -> Tensor:
        if self._finish is not None:
            if self._work is not None:
                self._work.wait()
            self._result = self._finish()
            self._work = self._finish = None
        assert self._result is not None
        return self._result


def sparse_all_gather(owned_nC: Tensor, placement: Placement, group: dist.ProcessGroup) -> Handle:
    """Start copying the experts of `placement` from their owners to the ranks that need them.

    Every rank of the group must call it, in the same order, with the same placement; ranks are those of the group. The owned
    chunks must not change before `wait()` returns. Source: Hecate (arXiv 2502.02581) §3.1, spAG(P0, P1).

    Args:
        owned_nC: [owned experts, C], this rank's owned chunks by expert ascending; contiguous, any dtype.

    Returns:
        A handle whose result is [slots, C], slot s holding expert `placement.experts_on(rank)[s]`.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    assert placement.world_size == world, (placement.world_size, world)
    owned_experts = placement.owned_by(rank)
    assert owned_nC.shape[0] == len(owned_experts), (owned_nC.shape, owned_experts)
    row_of = {int(expert): row for row, expert in enumerate(owned_experts)}
    sends = [[row_of[int(e)] for e in placement.sent(rank, peer)] for peer in range(world)]
    received = [placement.sent(peer, rank) for peer in range(world)]
    send_buffer = owned_nC[_index([row for rows in sends for row in rows], owned_nC.device)]
    recv_buffer = owned_nC.new_empty((sum(len(experts) for experts in received), owned_nC.shape[1]))
    work = _all_to_all(recv_buffer, send_buffer, [len(e) for e in received], [len(rows) for rows in sends], group)

    slot_of = placement.slot_of_expert(rank)
    own_slots = _index(slot_of[owned_experts].tolist(), owned_nC.device)
    other_slots = _index([int(slot_of[e]) for experts in received for e in experts], owned_nC.device)

    def finish() -> Tensor:
        replica_SC = owned_nC.new_empty((len(own_slots) + len(other_slots), owned_nC.shape[1]))
        replica_SC[own_slots] = owned_nC
        replica_SC[other_slots] = recv_buffer
        return replica_SC

    return Handle(work, finish, send_buffer.numel() * send_buffer.element_size())


def sparse_reduce_scatter(grad_SC: Tensor, placement: Placement, group: dist.ProcessGroup) -> Handle:
    """Start summing the gradients of the replicas onto the experts' owners.

    Every rank of the group must call it, in the same order, with the same placement. `grad_SC` must not change before `wait()`
    returns. The terms of each sum are added by rank ascending, so the result is deterministic. Source: Hecate (arXiv 2502.02581)
    §3.1, spRS(P1, P0).

    Args:
        grad_SC: [slots, C], in the slot order of `sparse_all_gather`'s result.

    Returns:
        A handle whose result is [owned experts, C], by expert ascending.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    assert placement.world_size == world, (placement.world_size, world)
    slot_of = placement.slot_of_expert(rank)
    owned_experts = placement.owned_by(rank)
    row_of = {int(expert): row for row, expert in enumerate(owned_experts)}
    sends = [[int(slot_of[e]) for e in placement.sent(peer, rank)] for peer in range(world)]
    received = [placement.sent(rank, peer) for peer in range(world)]
    send_buffer = grad_SC[_index([slot for slots in sends for slot in slots], grad_SC.device)]
    recv_buffer = grad_SC.new_empty((sum(len(experts) for experts in received), grad_SC.shape[1]))
    work = _all_to_all(recv_buffer, send_buffer, [len(e) for e in received], [len(slots) for slots in sends], group)
    own_slots = _index(slot_of[owned_experts].tolist(), grad_SC.device)

    def finish() -> Tensor:
        total_nC = grad_SC.new_zeros((len(owned_experts), grad_SC.shape[1]))
        start = 0
        for peer, experts in enumerate(received):
            if peer == rank:
                total_nC += grad_SC[own_slots]
                continue
            rows = _index([row_of[int(e)] for e in experts], grad_SC.device)
            total_nC[rows] += recv_buffer[start : start + len(experts)]
            start += len(experts)
        return total_nC

    return Handle(work, finish, send_buffer.numel() * send_buffer.element_size())


def _all_to_all(
    recv_buffer: Tensor, send_buffer: Tensor, recv_rows: list[int], send_rows: list[int], group: dist.ProcessGroup
) -> dist.Work | None:
    if dist.get_world_size(group) == 1:
        return None
    return dist.all_to_all_single(recv_buffer, send_buffer, recv_rows, send_rows, group=group, async_op=True)


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
