"""Expanding and shrinking experts step by step (FlexMoE, SIGMOD 23)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.planners.packing import even_split_in_node
from hecate.parallel.planners.plan import Plan, PlanInput

ROUNDS = 10


def plan_flexmoe(given: PlanInput) -> Plan:
    """From the placement that is there, up to `ROUNDS` changes that each lower the busiest device's load or the max/min ratio.

    A change: the expert with the highest load per replica gains one on the least-loaded device with a free slot (Expand). If there is
    none, the replicated expert with the lowest load per replica gives one up (Shrink), and if the slot is where the hot expert is
    already, a replica from elsewhere moves into it to make room (Migrate). The placement that is there is `resident_LED` as far as it
    fits in the slots, else the owners alone: FlexMoE converges over iterations, not within one. Choices are split evenly over the
    replicas in their own node, else over all. Devices count as equally fast.
    """
    tokens_LED = given.tokens_LED
    where_LED = _present(given, tokens_LED.sum(-1))
    for layer in range(given.num_layers):
        where_LED[layer] = _rebalance(given, tokens_LED[layer], given.owned_LED[layer], where_LED[layer])
    return Plan(given.owner_LE, where_LED, even_split_in_node(where_LED, tokens_LED, given.topology))


def _present(given: PlanInput, load_LE: np.ndarray) -> np.ndarray:
    """bool [layers, experts, ranks]: the owners and what is resident; where that is more than the slots hold, the hottest of it."""
    if given.resident_LED is None:
        return given.owned_LED
    foreign_LED = given.resident_LED & ~given.owned_LED
    order_LE1 = np.argsort(-load_LE, axis=1, kind="stable")[..., None]
    sorted_LED = np.take_along_axis(foreign_LED, order_LE1, axis=1)
    np.put_along_axis(foreign_LED, order_LE1, sorted_LED & (np.cumsum(sorted_LED, axis=1) <= given.slots_D), axis=1)
    return given.owned_LED | foreign_LED


def _rebalance(given: PlanInput, tokens_ED: np.ndarray, owned_ED: np.ndarray, where_ED: np.ndarray) -> np.ndarray:
    load_E = tokens_ED.sum(-1)
    busy_D = even_split_in_node(where_ED, tokens_ED, given.topology).sum(0)
    for _ in range(ROUNDS):
        changed_ED = _change(load_E, owned_ED, where_ED, given.slots_D, busy_D)
        if changed_ED is None:
            break
        now_D = even_split_in_node(changed_ED, tokens_ED, given.topology).sum(0)
        # The ratios are max/min, multiplied out: a device may be idle.
        if not (now_D.max() < busy_D.max() or now_D.max() * busy_D.min() < busy_D.max() * now_D.min()):
            break
        where_ED, busy_D = changed_ED, now_D
    return where_ED


def _change(load_E: np.ndarray, owned_ED: np.ndarray, where_ED: np.ndarray, slots_D: np.ndarray, busy_D: np.ndarray) -> np.ndarray | None:
    """The placement after one more change; None if none is possible."""
    per_copy_E = load_E / where_ED.sum(1)
    foreign_ED = where_ED & ~owned_ED
    hot = int(per_copy_E.argmax())
    changed_ED = where_ED.copy()
    room_D = (foreign_ED.sum(0) < slots_D) & ~where_ED[hot]
    if room_D.any():
        changed_ED[hot, _least(busy_D, room_D)] = True
        return changed_ED
    shrinkable_E = foreign_ED.any(1)
    shrinkable_E[hot] = False
    if where_ED[hot].all() or not shrinkable_E.any():
        return None
    cold = _least(per_copy_E, shrinkable_E)
    freed = _least(busy_D, foreign_ED[cold])
    changed_ED[cold, freed] = False
    if not where_ED[hot, freed]:
        changed_ED[hot, freed] = True
        return changed_ED
    movable_ED = foreign_ED & ~changed_ED[:, freed, None] & ~where_ED[hot]
    movable_ED[cold, freed] = False
    if not movable_ED.any():
        return None
    rank = _least(busy_D, movable_ED.any(0))
    moved = _least(-per_copy_E, movable_ED[:, rank])
    changed_ED[moved, rank] = False
    changed_ED[moved, freed] = True
    changed_ED[hot, rank] = True
    return changed_ED


def _least(value_X: np.ndarray, among_X: np.ndarray) -> int:
    """Index of the smallest value, the first of equals."""
    return int(np.where(among_X, value_X, np.inf).argmin())
