"""Which ranks hold which frozen parts of a layer's experts, and what moves when that changes.

Frozen parts are neither reduced nor stepped, so a replica never goes out of date. A rank receives a replica when a placement first needs
it, and keeps it until its slot is needed for another expert. Which rank holds what is a pure function of the placements so far, so every
rank computes it for all ranks without a message.

Shapes: E experts, D ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hecate.parallel.transfer.routes import Moves
from hecate.parallel.transfer.transfer_plan import Exchange, exchange_of

_NEVER = -1
_MEMORY = 0.95
"""how much less a step counts than the one after it"""
_USES_BEFORE_ANY, _FETCHES_BEFORE_ANY = 20.0, 1.0
"""what each layer's counts of uses and fetches begin with"""
_OF_MEAN_USES = 0.35
"""the share of the mean uses to expect: replicas that another plan would bring are used less long than those that every plan wants"""
_LEAST_USES, _MOST_USES = 1.5, 200.0


@dataclass(frozen=True, eq=False)
class Residency:
    """Who holds which frozen parts of one layer, and when placements last needed them. The same on every rank."""

    owner_E: np.ndarray
    """int64 [experts]: the owner of each expert, which always holds its frozen part"""
    slots_D: np.ndarray
    """int64 [ranks]: how many experts of other ranks a rank keeps; if a placement needs more, it receives these and keeps no others"""
    held_ED: np.ndarray
    """bool [experts, ranks]: which ranks hold the frozen part"""
    needed_ED: np.ndarray
    """bool [experts, ranks]: which ranks the last placement has put a replica on"""
    last_use_ED: np.ndarray
    """int64 [experts, ranks]: the `clock` of the last placement that needed the replica"""
    clock: int = 0
    """the number of placements and changes of owners so far"""
    uses: float = _USES_BEFORE_ANY
    """the number of replicas that steps have computed with, the latest steps counting most"""
    fetches: float = _FETCHES_BEFORE_ANY
    """the number of replicas that placements have brought, the latest steps counting most"""

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
        fetches = self.fetches + int((where_ED & ~self.held_ED).sum())
        return replace(self.hold_for_now(where_ED), needed_ED=where_ED, last_use_ED=used_ED, clock=clock, fetches=fetches).evict()

    def after_step(self) -> Residency:
        """After a step that has computed with the last placement."""
        uses = _MEMORY * self.uses + int((self.needed_ED & ~self.owned_ED).sum())
        return replace(self, uses=uses, fetches=_MEMORY * self.fetches)

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
        """With other owners, which have fetched what they lack. An expert that leaves its old owner counts as just used by it, and stays
        if that rank has a slot.
        """
        clock = self.clock + 1
        used_ED = np.where(self.owned_ED, clock, self.last_use_ED)
        moved = replace(self, owner_E=owner_E, last_use_ED=used_ED, clock=clock)
        return replace(moved.hold_for_now(moved.owned_ED), needed_ED=moved.owned_ED).evict()


def residency_to_json(state: Residency) -> dict[str, Any]:
    """Who holds what, as JSON values (`residency_from_json`). When experts were used last is said of those that are held alone."""
    held = np.argwhere(state.held_ED | state.needed_ED)
    rows = [[int(e), int(d), int(state.last_use_ED[e, d]), int(state.needed_ED[e, d]), int(state.held_ED[e, d])] for e, d in held]
    return {"held": rows, "clock": state.clock, "uses": state.uses, "fetches": state.fetches}


def residency_from_json(value: Mapping[str, Any], fresh: Residency) -> Residency:
    """The residency that `residency_to_json` gave, with the owners and slots of `fresh`; what exceeds the slots is given up.

    Raises:
        ValueError: the values are none of a residency of so many experts and ranks.
    """
    try:
        rows = np.array(value["held"], dtype=np.int64).reshape(-1, 5)
        clock, uses, fetches = int(value["clock"]), float(value["uses"]), float(value["fetches"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"no residency: {type(error).__name__}: {error}") from error
    experts, ranks = fresh.held_ED.shape
    if ((rows < [0, 0, _NEVER, 0, 0]) | (rows > [experts - 1, ranks - 1, clock, 1, 1])).any() or not (
        0 <= uses < np.inf and 0 < fetches < np.inf
    ):
        raise ValueError(f"no residency of {experts} experts on {ranks} ranks")
    held_ED, needed_ED, used_ED = fresh.owned_ED, np.zeros((experts, ranks), dtype=bool), np.full((experts, ranks), _NEVER)
    expert_R, rank_R, use_R, is_needed_R, is_held_R = rows.T
    held_ED[expert_R, rank_R] |= is_held_R == 1
    needed_ED[expert_R, rank_R] = is_needed_R == 1
    used_ED[expert_R, rank_R] = use_R
    found = replace(fresh, held_ED=held_ED, needed_ED=needed_ED, last_use_ED=used_ED, clock=clock, uses=uses, fetches=fetches)
    return found.evict()


def never_gives_up(layers: Sequence[Residency]) -> bool:
    """Whether every rank has slots for all experts that it does not own, so that it keeps each replica to the end of the run."""
    return all(bool((layer.slots_D >= (~layer.owned_ED).sum(0)).all()) for layer in layers)


def expected_uses(layers: Sequence[Residency], steps_left: int | None = None) -> float:
    """For how many steps a replica will be computed with if it is brought now.

    Planners pay a frozen part over so many steps. A number that is too high has them fetch other replicas in each step for gains that do
    not last; one that is too low has them fetch none. Where replicas are never given up, the steps that are left are what each can be used
    for. Elsewhere the last few tens of steps of these layers show it, and no replica is used in more steps than are left.

    Args:
        steps_left: of the run, the one that is planned included, so at least 1; None: not known, and not counted on.
    """
    most = _MOST_USES if steps_left is None else min(float(steps_left), _MOST_USES)
    if steps_left is not None and never_gives_up(layers):
        return most
    mean = sum(layer.uses for layer in layers) / sum(layer.fetches for layer in layers)
    return min(max(_OF_MEAN_USES * mean, _LEAST_USES), most)


@dataclass(frozen=True, eq=False)
class FrozenMove:
    """How one rank gets from one residency of a layer to the next."""

    exchange: Exchange | None
    """what this rank sends and receives; None: no rank lacks anything, and there is no collective"""
    dropped: tuple[int, ...]
    """the experts whose frozen parts this rank gives up"""
    copies: int
    """the number of frozen parts that all ranks send"""


def frozen_move(before: Residency, after: Residency, rank: int) -> FrozenMove:
    """What this rank sends, receives and gives up. The owners of `before` send what ranks lack; all ranks come to moves that fit."""
    fetched_ED = after.held_ED & ~before.held_ED
    exchange = exchange_of(Moves(np.where(fetched_ED, before.owner_E[:, None], -1)), rank) if fetched_ED.any() else None
    dropped_E = before.held_ED[:, rank] & ~after.held_ED[:, rank]
    return FrozenMove(exchange, tuple(np.flatnonzero(dropped_E).tolist()), int(fetched_ED.sum()))
