"""Share the sequences of a micro-step out by the ranks' speeds, so that no rank waits long for a slower one outside the experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sequences_by_speed(num_sequences: int, speed_D: Sequence[float], group_size: int = 1) -> list[int]:
    """Return how many sequences each rank gets, so that the last rank finishes as early as whole sequences allow.

    Each sequence in turn goes to the rank that would finish it first, which is optimal for sequences of equal cost; ties go to the
    lowest rank. A rank so slow that a single sequence would make it the last one gets none. All ranks compute the same result.

    Args:
        speed_D: the relative speed of each rank, positive.
        group_size: a rank gets whole groups of so many sequences, each of which counts as one above; it divides `num_sequences`.
    """
    speed = np.asarray(speed_D, dtype=np.float64)
    assert len(speed), "no ranks"
    assert (speed > 0).all(), speed_D
    assert num_sequences % group_size == 0, (num_sequences, group_size)
    groups = np.zeros(len(speed), dtype=np.int64)
    for _ in range(num_sequences // group_size):
        groups[int(((groups + 1) / speed).argmin())] += 1
    return (groups * group_size).tolist()


def slowest_of_each(speed_D: Sequence[float], size: int) -> list[float]:
    """Return the lowest speed in each group of `size` neighbouring ranks, which wait for each other."""
    return [min(speed_D[first : first + size]) for first in range(0, len(speed_D), size)]


def dense_seconds(sequences_D: Sequence[int], speed_D: Sequence[float]) -> float:
    """Return the seconds until the last rank has computed its sequences. `speed_D` is in sequences per second."""
    return float((np.asarray(sequences_D) / np.asarray(speed_D)).max())
