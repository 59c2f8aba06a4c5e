"""Where copies of experts fit, for rules whose systems have no owners: each device holds a number of copies, of whichever experts.

Here an expert never leaves its owner, and another rank holds it in a slot. Such a rule gets the larger of two budgets, which are not
comparable: the slots alone, where they hold every expert, so that owners mean nothing and an owner may serve none of its expert's
assignments; and the slots with a place for each expert at its owner beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class CopyPlaces:
    """The places of one layer, for copies of experts."""

    slots_D: np.ndarray
    """int64 [ranks]: the number of copies, of any experts, that each rank may hold"""
    owner_E: np.ndarray
    """int64 [experts]: the owner of each expert"""
    at_owners: bool
    """whether each expert has one place at its owner beside the slots"""

    @property
    def number(self) -> int:
        return int(self.slots_D.sum()) + len(self.owner_E) * self.at_owners


def copy_places(slots_D: np.ndarray, owner_E: np.ndarray) -> list[CopyPlaces]:
    """Return the budgets that hold every expert. More copies on a device than there are experts are of no use, and not counted."""
    slots_D = np.minimum(slots_D, len(owner_E))
    both = [CopyPlaces(slots_D, owner_E, True), CopyPlaces(slots_D, owner_E, False)]
    return [places for places in both if places.number >= len(owner_E)]


def place_copies(number_E: np.ndarray, load_E: np.ndarray, places: CopyPlaces, node_D: np.ndarray) -> np.ndarray:
    """Copies by load per copy, each to the nodes with the fewest copies of the expert, there to the least-loaded device (LAER-MoE).

    Where these nodes have no room, to the least-loaded device with room; a copy for which there is none is left out. Ties go to the lower
    index. A device may get several copies of an expert. Where there are places at owners, a device's load counts the experts at home there
    that are still to be placed: LAER-MoE has no such places, and without this slots would go to copies that their owners had room for.

    Args:
        number_E: int64 [experts], at least 1; together no more than places.
        load_E: float64 [experts], split evenly over the copies.
        node_D: int64 [ranks].

    Returns:
        int64 [experts, ranks]: copies; each expert has one.
    """
    experts, world = len(number_E), len(places.slots_D)
    copies_ED = np.zeros((experts, world), np.int64)
    share_E = load_E / number_E
    free_D, room_D = places.slots_D.copy(), places.slots_D > 0
    busy_D = np.bincount(places.owner_E, weights=share_E, minlength=world) if places.at_owners else np.zeros(world)
    for expert in np.argsort(-share_E, kind="stable").tolist():
        owner, share = int(places.owner_E[expert]), float(share_E[expert])
        home_free, in_node_N = places.at_owners, np.zeros(node_D.max() + 1, np.int64)
        busy_D[owner] -= share * places.at_owners
        for _ in range(int(number_E[expert])):
            open_D = room_D.copy()
            open_D[owner] |= home_free
            fewest_D = open_D & (in_node_N == in_node_N.min())[node_D]
            among_D = fewest_D if fewest_D.any() else open_D
            if not among_D.any():
                break
            rank = int(np.where(among_D, busy_D, np.inf).argmin())
            if rank == owner and home_free:
                home_free = False
            else:
                free_D[rank] -= 1
                room_D[rank] = free_D[rank] > 0
            copies_ED[expert, rank] += 1
            in_node_N[node_D[rank]] += 1
            busy_D[rank] += share
    return copies_ED
