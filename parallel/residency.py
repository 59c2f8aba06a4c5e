"""Which ranks hold which frozen parts of a layer's experts, and what moves when that changes.

Frozen parts are neither reduced nor stepped, so a replica never goes out of date. A rank receives a replica when a placement first needs
it, and keeps it until its slot is needed for another expert. Which rank holds what is a pure function of the placements so far, so every
rank computes it for all ranks without a message.

Shapes: E experts, D ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hecate.parallel.transfer_plan import Exchange, exchange_of

_NEVER = -1


@dataclass(frozen=True, eq=False)
class Residency:
    """Who holds which frozen parts of one layer, and when placements last needed them. The same on every rank."""

    owner_E: np.ndarray
    """int64 [experts]; an owner always holds its own"""
    slots_D: np.ndarray
    """int64 [ranks]: how many experts of other ranks a rank keeps; if a placement needs more, it receives these and keeps no others"""
    held_ED: np.ndarray
    """bool [experts, ranks]"""
    needed_ED: np.ndarray
    """bool [experts, ranks]: by the last placement"""
    last_use_ED: np.ndarray
    """int64 [experts, ranks]: `clock` of the last placement that needed it"""
    clock: int = 0

    @classmethod
    def of_owners(cls, owner_E: np.ndarray, slots_D: np.ndarray) -> Residency:
        """Each expert on its owner alone, as training begins."""
        owned_ED = owner_E[:, None] == np.arange(len(slots_D))
        return cls(owner_E, slots_D, owned_ED, owned_ED, np.full(owned_ED.shape, _NEVER))

    @property
    def owned_ED(self) -> np.ndarray:
        """bool [experts, ranks]"""
        return self.owner_E[:, None] == np.arange(len(self.slots_D))

    def replicas_on(self, rank: int) -> int:
        """How many experts of other ranks a rank holds."""
        return int((self.held_ED & ~self.owned_ED)[:, rank].sum())

    def need(self, where_ED: np.ndarray) -> Residency:
        """After ranks have fetched what the next placement needs and they lack. Where slots run out, they give up what it does not need,
        least recently used first; ties go to the higher index.

        Args:
            where_ED: bool [experts, ranks], the placement.
        """
        clock = self.clock + 1
        used_ED = np.where(where_ED, clock, self.last_use_ED)
        return replace(self.hold_for_now(where_ED), needed_ED=where_ED, last_use_ED=used_ED, clock=clock).evict()

    def hold_for_now(self, where_ED: np.ndarray) -> Residency:
        """As `need`, but nothing is given up before the next `evict`, and what is fetched does not count as used."""
        return replace(self, held_ED=self.held_ED | where_ED)

    def evict(self) -> Residency:
        """Without what exceeds the slots. Owners keep their experts, and all ranks keep what the last placement needed."""
        owned_ED, held_ED = self.owned_ED, self.held_ED.copy()
        kept_ED = owned_ED | self.needed_ED
        for rank, slots in enumerate(self.slots_D):
            room = max(0, int(slots) - int((self.needed_ED & ~owned_ED)[:, rank].sum()))
            others = np.flatnonzero(held_ED[:, rank] & ~kept_ED[:, rank])
            latest = others[np.argsort(-self.last_use_ED[others, rank], kind="stable")[:room]]
            held_ED[:, rank] = kept_ED[:, rank]
            held_ED[latest, rank] = True
        return replace(self, held_ED=held_ED)

    def change_owners(self, owner_E: np.ndarray) -> Residency:
        """With other owners, which have fetched what they lack. An expert that leaves a rank counts as just used there, and stays if there
        is a slot.
        """
        clock = self.clock + 1
        used_ED = np.where(self.owned_ED, clock, self.last_use_ED)
        moved = replace(self, owner_E=owner_E, last_use_ED=used_ED, clock=clock)
        return replace(moved.hold_for_now(moved.owned_ED), needed_ED=moved.owned_ED).evict()


@dataclass(frozen=True, eq=False)
class FrozenMove:
    """How one rank gets from one residency of a layer to the next."""

    exchange: Exchange | None
    """None: no rank lacks anything, and there is no collective"""
    dropped: tuple[int, ...]
    """experts whose frozen parts this rank gives up"""
    copies: int
    """frozen parts that all ranks together send"""


def frozen_move(before: Residency, after: Residency, rank: int) -> FrozenMove:
    """What this rank sends, receives and gives up. The owners of `before` send what ranks lack; all ranks come to moves that fit."""
    fetched_ED = after.held_ED & ~before.held_ED
    exchange = exchange_of(np.where(fetched_ED, before.owner_E[:, None], -1), rank) if fetched_ED.any() else None
    dropped_E = before.held_ED[:, rank] & ~after.held_ED[:, rank]
    return FrozenMove(exchange, tuple(np.flatnonzero(dropped_E).tolist()), int(fetched_ED.sum()))
