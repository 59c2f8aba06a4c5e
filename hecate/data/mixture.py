"""Choose the next sample of a run: an endless, seeded, resumable order over weighted data sources.

The order is a pure function of (seed, sizes, weights). It does not depend on ranks or batches.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def permutation(seed: int, source: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Return the order of a source's samples in one of its epochs, int64 [size].

    The order sorts raw Philox draws, whose stream NumPy guarantees never to change. `Generator.permutation` has no such
    guarantee, and a run must resume with the same order under another version of NumPy.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, source, epoch])).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


class Mixture:
    """An endless iterator of (source index, sample index).

    Each source is shuffled again at the start of each of its epochs. After any number n of draws, each source is less than one
    draw away from its share n * weight / sum(weights) (R. Tijdeman, The chairman assignment problem, 1980).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`sizes`: the number of samples of each source, at least 1. `weights`: each source's share of the draws, finite and positive."""
        assert len(sizes) == len(weights) > 0, (sizes, weights)
        assert all(size > 0 for size in sizes), sizes
        assert all(weight > 0 and math.isfinite(weight) for weight in weights), weights
        assert seed >= 0, seed
        self.sizes = tuple(sizes)
        self.seed = seed
        # The shares are exact fractions of the decimal digits that the user wrote (0.1 is one tenth), so that equal shares tie exactly.
        shares = [Fraction(repr(float(weight))) for weight in weights]
        common = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * common) for share in shares]
        self._total = sum(self._weights)
        self._drawn = [0] * len(sizes)
        self._order: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source: (epoch, permutation of that epoch)

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> tuple[int, int]:
        source = self._next_source()
        epoch, position = divmod(self._drawn[source], self.sizes[source])
        if source not in self._order or self._order[source][0] != epoch:
            self._order[source] = (epoch, permutation(self.seed, source, epoch, self.sizes[source]))
        self._drawn[source] += 1
        return source, int(self._order[source][1][position])

    def _next_source(self) -> int:
        """Return the source that must be drawn soonest, among those far enough behind their share. Ties go to the lower index."""
        count = len(self.sizes)
        if count == 1:
            return 0
        draw = sum(self._drawn) + 1
        slack = 2 * count - 2
        due = [
            source for source in range(count) if (self._weights[source] * draw - self._drawn[source] * self._total) * slack >= self._total
        ]
        return min(due, key=lambda source: Fraction(slack * (self._drawn[source] + 1) - 1, self._weights[source]))

    def state_dict(self) -> dict[str, list[int]]:
        """Return the number of draws from each source so far, which is the whole state."""
        return {"drawn": list(self._drawn)}

    def check_state_dict(self, state: dict[str, list[int]]) -> None:
        """Change nothing. Raises KeyError, TypeError or ValueError if `state` is none of a mixture of as many sources."""
        drawn = state["drawn"]
        if len(drawn) != len(self.sizes) or any(type(count) is not int or count < 0 for count in drawn):
            raise ValueError(f"the draws from {len(self.sizes)} sources are {str(drawn)[:100]}")

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Continue after the draws that `state` counts. Raises as `check_state_dict`."""
        self.check_state_dict(state)
        self._drawn = list(state["drawn"])
