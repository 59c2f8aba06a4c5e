"""The frozen parts of a layer's experts. Each owner holds its own for good, and other ranks hold replicas as long as they have slots.

Frozen parts are neither reduced nor stepped, so a replica never goes out of date. A rank receives a replica when a placement first needs
it, and keeps it until its slot is needed for another expert. Which rank holds what is a pure function of the placements so far
(`Residency`), so every rank computes it for all ranks without a message, and so do planners.

Shapes: E experts, D ranks, C elements of a frozen chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.exchanges import FirstExchange
from hecate.parallel.placement import Placement
from hecate.parallel.transfer_plan import Exchange, exchange_of

_NEVER = -1


class Residency:
    """Which rank holds which frozen parts, and when placements last needed them. The same on every rank."""

    def __init__(self, owner_E: np.ndarray, slots_D: np.ndarray) -> None:
        """Args:
        owner_E: int64 [experts].
        slots_D: int64 [ranks]: how many experts of other ranks a rank keeps. If a placement needs more, the rank receives these and keeps
            no others.
        """
        self._slots_D = slots_D
        self._owned_ED = owner_E[:, None] == np.arange(len(slots_D))
        self.held_ED = self._owned_ED.copy()
        """bool [experts, ranks]"""
        self._needed_ED = self._owned_ED
        """by the last placement"""
        self._last_use_ED = np.full(self.held_ED.shape, _NEVER)
        self._clock = 0

    def need(self, where_ED: np.ndarray) -> np.ndarray:
        """Fetch the frozen experts that the next placement needs and ranks lack. Where slots run out, evict residents that it does not
        need, least recently used first; ties go to the higher index.

        Args:
            where_ED: bool [experts, ranks], the placement.

        Returns:
            bool [experts, ranks]: what has to be fetched.
        """
        missing_ED = self.hold_for_now(where_ED)
        self._needed_ED = where_ED
        self._clock += 1
        self._last_use_ED[where_ED] = self._clock
        self.evict()
        return missing_ED

    def hold_for_now(self, where_ED: np.ndarray) -> np.ndarray:
        """Fetch as `need` does, but evict nothing before the next `evict`, and do not count what is fetched as used.

        Returns:
            bool [experts, ranks]: what has to be fetched.
        """
        missing_ED = where_ED & ~self.held_ED
        self.held_ED = self.held_ED | where_ED
        return missing_ED

    def evict(self) -> None:
        """Give up what exceeds the slots. Owners keep their experts, and all ranks keep what the last placement needed."""
        kept_ED = self._owned_ED | self._needed_ED
        for rank, slots in enumerate(self._slots_D):
            room = max(0, int(slots) - int((self._needed_ED & ~self._owned_ED)[:, rank].sum()))
            others = np.flatnonzero(self.held_ED[:, rank] & ~kept_ED[:, rank])
            latest = others[np.argsort(-self._last_use_ED[others, rank], kind="stable")[:room]]
            self.held_ED[:, rank] = kept_ED[:, rank]
            self.held_ED[latest, rank] = True

    def change_owners(self, owner_E: np.ndarray) -> np.ndarray:
        """Give the experts to other owners. An expert that leaves a rank counts as just used there, and stays if there is a slot.

        Returns:
            bool [experts, ranks]: what the new owners have to fetch.
        """
        self._clock += 1
        self._last_use_ED[self._owned_ED] = self._clock
        self._owned_ED = self._needed_ED = owner_E[:, None] == np.arange(len(self._slots_D))
        missing_ED = self.hold_for_now(self._owned_ED)
        self.evict()
        return missing_ED


class FrozenStore:
    """One layer's frozen chunks on this rank.

    All ranks of the group call `gather`, `gather_for_now`, `evict` and `change_owners` of all layers in the same order, with the same
    arguments. A transfer that no rank needs is no collective.
    """

    def __init__(
        self, owner_E: np.ndarray, slots_D: np.ndarray, frozen: Callable[[int], Tensor], none_MC: Tensor, group: dist.ProcessGroup
    ) -> None:
        """Args:
        frozen: the flat frozen chunk of an expert; called for owned experts only.
        none_MC: [0, C]: no chunks, of the size, dtype and device that chunks have.
        """
        self._group = group
        self._rank = dist.get_rank(group)
        self._owner_E = owner_E
        self._residency = Residency(owner_E, slots_D)
        owned = np.flatnonzero(owner_E == self._rank).tolist()
        self._held = {expert: frozen(expert) for expert in owned}
        self._none_MC = none_MC
        self._placement: Placement | None = None
        self._under_way: tuple[FirstExchange, Exchange] | None = None
        self.bytes_sent = 0

    @property
    def resident_ED(self) -> np.ndarray:
        """bool [experts, ranks]: frozen parts that every rank holds or is about to receive."""
        return self._residency.held_ED.copy()

    @property
    def chunk_bytes(self) -> int:
        return self._none_MC.shape[1] * self._none_MC.element_size()

    @property
    def replica_bytes(self) -> int:
        """Bytes of others' frozen parts held now."""
        return sum(int(self._owner_E[expert] != self._rank) for expert in self._held) * self.chunk_bytes

    def gather(self, placement: Placement) -> None:
        """Start fetching what the placement needs and ranks lack; what has no slot beside it is evicted. Nothing happens if the placement
        equals the last one.
        """
        if placement != self._placement:
            self._placement = placement
            self._fetch(self._residency.need(placement.where_ED))

    def gather_for_now(self, placement: Placement) -> None:
        """Gather as `gather` does, but evict nothing before `evict`."""
        self._placement = placement
        self._fetch(self._residency.hold_for_now(placement.where_ED))

    def chunks(self) -> tuple[Tensor, ...]:
        """The frozen chunk of each slot of the last `gather` or `gather_for_now`, flat; waits for those on their way."""
        assert self._placement is not None, "chunks() before gather()"
        self._arrive()
        return tuple(self._held[expert] for expert in self._placement.experts_on(self._rank).tolist())

    def evict(self) -> None:
        """Give up what `gather_for_now` has fetched and what has no room."""
        self._arrive()
        self._placement = None
        self._residency.evict()
        self._drop_evicted()

    def change_owners(self, owner_E: np.ndarray) -> int:
        """Move the frozen parts to other owners, unless these hold them already.

        Returns:
            Bytes sent by all ranks together.
        """
        missing_ED = self._residency.change_owners(owner_E)
        self._fetch(missing_ED)
        self._arrive()
        self._owner_E, self._placement = owner_E, None
        return int(missing_ED.sum()) * self.chunk_bytes

    def _fetch(self, missing_ED: np.ndarray) -> None:
        self._arrive()
        if missing_ED.any():  # on any rank, and every rank works out the same
            plan = exchange_of(np.where(missing_ED, self._owner_E[:, None], -1), self._rank)
            exchange = FirstExchange([plan], self._group)
            leaving = [self._held[expert] for expert in plan.sent.expert_M.tolist()]
            exchange.start([torch.stack(leaving) if leaving else self._none_MC])
            self.bytes_sent += sum(exchange.bytes_to)
            self._under_way = exchange, plan
        self._drop_evicted()

    def _arrive(self) -> None:
        if self._under_way is None:
            return
        (exchange, plan), self._under_way = self._under_way, None
        exchange.wait()
        rows_MC = exchange.arrived()
        for expert, row in zip(plan.received.expert_M.tolist(), rows_MC, strict=True):
            # A copy of its own: a view would keep all that arrived with it for as long as it stays.
            self._held[expert] = row.clone() if len(rows_MC) > 1 else row

    def _drop_evicted(self) -> None:
        for expert in [expert for expert in self._held if not self._residency.held_ED[expert, self._rank]]:
            del self._held[expert]
