"""Expanding and shrinking experts step by step (FlexMoE, SIGMOD 23)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.planners.plan import PlanInput, Policy
from hecate.parallel.planners.rivals.copy_places import CopyPlaces, copy_places
from hecate.parallel.planners.rivals.expert_packing import even_split_in_node
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitPlan

ROUNDS = 10
"""the most changes of a layer's placement in one step"""


def plan_flexmoe(given: PlanInput) -> SplitPlan:
    """From the present placement, up to `ROUNDS` changes, each of which leaves the devices' loads more even.

    A change: the expert with the highest load per replica that has room on another device and helps gains a replica on the least-loaded
    such device (Expand). If there is none, the replicated expert with the lowest load per replica gives one up (Shrink), for the one
    with the highest to gain it; if its rank has that one already, a replica from elsewhere moves in to make room (Migrate). It helps if the
    busiest device's load falls, or fewer devices have it, or max/min falls.

    The changes are those of the paper. The artifact of LAER-MoE (commit 72db5b7) has a FlexMoE with one kind of change, which doubles an
    expert on a device that has it and often stops at once; it never ends with a less busy device in its worked examples. The number of
    changes and the comparison by max and max/min are the artifact's. The budget is that of `copy_places`.

    The present placement is `present_LED`, the hottest of it if the slots hold less. Where that has owners alone, changes go on from
    these, and from places that are all filled evenly, as in the artifact. A layer takes the budget and start whose busiest device has
    least. FlexMoE converges over the steps; where `present_LED` is None nothing is known of the steps before, and there is up to one
    change for each expert. Assignments are split evenly over the replicas in their own node, else over all. A replica that serves nothing
    is not made. Devices count as equally fast.
    """
    loads_LED, owned_LED = given.expected_LED, given.owned_LED
    quota_LED = np.empty_like(loads_LED)
    rounds = given.num_experts if given.present_LED is None else ROUNDS
    for layer, (loads_ED, owner_E) in enumerate(zip(loads_LED, given.owner_LE, strict=True)):
        least = np.inf
        present_ED = None if given.present_LED is None else given.present_LED[layer]
        for places in copy_places(given.slots_D, owner_E):
            pinned_ED = owned_LED[layer] & places.at_owners
            for where_ED in _starts(present_ED, owned_LED[layer], pinned_ED, loads_ED.sum(-1), places):
                for _ in range(rounds):
                    changed_ED = _change(loads_ED, pinned_ED, where_ED, places.slots_D, given.topology)
                    if changed_ED is None:
                        break
                    where_ED = changed_ED
                quota_ED = even_split_in_node(where_ED, loads_ED, given.topology)
                if quota_ED.sum(0).max() < least * (1 - 1e-9):
                    least, quota_LED[layer] = quota_ED.sum(0).max(), quota_ED
    return SplitPlan(given.owner_LE, owned_LED | (quota_LED > 0), quota_LED, source_split=SourceSplit("in_node", quota_LED > 0))


def _starts(
    present_ED: np.ndarray | None, owned_ED: np.ndarray, pinned_ED: np.ndarray, load_E: np.ndarray, places: CopyPlaces
) -> list[np.ndarray]:
    """Placements from which changes go on, each bool [experts, ranks] with every expert somewhere."""
    if present_ED is not None and (present_ED & ~owned_ED).any():
        kept_ED = _kept(present_ED, owned_ED, pinned_ED, load_E, places)
        if kept_ED.any(1).all():
            return [kept_ED]
    return [pinned_ED, _full(places, pinned_ED)] if places.at_owners else [_full(places, pinned_ED)]


def _kept(present_ED: np.ndarray, owned_ED: np.ndarray, pinned_ED: np.ndarray, load_E: np.ndarray, places: CopyPlaces) -> np.ndarray:
    """bool [experts, ranks]: what is pinned, and as many replicas as there are places for: the hottest first, those of owners last."""
    order_E = np.argsort(-load_E, kind="stable")
    kept_ED, free_D = pinned_ED.copy(), places.slots_D
    for part_ED in (present_ED & ~owned_ED, present_ED & owned_ED & ~pinned_ED):
        sorted_ED = part_ED[order_E]
        kept_ED[order_E] |= sorted_ED & (np.cumsum(sorted_ED, axis=0) <= free_D)
        free_D = free_D - np.minimum(sorted_ED.sum(0), free_D)
    return kept_ED


