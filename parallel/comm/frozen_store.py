"""The frozen parts of a layer's experts: an owner's for good, replicas for as long as there is room.

Frozen parts are never reduced nor stepped, so a replica never goes stale. It is brought when a plan first wants it and stays after plans
have stopped wanting it, until its place is needed. Who holds what is a pure function of the placements so far (`Residency`): every rank
knows it of every other without a message, planners included.

Shapes: E experts, D ranks, C elements of a frozen chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.collectives import Exchange
from hecate.parallel.placement import Placement
from hecate.parallel.routes import Moves

_NEVER = -1


class Residency:
    """Which frozen parts are where, and since when they were last wanted. The same on every rank."""

    def __init__(self, owner_E: np.ndarray, slots_D: np.ndarray) -> None:
        """Args:
        owner_E: int64 [experts].
        slots_D: int64 [ranks]: others' experts that a rank keeps. Where a placement wants more of them, it gets them, and no others stay.
        """
        self._slots_D = slots_D
        self._owned_ED = owner_E[:, None] == np.arange(len(slots_D))
        self.held_ED = self._owned_ED.copy()
        """bool [experts, ranks]"""
        self._wanted_ED = self._owned_ED
        """by the last placement"""
        self._last_use_ED = np.full(self.held_ED.shape, _NEVER)
        self._clock = 0

    def want(self, where_ED: np.ndarray) -> np.ndarray:
        """The next placement, bool [experts, ranks]; what it lacks comes, and what finds no room beside it goes: of what is not wanted
        the least recently wanted, of these the highest index.

        Returns:
            bool [experts, ranks]: what has to be brought.
        """
        fresh_ED = self.borrow(where_ED)
        self._wanted_ED = where_ED
        self._clock += 1
        self._last_use_ED[where_ED] = self._clock
        self.trim()
        return fresh_ED

    def borrow(self, where_ED: np.ndarray) -> np.ndarray:
        """As `want`, but for a while, until `trim`: nothing goes, and what comes does not count as wanted."""
        fresh_ED = where_ED & ~self.held_ED
        self.held_ED = self.held_ED | where_ED
        return fresh_ED

    def trim(self) -> None:
        """Give up what has no room: the owner's, and what the last placement wanted, always have."""
        secure_ED = self._owned_ED | self._wanted_ED
        for rank, slots in enumerate(self._slots_D):
            room = max(0, int(slots) - int((self._wanted_ED & ~self._owned_ED)[:, rank].sum()))
            loose = np.flatnonzero(self.held_ED[:, rank] & ~secure_ED[:, rank])
            kept = loose[np.argsort(-self._last_use_ED[loose, rank], kind="stable")[:room]]
            self.held_ED[:, rank] = secure_ED[:, rank]
            self.held_ED[kept, rank] = True

    def change_owners(self, owner_E: np.ndarray) -> np.ndarray:
        """Other owners from now on. An expert that leaves a rank was wanted there until now, and stays if there is room.

        Returns:
            bool [experts, ranks]: what the new owners lack.
        """
        self._clock += 1
        self._last_use_ED[self._owned_ED] = self._clock
        self._owned_ED = self._wanted_ED = owner_E[:, None] == np.arange(len(self._slots_D))
        fresh_ED = self.borrow(self._owned_ED)
        self.trim()
        return fresh_ED


class FrozenStore:
    """One layer's frozen chunks on this rank.

    All ranks of the group call `gather`, `borrow`, `trim` and `change_owners` of all layers in the same order, with the same arguments.
    A transfer that no rank needs is no collective.
    """

    def __init__(self, owner_E: np.ndarray, slots_D: np.ndarray, frozen: Callable[[int], Tensor], group: dist.ProcessGroup) -> None:
        """Args:
        frozen: the flat frozen chunk of an expert; called for owned experts, and for expert 0 where there are none.
        """
        self._group = group
        self._rank = dist.get_rank(group)
        self._owner_E = owner_E
        self._residency = Residency(owner_E, slots_D)
        owned = np.flatnonzero(owner_E == self._rank).tolist()
        self._held = {expert: frozen(expert) for expert in owned}
        like = self._held[owned[0]] if owned else frozen(0)
        self._none_MC = like.new_empty((0, like.numel()))
        self._placement: Placement | None = None
        self._coming: Exchange | None = None
        self.bytes_sent = 0

    @property
    def resident_ED(self) -> np.ndarray:
        """bool [experts, ranks]: frozen parts that are there, or on their way, on every rank."""
        return self._residency.held_ED.copy()

    @property
    def chunk_bytes(self) -> int:
        return self._none_MC.shape[1] * self._none_MC.element_size()

    @property
    def replica_bytes(self) -> int:
        """Bytes of others' frozen parts held now."""
        return sum(int(self._owner_E[expert] != self._rank) for expert in self._held) * self.chunk_bytes

    def gather(self, placement: Placement) -> None:
        """Start bringing what the placement wants and is not there. What must make room for it is given up."""
        if placement is not self._placement:
            self._placement = placement
            self._bring(self._residency.want(placement.where_ED))

    def borrow(self, placement: Placement) -> None:
        """As `gather`, but nothing is given up before `trim`."""
        self._placement = placement
        self._bring(self._residency.borrow(placement.where_ED))

    def chunks(self) -> tuple[Tensor, ...]:
        """The frozen chunk of each slot of the last `gather` or `borrow`, flat; waits for those on their way."""
        assert self._placement is not None, "chunks() before gather()"
        self._arrive()
        return tuple(self._held[expert] for expert in self._placement.experts_on(self._rank).tolist())

    def trim(self) -> None:
        """Give up what was borrowed and has no room."""
        self._arrive()
        self._placement = None
        self._residency.trim()
        self._give_up()

    def change_owners(self, owner_E: np.ndarray) -> int:
        """Move the frozen parts to other owners, unless they are there already.

        Returns:
            Bytes sent by all ranks together.
        """
        fresh_ED = self._residency.change_owners(owner_E)
        self._bring(fresh_ED)
        self._arrive()
        self._owner_E, self._placement = owner_E, None
        return int(fresh_ED.sum()) * self.chunk_bytes

    def _bring(self, fresh_ED: np.ndarray) -> None:
        self._arrive()
        if fresh_ED.any():  # on any rank, and all know
            exchange = Exchange([Moves(np.where(fresh_ED, self._owner_E[:, None], -1))], self._group)
            leaving = [self._held[expert] for expert in exchange.sent[0].expert_M.tolist()]
            exchange.start([torch.stack(leaving) if leaving else self._none_MC])
            self.bytes_sent += sum(exchange.bytes_to)
            self._coming = exchange
        self._give_up()

    def _arrive(self) -> None:
        exchange, self._coming = self._coming, None
        if exchange is None:
            return
        exchange.wait()
        rows_MC = exchange.arrived()
        for expert, row in zip(exchange.received[0].expert_M.tolist(), rows_MC, strict=True):
            # Of its own: a view would keep all that came with it for as long as it stays.
            self._held[expert] = row.clone() if len(rows_MC) > 1 else row

    def _give_up(self) -> None:
        for expert in [expert for expert in self._held if not self._residency.held_ED[expert, self._rank]]:
            del self._held[expert]
