"""SparseAllGather and SparseReduceScatter: expert chunks from their owners to their replicas, and gradients back.

Both carry out a `ChunkPlan` and decide nothing. Over the flat route they are one uneven all-to-all each, also for several layers at once.
Over leaders they are two exchanges (`hecate.parallel.comm.exchanges`), the second after the first; the sliced route is the same on chunks
cut into slices. They run on any torch.distributed backend. A rank that sends or receives nothing costs nothing, but still takes part.

Shapes: n owned experts, S slots, M chunks sent or received, all of this rank; C elements of a chunk. In the names of tables and inside the
functions, rows are those of slices where chunks are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.device_tables import chunk_tables
from hecate.parallel.comm.exchanges import FirstExchange, SecondExchange
from hecate.parallel.transfer.transfer_plan import ChunkPlan, ChunkTables, SumTables

T = TypeVar("T")


class Handle(Generic[T]):
    """A collective under way. `wait()` returns its result; calling it again returns the same."""

    def __init__(self, arrive: Callable[[], None], finish: Callable[[], T], bytes_to: list[int]) -> None:
        """Args:
        arrive: waits until everything has arrived; may raise what went wrong on the way.
        finish: makes the result of what has arrived.
        """
        # These two also keep alive what another stream reads until then, such as index tables, whatever caches do.
        self._arrive: Callable[[], None] | None = arrive
        self._finish: Callable[[], T] | None = finish
        self._result: T | None = None
        self.bytes_to = bytes_to
        """This rank sends so many bytes to each rank of the group, none to itself."""

    def wait(self) -> T:
        if self._arrive is not None and self._finish is not None:
            self._arrive()
            self._result = self._finish()
            self._arrive = self._finish = None  # They hold the buffers, which a caller that keeps its handle would keep, too.
        assert self._result is not None
        return self._result


def sparse_all_gather(owned_nC: Tensor, plan: ChunkPlan, group: dist.ProcessGroup, into_SC: Tensor | None = None) -> Handle[Tensor]:
    """Start copying the experts of a placement from their owners to the ranks that need them.

    Every rank of the group must call it, in the same order, with its own plan of the same placement and route; ranks are those of the
    group. The owned chunks must not change before `wait()` returns. Source: Hecate (arXiv 2502.02581) §3.1, spAG(P0, P1).

    Args:
        owned_nC: [owned experts, C], this rank's owned chunks by expert ascending; contiguous, any dtype.
        into_SC: [slots, C], contiguous, filled by `wait()` and returned by it; None: a new tensor.

    Returns:
        A handle whose result is [slots, C], slot s holding expert `plan.tables.expert_S[s]`.
    """
    _check_rows(owned_nC, plan.num_owned, plan)
    tables, owned_rows = chunk_tables(plan, owned_nC.device), _in_slices(owned_nC, plan)
    first = FirstExchange([plan.gather[0]], group)
    # Every rank makes it, with or without messages of its own: it takes the group's next tag, which must stay alike on all ranks.
    second = SecondExchange(plan.gather[1], group, owned_rows) if len(plan.gather) == 2 else None
    first.start([owned_rows.index_select(0, tables.owned_row_M)])
    # A leader sends on some of what it received.
    arrive = first.wait if second is None else second.follow(first, lambda: first.arrived()[tables.sent_on_M])

    def finish() -> Tensor:
        return _into_slots(owned_nC, plan, tables, _arrived(first, second), into_SC)

    return Handle(arrive, finish, _bytes_to(first, second))


def sparse_all_gather_many(layers: Sequence[tuple[Tensor, ChunkPlan, Tensor | None]], group: dist.ProcessGroup) -> list[Handle[Tensor]]:
    """`sparse_all_gather` of several layers in one all-to-all: fewer and larger messages where chunks are small.

    Every rank must pass plans of the same placements in the same order, all of the flat route. Numbers of experts and sizes of chunks may
    differ between layers; dtype and device may not.

    Args:
        layers: owned chunks, plan and what to fill (or None) of each layer, as `sparse_all_gather` takes them.

    Returns:
        A handle for each layer, to be waited for in any order; its bytes are the layer's own.
    """
    assert all(plan.route == "flat" for _, plan, _ in layers), [plan.route for _, plan, _ in layers]
    exchange = FirstExchange([plan.gather[0] for _, plan, _ in layers], group)
    exchange.start([owned_nC.index_select(0, chunk_tables(plan, owned_nC.device).owned_row_M) for owned_nC, plan, _ in layers])

    def handle(layer: int) -> Handle[Tensor]:
        owned_nC, plan, into_SC = layers[layer]
        chunk_bytes = owned_nC.shape[1] * owned_nC.element_size()

        def finish() -> Tensor:
            return _into_slots(owned_nC, plan, chunk_tables(plan, owned_nC.device), [exchange.arrived(layer)], into_SC)

        return Handle(exchange.wait, finish, [count * chunk_bytes for count in plan.gather[0].sent.count_D])

    return [handle(layer) for layer in range(len(layers))]


def sparse_reduce_scatter(grad_SC: Tensor, plan: ChunkPlan, group: dist.ProcessGroup) -> Handle[Tensor]:
    """Start summing the gradients of the replicas onto the experts' owners.

    Every rank of the group must call it, in the same order, with its own plan of the same placement and route. `grad_SC` must not change
    before `wait()` returns. Source: Hecate (arXiv 2502.02581) §3.1, spRS(P1, P0).

    The result is deterministic. Over the flat route an owner adds up the terms of each sum by rank ascending. Over leaders, a leader adds
    up its node's terms by rank ascending; the owner adds up its own term, those that it receives directly and the sums of other nodes by
    rank ascending, the leader's rank standing for its node; so sums over leaders round otherwise than flat ones.

    Args:
        grad_SC: [slots, C], in the slot order of `sparse_all_gather`'s result; contiguous.

    Returns:
        A handle whose result is [owned experts, C], by expert ascending.
    """
    _check_rows(grad_SC, plan.num_slots, plan)
    tables, grad_rows = chunk_tables(plan, grad_SC.device), _in_slices(grad_SC, plan)
    first = FirstExchange([plan.reduce[0]], group)
    second = SecondExchange(plan.reduce[1], group, grad_rows) if len(plan.reduce) == 2 else None  # on every rank, as in a gather
    first.start([grad_rows.index_select(0, tables.grad_slot_M)])

    def leader_sums() -> Tensor:
        return _sum_by_rank(grad_rows, tables.leader_sums, [first.arrived()])[tables.leader_row_M]

    arrive = first.wait if second is None else second.follow(first, leader_sums)

    def finish() -> Tensor:
        return _sum_by_rank(grad_rows, tables.owner_sums, _arrived(first, second)).view(plan.num_owned, grad_SC.shape[1])

    return Handle(arrive, finish, _bytes_to(first, second))


def _into_slots(
    owned_nC: Tensor, plan: ChunkPlan, tables: ChunkTables[Tensor], arrived: Sequence[Tensor], into_SC: Tensor | None
) -> Tensor:
    """[slots, C], in `into_SC` where that is given: the owned chunks and those that have arrived, each in its slot."""
    replica_SC = owned_nC.new_empty((plan.num_slots, owned_nC.shape[1])) if into_SC is None else into_SC
    rows = _in_slices(replica_SC, plan)
    rows[tables.own_slot_n] = _in_slices(owned_nC, plan)
    for slot_M, rows_MC in zip(tables.arrived_slot_M, arrived, strict=True):
        rows[slot_M] = rows_MC
    return replica_SC


def _sum_by_rank(replica_SC: Tensor, sums: SumTables[Tensor], arrived: Sequence[Tensor]) -> Tensor:
    """[n, C]: each sum's terms added by sending rank ascending.

    Args:
        replica_SC: this rank's own terms, by slot.
        arrived: others' terms, of each exchange.
    """
    own_nC = replica_SC.index_select(0, sums.own_slot_n)
    # A sum of floating-point numbers depends on their order, and is to have the same bits in every run and under every placement of the
    # same terms. So this rank's own terms, which are ready first, wait for their turn.
    total_nC = own_nC if sums.own_after is None else torch.zeros_like(own_nC)
    for number, term in enumerate(sums.terms):
        if number == sums.own_after:
            total_nC += own_nC
        rows_MC = arrived[term.exchange][term.rows]
        if term.sums is None:
            total_nC += rows_MC
        else:
            total_nC[term.sums] += rows_MC
    if sums.own_after == len(sums.terms):
        total_nC += own_nC
    return total_nC


def _in_slices(chunk_nC: Tensor, plan: ChunkPlan) -> Tensor:
    """[n · slices, C / slices], on the same memory where the chunks are contiguous."""
    return chunk_nC if plan.slices == 1 else chunk_nC.reshape(len(chunk_nC) * plan.slices, chunk_nC.shape[1] // plan.slices)


def _check_rows(rows: Tensor, expected: int, plan: ChunkPlan) -> None:
    assert len(rows) == expected, f"rank {plan.rank} has {len(rows)} chunks, but its plan counts {expected}"


def _arrived(first: FirstExchange, second: SecondExchange | None) -> list[Tensor]:
    return [first.arrived(), *([] if second is None else [second.buffer_MC])]


def _bytes_to(first: FirstExchange, second: SecondExchange | None) -> list[int]:
    return first.bytes_to if second is None else [a + b for a, b in zip(first.bytes_to, second.bytes_to, strict=True)]
