"""SparseAllGather and SparseReduceScatter: expert chunks from their owners to their replicas, and gradients back.

Both carry out a Placement and decide nothing. They are one uneven all-to-all each, also for several layers at once, so they run on any
torch.distributed backend, and a rank that sends or receives nothing costs nothing, but still takes part. See
`hecate.parallel.comm.two_level` for the way over leaders, `hecate.parallel.comm.sliced` for the one in slices.

Shapes: n owned experts here, S slots here, M chunks sent or received here, C elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.placement import Placement
from hecate.parallel.routes import Moves, Run, flat_moves

T = TypeVar("T")


class Handle(Generic[T]):
    """A collective under way. `wait()` returns its result; calling it again returns the same."""

    def __init__(self, arrive: Callable[[], None], finish: Callable[[], T], bytes_to: list[int]) -> None:
        """Args:
        arrive: waits until everything is here; may raise what went wrong on the way.
        finish: makes the result of what has arrived.
        """
        self._arrive: Callable[[], None] | None = arrive
        self._finish: Callable[[], T] | None = finish
        self._result: T | None = None
        self.bytes_to = bytes_to
        """bytes that this rank sends to each rank of the group; 0 to itself"""

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to other ranks."""
        return sum(self.bytes_to)

    def wait(self) -> T:
        if self._arrive is not None and self._finish is not None:
            self._arrive()
            self._result = self._finish()
            self._arrive = self._finish = None  # and with them the buffers
        assert self._result is not None
        return self._result


def sparse_all_gather(owned_nC: Tensor, placement: Placement, group: dist.ProcessGroup, into_SC: Tensor | None = None) -> Handle[Tensor]:
    """Start copying the experts of `placement` from their owners to the ranks that need them.

    Every rank of the group must call it, in the same order, with the same placement; ranks are those of the group. The owned
    chunks must not change before `wait()` returns. Source: Hecate (arXiv 2502.02581) §3.1, spAG(P0, P1).

    Args:
        owned_nC: [owned experts, C], this rank's owned chunks by expert ascending; contiguous, any dtype.
        into_SC: [slots, C], filled by `wait()` and returned by it; None: a new tensor.

    Returns:
        A handle whose result is [slots, C], slot s holding expert `placement.experts_on(rank)[s]`.
    """
    rank = dist.get_rank(group)
    exchange = Exchange([flat_moves(placement)], group)
    exchange.start([owned_rows(owned_nC, placement, rank, exchange.sent[0].expert_M)])

    def finish() -> Tensor:
        return into_slots(owned_nC, placement, rank, [(exchange.received[0], exchange.arrived())], into_SC)

    return Handle(exchange.wait, finish, exchange.bytes_to)


def sparse_reduce_scatter(grad_SC: Tensor, placement: Placement, group: dist.ProcessGroup) -> Handle[Tensor]:
    """Start summing the gradients of the replicas onto the experts' owners.

    Every rank of the group must call it, in the same order, with the same placement. `grad_SC` must not change before `wait()`
    returns. The terms of each sum are added by rank ascending, so the result is deterministic. Source: Hecate (arXiv 2502.02581)
    §3.1, spRS(P1, P0).

    Args:
        grad_SC: [slots, C], in the slot order of `sparse_all_gather`'s result.

    Returns:
        A handle whose result is [owned experts, C], by expert ascending.
    """
    return _single(sparse_reduce_scatter_many([(grad_SC, placement)], group))


