"""The plan of one layer as compiled loops hold it: for each expert a short list of the ranks that have it, besides the full arrays.

Most experts are on few ranks. What goes over the lists takes time in proportion to the replicas, not to experts times ranks.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from hecate.parallel.loops.jit import loop


class Replicas(NamedTuple):
    """Replicas and quotas of one layer. Of `quota` only the entries of replicas mean anything."""

    has_ED: np.ndarray
    """bool [experts, ranks]: which ranks have a replica of an expert"""
    count_E: np.ndarray
    """int64 [experts]: the number of an expert's replicas"""
    rank_EC: np.ndarray
    """int32 [experts, ranks]: the ranks that have expert e are the first `count_E[e]`, ascending"""
    quota_ED: np.ndarray
    """float64 [experts, ranks]: the assignments that each replica serves"""


@loop
def no_replicas(experts: int, ranks: int) -> Replicas:
    shape = (experts, ranks)
    return Replicas(np.zeros(shape, np.bool_), np.zeros(experts, np.int64), np.zeros(shape, np.int32), np.zeros(shape))


_kept = threading.local()


def room_for_plans(experts: int, ranks: int) -> tuple[Replicas, Replicas, Replicas]:
    """Three plans to work in, of any content: the same in every call of a thread, since fresh memory of this size takes milliseconds."""
    if getattr(_kept, "shape", None) != (experts, ranks):
        _kept.shape, _kept.plans = (experts, ranks), tuple(no_replicas(experts, ranks) for _ in range(3))
    plans: tuple[Replicas, Replicas, Replicas] = _kept.plans
    return plans


@loop
def add(replicas: Replicas, expert: int, rank: int) -> None:
    """A new replica, without assignments yet."""
    replicas.has_ED[expert, rank] = True
    replicas.quota_ED[expert, rank] = 0.0
    place = replicas.count_E[expert]
    while place > 0 and replicas.rank_EC[expert, place - 1] > rank:
        replicas.rank_EC[expert, place] = replicas.rank_EC[expert, place - 1]
        place -= 1
    replicas.rank_EC[expert, place] = rank
    replicas.count_E[expert] += 1


@loop
def remove(replicas: Replicas, expert: int, rank: int) -> None:
    """Take away a replica, with its assignments."""
    replicas.has_ED[expert, rank] = False
    last = replicas.count_E[expert] - 1
    place = 0
    while replicas.rank_EC[expert, place] != rank:
        place += 1
    for c in range(place, last):
        replicas.rank_EC[expert, c] = replicas.rank_EC[expert, c + 1]
    replicas.count_E[expert] = last


@loop
def only_owners(replicas: Replicas, owner_E: np.ndarray) -> None:
    for e in range(len(owner_E)):
        _forget(replicas, e)
        add(replicas, e, owner_E[e])


@loop
def copy_into(source: Replicas, target: Replicas) -> None:
    for e in range(len(source.count_E)):
        _forget(target, e)
        count = source.count_E[e]
        target.count_E[e] = count
        for c in range(count):
            d = source.rank_EC[e, c]
            target.rank_EC[e, c] = d
            target.has_ED[e, d] = True
            target.quota_ED[e, d] = source.quota_ED[e, d]


@loop
def fill_lists(where_ED: np.ndarray, replicas: Replicas) -> bool:
    """The lists, without quotas, of a placement; returns whether every expert is everywhere."""
    experts, ranks = where_ED.shape
    everywhere = True
    for e in range(experts):
        count = 0
        for d in range(ranks):
            if where_ED[e, d]:
                replicas.rank_EC[e, count] = d
                count += 1
        replicas.count_E[e] = count
        everywhere = everywhere and count == ranks
    return everywhere


@loop
def everywhere(replicas: Replicas) -> bool:
    """Whether every expert is on every rank."""
    fewest = replicas.has_ED.shape[1]
    for e in range(len(replicas.count_E)):
        fewest = min(fewest, replicas.count_E[e])
    return fewest == replicas.has_ED.shape[1]


@loop
def foreign(replicas: Replicas, owner_E: np.ndarray) -> np.ndarray:
    """int64 [ranks]: replicas of other ranks' experts."""
    count = np.zeros(replicas.has_ED.shape[1], np.int64)
    for e in range(len(owner_E)):
        for c in range(replicas.count_E[e]):
            count[replicas.rank_EC[e, c]] += 1
        count[owner_E[e]] -= 1
    return count


@loop
def _forget(replicas: Replicas, expert: int) -> None:
    for c in range(replicas.count_E[expert]):
        replicas.has_ED[expert, replicas.rank_EC[expert, c]] = False
    replicas.count_E[expert] = 0
