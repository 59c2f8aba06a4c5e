"""Expanding and shrinking experts step by step (FlexMoE, SIGMOD 23)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.planners.expert_packing import even_split_in_node
from hecate.parallel.planners.plan import Plan, PlanInput
from hecate.parallel.topology import Topology

ROUNDS = 10
"""changes of a layer's placement in one step"""


def plan_flexmoe(given: PlanInput) -> Plan:
    """From the placement that is there, up to `ROUNDS` changes that each lower the busiest device's load or the max/min ratio.

    A change: the expert with the highest load per replica that has room on another device and helps gains a replica on the least-loaded
    such device (Expand). If there is none, the replicated expert with the lowest load per replica gives one up (Shrink), for the one
    with the highest to gain it; if that one is there already, a replica from elsewhere moves in to make room (Migrate).

    The placement that is there is `present_LED`, the hottest of it if the slots hold less. FlexMoE converges over the steps; where
    `present_LED` is None nothing is known of the steps before, and changes go on from the owners alone, up to one for each expert.
    Assignments are split evenly over the replicas in their own node, else over all. Devices count as equally fast.
    """
    loads_LED, owned_LED = given.expected_LED, given.owned_LED
    where_LED = _present(given, loads_LED.sum(-1))
    rounds = given.num_experts if given.present_LED is None else ROUNDS
    for layer in range(given.num_layers):
        for _ in range(rounds):
            changed_ED = _change(loads_LED[layer], owned_LED[layer], where_LED[layer], given.slots_D, given.topology)
            if changed_ED is None:
                break
            where_LED[layer] = changed_ED
    return Plan(given.owner_LE, where_LED, even_split_in_node(where_LED, loads_LED, given.topology))


def _present(given: PlanInput, load_LE: np.ndarray) -> np.ndarray:
    """bool [layers, experts, ranks]: the owners, and of the replicas of the plan before the hottest, as many as the slots hold."""
    if given.present_LED is None:
        return given.owned_LED
    foreign_LED = given.present_LED & ~given.owned_LED
    order_LE1 = np.argsort(-load_LE, axis=1, kind="stable")[..., None]
    sorted_LED = np.take_along_axis(foreign_LED, order_LE1, axis=1)
    np.put_along_axis(foreign_LED, order_LE1, sorted_LED & (np.cumsum(sorted_LED, axis=1) <= given.slots_D), axis=1)
    return given.owned_LED | foreign_LED


def _change(loads_ED: np.ndarray, owned_ED: np.ndarray, where_ED: np.ndarray, slots_D: np.ndarray, topology: Topology) -> np.ndarray | None:
    """The placement after one more change; None if none helps."""
    quota_ED = even_split_in_node(where_ED, loads_ED, topology)
    busy_D, per_copy_E = quota_ED.sum(0), loads_ED.sum(1) / where_ED.sum(1)
    foreign_ED = where_ED & ~owned_ED
    room_ED = ~where_ED & (foreign_ED.sum(0) < slots_D)
    experts, target_E = np.arange(len(where_ED)), np.where(room_ED, busy_D, np.inf).argmin(1)
    expanded_ED = where_ED.copy()
    expanded_ED[experts, target_E] |= room_ED.any(1)
    # Row e: the devices' loads if expert e alone expands.
    helps_E = _better(busy_D - quota_ED + even_split_in_node(expanded_ED, loads_ED, topology), busy_D) & room_ED.any(1)
    changed_ED = where_ED.copy()
    if helps_E.any():
        hot = _least(-per_copy_E, helps_E)
        changed_ED[hot] = expanded_ED[hot]
        return changed_ED
    if not _exchange(per_copy_E, foreign_ED, busy_D, changed_ED):
        return None
    return changed_ED if _better(even_split_in_node(changed_ED, loads_ED, topology).sum(0), busy_D) else None


def _exchange(per_copy_E: np.ndarray, foreign_ED: np.ndarray, busy_D: np.ndarray, where_ED: np.ndarray) -> bool:
    """Shrink the coldest of the replicated experts for the hottest one, in `where_ED`; False if that is impossible."""
    hot = int(per_copy_E.argmax())
    shrinkable_E = foreign_ED.sum(1) > 0
    shrinkable_E[hot] = False
    if where_ED[hot].all() or not shrinkable_E.any():
        return False
    cold = _least(per_copy_E, shrinkable_E)
    freed = _least(busy_D, foreign_ED[cold])
    where_ED[cold, freed] = False
    if where_ED[hot, freed]:
        movable_ED = foreign_ED & ~where_ED[:, freed, None] & ~where_ED[hot]
        if not movable_ED.any():
            return False
        rank = _least(busy_D, movable_ED.sum(0) > 0)
        moved = _least(-per_copy_E, movable_ED[:, rank])
        where_ED[moved, rank], where_ED[moved, freed] = False, True
        freed = rank
    where_ED[hot, freed] = True
    return True


def _better(now_XD: np.ndarray, before_D: np.ndarray) -> np.ndarray:
    """bool [...]: whether the busiest device's load is lower, or max/min (multiplied out, because a device may be idle)."""
    most, least = now_XD.max(-1), now_XD.min(-1)
    rounding = 1 - 1e-9  # an expert must not be copied for what is only rounding
    return (most < before_D.max() * rounding) | (most * before_D.min() < before_D.max() * least * rounding)


def _least(value_X: np.ndarray, among_X: np.ndarray) -> int:
    """Index of the smallest value, the first of equals."""
    return int(np.where(among_X, value_X, np.inf).argmin())
