"""Holds the frozen parts of one layer's experts on this rank: its own for good, replicas for as long as plans keep them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.exchanges import FirstExchange
from hecate.parallel.transfer.residency import FrozenMove
from hecate.parallel.transfer.transfer_plan import Exchange


class FrozenStore:
    """One layer's frozen chunks on this rank, moved as `hecate.parallel.transfer.residency` plans it.

    All ranks of the group call `start` of all layers in the same order, each with its own move between the same residencies. A move that
    brings no rank anything is no collective.

    Shapes: C elements of a frozen chunk, M chunks of one exchange, S replica slots.
    """

    def __init__(self, owned: Iterable[int], frozen: Callable[[int], Tensor], none_MC: Tensor, group: dist.ProcessGroup) -> None:
        """Args:
        owned: experts that this rank owns.
        frozen: the flat frozen chunk of an expert; called for owned experts only.
        none_MC: [0, C]: no chunks, of the size, dtype and device that chunks have.
        """
        self._group = group
        self._held = {expert: frozen(expert) for expert in owned}
        self._none_MC = none_MC
        self._under_way: tuple[FirstExchange, Exchange] | None = None
        self.bytes_to = np.zeros(dist.get_world_size(group), dtype=np.int64)
        """the bytes sent so far to each rank of the group"""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks so far."""
        return int(self.bytes_to.sum())

    @property
    def chunk_bytes(self) -> int:
        return self._none_MC.shape[1] * self._none_MC.element_size()

    def start(self, move: FrozenMove) -> None:
        """Start sending and fetching, and give up what the move drops."""
        self.wait()  # what the last move has fetched may be sent on, or given up, by this one
        if move.exchange is not None:
            exchange = FirstExchange([move.exchange], self._group)
            leaving = [self._held[expert] for expert in move.exchange.sent.expert_M.tolist()]
            exchange.start([torch.stack(leaving) if leaving else self._none_MC])
            self.bytes_to += exchange.bytes_to
            self._under_way = exchange, move.exchange
        for expert in move.dropped:
            del self._held[expert]  # even if it is being sent: `stack` has copied it

    def wait(self) -> None:
        """Wait for what is on its way."""
        if self._under_way is None:
            return
        (exchange, moved), self._under_way = self._under_way, None
        exchange.wait()
        arrived_MC = exchange.arrived()
        for expert, chunk_C in zip(moved.received.expert_M.tolist(), arrived_MC, strict=True):
            # A copy of its own: a view would keep all that arrived with it for as long as it stays.
            self._held[expert] = chunk_C.clone() if len(arrived_MC) > 1 else chunk_C

    def chunks(self, expert_S: Sequence[int]) -> tuple[Tensor, ...]:
        """The frozen chunk of each of these experts, flat; waits for those on their way. Each must be held."""
        self.wait()
        return tuple(self._held[expert] for expert in expert_S)