def sparse_all_gather_many(layers: Sequence[tuple[Tensor, Placement, Tensor | None]], group: dist.ProcessGroup) -> list[Handle[Tensor]]:
    """`sparse_all_gather` of several layers in one all-to-all: fewer and larger messages where chunks are small.

    Every rank must pass the same placements in the same order. Numbers of experts and sizes of chunks may differ between layers; dtype
    and device may not.

    Args:
        layers: owned chunks, placement and what to fill (or None) of each layer, as `sparse_all_gather` takes them.

    Returns:
        A handle for each layer, to be waited for in any order; its bytes are the layer's own.
    """
    rank = dist.get_rank(group)
    exchange = Exchange([flat_moves(placement) for _, placement, _ in layers], group)
    sent = zip(layers, exchange.sent, strict=True)
    exchange.start([owned_rows(owned_nC, placement, rank, run.expert_M) for (owned_nC, placement, _), run in sent])

    def handle(layer: int) -> Handle[Tensor]:
        owned_nC, placement, into_SC = layers[layer]
        chunk_bytes = owned_nC.shape[1] * owned_nC.element_size()

        def finish() -> Tensor:
            return into_slots(owned_nC, placement, rank, [(exchange.received[layer], exchange.arrived(layer))], into_SC)

        return Handle(exchange.wait, finish, [count * chunk_bytes for count in exchange.sent[layer].count_D])

    return [handle(layer) for layer in range(len(layers))]


def sparse_reduce_scatter_many(layers: Sequence[tuple[Tensor, Placement]], group: dist.ProcessGroup) -> Handle[list[Tensor]]:
    """`sparse_reduce_scatter` of several layers in one all-to-all; the conditions are those of `sparse_all_gather_many`.

    Returns:
        A handle whose result holds what `sparse_reduce_scatter` would return for each layer, bit for bit.
    """
    rank = dist.get_rank(group)
    exchange = Exchange([flat_moves(placement) for _, placement in layers], group, back=True)
    sent = zip(layers, exchange.sent, strict=True)
    exchange.start([slot_rows(grad_SC, placement, rank, run.expert_M) for (grad_SC, placement), run in sent])

    def finish() -> list[Tensor]:
        totals = []
        for layer, (grad_SC, placement) in enumerate(layers):
            experts, terms = placement.owned_by(rank), (exchange.received[layer], exchange.arrived(layer))
            totals.append(sum_by_rank(experts, slot_rows(grad_SC, placement, rank, experts), rank, [terms]))
        return totals

    return Handle(exchange.wait, finish, exchange.bytes_to)