def _full(places: CopyPlaces, pinned_ED: np.ndarray) -> np.ndarray:
    """bool [experts, ranks]: all places dealt evenly, device by device, each to the expert with the fewest replicas; ties by index."""
    where_ED = pinned_ED.copy()
    for rank, slots in enumerate(places.slots_D.tolist()):
        for _ in range(min(slots, int((~where_ED[:, rank]).sum()))):
            where_ED[_least(where_ED.sum(1), ~where_ED[:, rank]), rank] = True
    return where_ED


def _change(
    loads_ED: np.ndarray, pinned_ED: np.ndarray, where_ED: np.ndarray, slots_D: np.ndarray, topology: Topology
) -> np.ndarray | None:
    """The placement after one more change; None if none helps. What is pinned takes no slot and stays."""
    quota_ED = even_split_in_node(where_ED, loads_ED, topology)
    busy_D, per_copy_E = quota_ED.sum(0), loads_ED.sum(1) / where_ED.sum(1)
    movable_ED = where_ED & ~pinned_ED
    room_ED = ~where_ED & (movable_ED.sum(0) < slots_D)
    changed_ED = where_ED.copy()
    if room_ED.any():
        experts, target_E = np.arange(len(where_ED)), np.where(room_ED, busy_D, np.inf).argmin(1)
        expanded_ED = where_ED.copy()
        expanded_ED[experts, target_E] |= room_ED.any(1)
        # Row e: the devices' loads if expert e alone expands.
        helps_E = _better(busy_D - quota_ED + even_split_in_node(expanded_ED, loads_ED, topology), busy_D) & room_ED.any(1)
        if helps_E.any():
            hot = _least(-per_copy_E, helps_E)
            changed_ED[hot] = expanded_ED[hot]
            return changed_ED
    if not _exchange(per_copy_E, movable_ED, busy_D, changed_ED):
        return None
    return changed_ED if _better(even_split_in_node(changed_ED, loads_ED, topology).sum(0), busy_D) else None


def _exchange(per_copy_E: np.ndarray, movable_ED: np.ndarray, busy_D: np.ndarray, where_ED: np.ndarray) -> bool:
    """Shrink the coldest of the replicated experts for the hottest one, in `where_ED`; False if that is impossible."""
    hot = int(per_copy_E.argmax())
    shrinkable_E = movable_ED.any(1) & (where_ED.sum(1) > 1)
    shrinkable_E[hot] = False
    if where_ED[hot].all() or not shrinkable_E.any():
        return False
    cold = _least(per_copy_E, shrinkable_E)
    freed = _least(busy_D, movable_ED[cold])
    where_ED[cold, freed] = False
    if where_ED[hot, freed]:
        other_ED = movable_ED & ~where_ED[:, freed, None] & ~where_ED[hot]
        if not other_ED.any():
            return False
        rank = _least(busy_D, other_ED.any(0))
        moved = _least(-per_copy_E, other_ED[:, rank])
        where_ED[moved, rank], where_ED[moved, freed] = False, True
        freed = rank
    where_ED[hot, freed] = True
    return True


def _better(now_XD: np.ndarray, before_D: np.ndarray) -> np.ndarray:
    """bool [...]: whether the busiest device's load is lower, or fewer devices have it, or max/min is lower."""
    rounding = 1 - 1e-9  # an expert must not be copied for what is only rounding
    most, least, most_before = now_XD.max(-1), now_XD.min(-1), before_D.max()
    as_busy = (now_XD > most_before * rounding).sum(-1) < (before_D > most_before * rounding).sum()
    # A device may be idle, so the ratio is multiplied out.
    lower_ratio = most * before_D.min() < most_before * least * rounding
    return (most < most_before * rounding) | (as_busy & (most * rounding <= most_before)) | lower_ratio


def _least(value_X: np.ndarray, among_X: np.ndarray) -> int:
    """Index of the smallest value, the first of equals."""
    return int(np.where(among_X, value_X, np.inf).argmin())


POLICY = Policy(plan_flexmoe, own_split=True)
