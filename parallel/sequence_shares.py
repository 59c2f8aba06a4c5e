"""How many sequences of a micro-step each rank computes: by its speed, so that no rank waits long for a slower one outside the experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sequences_by_speed(num_sequences: int, speed_D: Sequence[float]) -> list[int]:
    """How many sequences each rank gets, such that the slowest rank finishes as early as whole sequences allow. Ties: the lowest rank.

    Each sequence in turn goes to the rank that would finish it first, which is optimal for sequences of equal cost. A rank that one
    sequence would make the slowest gets none. A pure function: all ranks compute the same.

    Args:
        speed_D: sequences per second of each rank, in any unit, all positive.
    """
    speed = np.asarray(speed_D, dtype=np.float64)
    assert len(speed), "no ranks"
    assert (speed > 0).all(), speed_D
    sequences = np.zeros(len(speed), dtype=np.int64)
    for _ in range(num_sequences):
        sequences[int(((sequences + 1) / speed).argmin())] += 1
    return sequences.tolist()


def slowest_of_each(speed_D: Sequence[float], size: int) -> list[float]:
    """The slowest speed in each group of `size` neighbouring ranks, whose ranks wait for one another."""
    return [min(speed_D[first : first + size]) for first in range(0, len(speed_D), size)]


def dense_seconds(sequences_D: Sequence[int], speed_D: Sequence[float]) -> float:
    """Seconds until the last rank has computed its sequences; `speed_D` in sequences per second."""
    return float((np.asarray(sequences_D) / np.asarray(speed_D)).max())
