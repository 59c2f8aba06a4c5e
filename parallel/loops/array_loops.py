"""Sums, largest entries and order of arrays, as loops: they compile ten times as fast as numpy's functions do under numba, and as plain
Python they give the same to the bit (numpy's own `sum` adds up in another order)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.loops.jit import loop


@loop
def total(values: np.ndarray) -> float:
    """The sum, from first to last."""
    result = 0.0
    for i in range(len(values)):
        result += values[i]
    return result


@loop
def largest(values: np.ndarray) -> float:
    """The largest entry; there is at least one."""
    result = values[0]
    for i in range(1, len(values)):
        if values[i] > result:
            result = values[i]
    return result


@loop
def where_largest(values: np.ndarray) -> int:
    """The index of the largest entry, the first of equals."""
    best = 0
    for i in range(1, len(values)):
        if values[i] > values[best]:
            best = i
    return best


_RUN = 8
"""entries that are sorted by insertion, which is faster than merging so few"""


@loop
def descending_order(keys: np.ndarray) -> np.ndarray:
    """int64: the indices by key, the largest first, equals by index. A merge sort of short runs that insertion has sorted."""
    count = len(keys)
    order, merged = np.empty(count, np.int64), np.empty(count, np.int64)
    for start in range(0, count, _RUN):
        for i in range(start, min(start + _RUN, count)):
            key, place = keys[i], i
            while place > start and keys[order[place - 1]] < key:
                order[place] = order[place - 1]
                place -= 1
            order[place] = i
    width = _RUN
    while width < count:
        for start in range(0, count, 2 * width):
            middle, end = min(start + width, count), min(start + 2 * width, count)
            left, right = start, middle
            for i in range(start, end):
                if left < middle and (right >= end or keys[order[left]] >= keys[order[right]]):
                    merged[i] = order[left]
                    left += 1
                else:
                    merged[i] = order[right]
                    right += 1
        order, merged = merged, order
        width *= 2
    return order