class Exchange:
    """One uneven all-to-all of the chunks of one or more layers. Every rank must start it, in the same order, with the same moves."""

    def __init__(self, moves: Sequence[Moves], group: dist.ProcessGroup, *, back: bool = False) -> None:
        """Args:
        back: against the moves, as gradients go.
        """
        rank = dist.get_rank(group)
        world = dist.get_world_size(group)
        assert all(m.source_ED.shape[1] == world for m in moves), world
        along, against = [m.sent(rank) for m in moves], [m.received(rank) for m in moves]
        self.sent, self.received = (against, along) if back else (along, against)
        """per layer"""
        self.bytes_to = [0] * world
        self._idle = not any(m.any for m in moves)
        self._group = group
        self._widths: list[int] = []
        self._buffer: Tensor | None = None
        self.work: dist.Work | None = None
        """of the all-to-all; None where no rank sends anything"""

    def start(self, rows: Sequence[Tensor]) -> None:
        """Args:
        rows: per layer [M, C], the chunks of `sent`.
        """
        assert len({(r.dtype, r.device) for r in rows}) <= 1, [(r.dtype, r.device) for r in rows]
        self._widths = [r.shape[1] for r in rows]
        if not rows:
            return
        send_counts, recv_counts = _elements(self.sent, self._widths), _elements(self.received, self._widths)
        self.bytes_to = [count * rows[0].element_size() for count in send_counts]
        self._buffer = rows[0].new_empty(sum(recv_counts))
        if not self._idle:
            send_buffer = _by_peer(rows, self.sent)
            self.work = dist.all_to_all_single(self._buffer, send_buffer, recv_counts, send_counts, group=self._group, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()

    def arrived(self, layer: int = 0) -> Tensor:
        """[M, C]: a layer's chunks of `received`; after `wait`."""
        assert self._buffer is not None, "arrived() before start()"
        width, layers = self._widths[layer], len(self._widths)
        if layers == 1:
            return self._buffer.view(-1, width)
        lengths = [count * width for counts in _per_peer(self.received) for count, width in zip(counts, self._widths, strict=True)]
        return torch.cat(self._buffer.split(lengths)[layer::layers]).view(-1, width)


def owned_rows(owned_nC: Tensor, placement: Placement, rank: int, expert_M: np.ndarray) -> Tensor:
    """[M, C]: the owned chunks of the given experts."""
    owned_experts = placement.owned_by(rank)
    assert owned_nC.shape[0] == len(owned_experts), (owned_nC.shape, owned_experts)
    return owned_nC.index_select(0, index(np.searchsorted(owned_experts, expert_M), owned_nC.device))


def slot_rows(replica_SC: Tensor, placement: Placement, rank: int, expert_M: np.ndarray) -> Tensor:
    """[M, C]: the rows of the given experts' slots."""
    return replica_SC.index_select(0, index(placement.slot_of_expert(rank)[expert_M], replica_SC.device))


def into_slots(
    owned_nC: Tensor, placement: Placement, rank: int, arrived: Sequence[tuple[Run, Tensor]], into_SC: Tensor | None = None
) -> Tensor:
    """[slots, C], in `into_SC` where that is given: the owned chunks and those that have arrived, each in its slot."""
    slot_of = placement.slot_of_expert(rank)
    replica_SC = owned_nC.new_empty((int(placement.where_ED[:, rank].sum()), owned_nC.shape[1])) if into_SC is None else into_SC
    replica_SC[index(slot_of[placement.owned_by(rank)], owned_nC.device)] = owned_nC
    for run, rows_MC in arrived:
        replica_SC[index(slot_of[run.expert_M], owned_nC.device)] = rows_MC
    return replica_SC


def sum_by_rank(experts: np.ndarray, own_nC: Tensor, rank: int, arrived: Sequence[tuple[Run, Tensor]]) -> Tensor:
    """[n, C]: the sums of the chunks of `experts` (ascending), each sum's terms added by sending rank ascending.

    Args:
        own_nC: this rank's own terms; may be overwritten.
        arrived: others' terms, of these experts only; a peer that is in two of the runs is taken in their order.
    """
    terms = [(peer, run.expert_M[rows], rows_MC[rows]) for run, rows_MC in arrived for peer, rows in run.pieces]
    terms.sort(key=lambda term: term[0])
    if sum(peer <= rank for peer, _, _ in terms) <= 1:
        total_nC = own_nC  # the first two terms of a sum may change places
    else:
        total_nC = torch.zeros_like(own_nC)
        terms = sorted([*terms, (rank, experts, own_nC)], key=lambda term: term[0])
    for _, expert_M, rows_MC in terms:
        if len(expert_M) == len(experts):  # all of them, so in this order
            total_nC += rows_MC
        else:
            total_nC[index(np.searchsorted(experts, expert_M), own_nC.device)] += rows_MC
    return total_nC


def index(rows: np.ndarray, device: torch.device) -> Tensor:
    """int64 rows to index with, on the device, without waiting for it."""
    return torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(device, non_blocking=True)


def _single(handle: Handle[list[Tensor]]) -> Handle[Tensor]:
    def finish() -> Tensor:
        (result,) = handle.wait()
        return result

    return Handle(lambda: None, finish, handle.bytes_to)


def _per_peer(runs: Sequence[Run]) -> list[tuple[int, ...]]:
    """Copies of each layer, for each peer."""
    return list(zip(*(run.count_D for run in runs), strict=True))


def _elements(runs: Sequence[Run], widths: Sequence[int]) -> list[int]:
    return [sum(count * width for count, width in zip(counts, widths, strict=True)) for counts in _per_peer(runs)]


def _by_peer(rows: Sequence[Tensor], runs: Sequence[Run]) -> Tensor:
    """The chunks of all layers in one flat buffer: by peer, then by layer, then by expert."""
    if len(rows) == 1:
        return rows[0].flatten()
    split = [layer_rows.split(run.count_D) for layer_rows, run in zip(rows, runs, strict=True)]
    return torch.cat([piece.flatten() for pieces in zip(*split, strict=True) for piece in pieces])
