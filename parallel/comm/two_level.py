"""The two collectives over leaders: an expert crosses to each other node once, and a node's sum of gradients comes back once.

A gather sends owner → leader → the other ranks of the leader's node; a reduction takes the same way back. Replicas in the owner's own
node deal with it directly. Who leads is decided by `hecate.parallel.gather_bytes.leaders`.

Each is two exchanges. The second starts by itself as soon as the first is done here, in a callback of the first one's future: on gloo in
one of its threads, on NCCL at once and on a stream of its own, so neither needs the caller. The callbacks of two collectives may run in
another order on another rank; the messages of a second exchange therefore carry a tag that belongs to the collective. NCCL has no tags
and needs none: there callbacks run in the order of the calls.

Shapes: as in `hecate.parallel.comm.collectives`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.collectives import Exchange, Handle, index, into_slots, owned_rows, slot_rows, sum_by_rank
from hecate.parallel.placement import Placement
from hecate.parallel.routes import Moves, Run, TwoLevelMoves


def two_level_all_gather(
    owned_nC: Tensor, placement: Placement, moves: TwoLevelMoves, group: dist.ProcessGroup, into_SC: Tensor | None = None
) -> Handle[Tensor]:
    """`sparse_all_gather` over leaders: same conditions, same result.

    Args:
        moves: of this placement (see `two_level_moves`); rank r of its topology is rank r of the group.
    """
    rank = dist.get_rank(group)
    first_moves, second_moves = moves.gather
    first = Exchange([first_moves], group)
    (leading,) = first.received
    second = _SecondExchange(second_moves, group, owned_nC, back=False)
    # A leader forwards some of what it received; each expert came once, so its row is found by the expert.
    order = np.argsort(leading.expert_M)
    rows = index(order[np.searchsorted(leading.expert_M, second.sent.expert_M, sorter=order)], owned_nC.device)
    first.start([owned_rows(owned_nC, placement, rank, first.sent[0].expert_M)])
    arrive = second.follow(first, lambda: first.arrived()[rows])

    def finish() -> Tensor:
        return into_slots(owned_nC, placement, rank, [(leading, first.arrived()), (second.received, second.buffer_MC)], into_SC)

    return Handle(arrive, finish, _added(first.bytes_to, second.bytes_to))


def two_level_reduce_scatter(grad_SC: Tensor, placement: Placement, moves: TwoLevelMoves, group: dist.ProcessGroup) -> Handle[Tensor]:
    """`sparse_reduce_scatter` over leaders: same conditions, same result but for the order of the sums.

    A leader adds up its node's terms by rank ascending. The owner adds up its own term, those of its node and the sums of other nodes by
    rank ascending, the leader's rank standing for its node. So the result is deterministic; it rounds otherwise than the flat one.
    """
    rank = dist.get_rank(group)
    first_moves, second_moves = moves.reduce
    first = Exchange([first_moves], group, back=True)
    second = _SecondExchange(second_moves, group, grad_SC, back=True)
    led_experts = np.sort(second.sent.expert_M)
    by_owner = index(np.searchsorted(led_experts, second.sent.expert_M), grad_SC.device)
    first.start([slot_rows(grad_SC, placement, rank, first.sent[0].expert_M)])

    def total(experts: np.ndarray, *sums: tuple[Run, Tensor]) -> Tensor:
        terms = _only(experts, first.received[0], first.arrived())
        return sum_by_rank(experts, slot_rows(grad_SC, placement, rank, experts), rank, [terms, *sums])

    arrive = second.follow(first, lambda: total(led_experts)[by_owner])

    def finish() -> Tensor:
        return total(placement.owned_by(rank), (second.received, second.buffer_MC))

    return Handle(arrive, finish, _added(first.bytes_to, second.bytes_to))


_tags: WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = WeakKeyDictionary()


def _next_tag(group: dist.ProcessGroup) -> int:
    """The same on every rank, as all call the collectives of a group in the same order; long in coming back."""
    return next(_tags.setdefault(group, itertools.cycle(range(2**16))))


class _SecondExchange:
    """Messages between pairs of ranks; a rank without any does nothing."""

    def __init__(self, moves: Moves, group: dist.ProcessGroup, like_nC: Tensor, *, back: bool) -> None:
        rank = dist.get_rank(group)
        along, against = moves.sent(rank), moves.received(rank)
        self.sent, self.received = (against, along) if back else (along, against)
        self.buffer_MC = like_nC.new_empty((len(self.received.expert_M), like_nC.shape[1]))
        """what has arrived"""
        chunk_bytes = like_nC.shape[1] * like_nC.element_size()
        self.bytes_to = [count * chunk_bytes for count in self.sent.count_D]
        self._group = group
        self._tag = _next_tag(group)
        self._works: list[dist.Work] = []

    def follow(self, first: Exchange, rows: Callable[[], Tensor]) -> Callable[[], None]:
        """Have it started when `first` is done, with the chunks [M, C] that `rows` makes then; returns what waits for both.

        On CUDA `rows` runs on another stream, which has waited for what was queued before `first` was started, and for `first`.
        """
        if first.work is None:
            assert not self.sent.pieces
            assert not self.received.pieces
            return lambda: None
        if not self.sent.pieces and not self.received.pieces:
            return first.wait

        def start(done: torch.futures.Future) -> None:
            done.value()  # raises if the first exchange failed
            self._start(rows())

        started = first.work.get_future().then(start)

        def arrive() -> None:
            started.wait()
            for work in self._works:
                work.wait()

        return arrive

    def _start(self, rows_MC: Tensor) -> None:
        operations = [
            dist.P2POp(operation, rows[piece], group=self._group, tag=self._tag, group_peer=peer)
            for operation, rows, run in ((dist.isend, rows_MC, self.sent), (dist.irecv, self.buffer_MC, self.received))
            for peer, piece in run.pieces
        ]
        self._works = dist.batch_isend_irecv(operations)
        if rows_MC.is_cuda:
            # Waits nowhere but on the callback's stream, whose memory may be used again only after the sends.
            for work in self._works:
                work.wait()


def _only(experts: np.ndarray, run: Run, rows_MC: Tensor) -> tuple[Run, Tensor]:
    """The part of a run that is about the given experts."""
    kept_M = np.isin(run.expert_M, experts)
    peer_M = np.repeat(np.arange(len(run.count_D)), run.count_D)
    part = Run(run.expert_M[kept_M], np.bincount(peer_M[kept_M], minlength=len(run.count_D)).tolist())
    return part, rows_MC[index(np.flatnonzero(kept_M), rows_MC.device)]


def _added(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
