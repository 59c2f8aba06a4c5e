"""Who computes how many rows of a micro-step: by speed, so that no device holds up the dense part of a step for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rows_by_speed(num_rows: int, speed_D: Sequence[float]) -> list[int]:
    """Rows of each rank such that the slowest is through as early as whole rows allow. Ties: the lowest rank.

    Row after row goes where it would be through first, which is optimal for equal rows. A rank so slow that even one row would hold up
    the others gets none. A pure function: all ranks come to the same.

    Args:
        speed_D: rows per second of each rank, in any unit, all positive.
    """
    speed = np.asarray(speed_D, dtype=np.float64)
    assert len(speed), "no ranks"
    assert (speed > 0).all(), speed_D
    rows = np.zeros(len(speed), dtype=np.int64)
    for _ in range(num_rows):
        rows[int(((rows + 1) / speed).argmin())] += 1
    return rows.tolist()


def slowest_of_each(speed_D: Sequence[float], size: int) -> list[float]:
    """Of each group of `size` neighbouring ranks, whose ranks wait for one another."""
    return [min(speed_D[first : first + size]) for first in range(0, len(speed_D), size)]


def dense_seconds(rows_D: Sequence[int], speed_D: Sequence[float]) -> float:
    """When the last rank is through with its rows; `speed_D` in rows per second."""
    return float((np.asarray(rows_D) / np.asarray(speed_D)).max())
