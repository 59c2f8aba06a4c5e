"""Which sample comes next: an endless, seeded, resumable order over weighted sources.

The order is a pure function of (seed, sizes, weights): it knows neither ranks nor batches.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def permutation(seed: int, source: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of a source's samples in one of its epochs, int64 [size].

    Sorts raw Philox draws, whose stream NumPy keeps for ever; `Generator.permutation` gives no such promise, and a run
    must resume under another NumPy.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, source, epoch])).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


class Mixture:
    """Endless iterator of (source, sample) indices.

    Every source is shuffled anew in every epoch of its own. After any number n of draws, each source is less than one
    draw from its share n * weight / sum(weights) (R. Tijdeman, The chairman assignment problem, 1980).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`sizes`: samples of each source, at least 1. `weights`: shares of the draws, finite and positive."""
        assert len(sizes) == len(weights) > 0, (sizes, weights)
        assert all(size > 0 for size in sizes), sizes
        assert all(weight > 0 and math.isfinite(weight) for weight in weights), weights
        assert seed >= 0, seed
        self.sizes = tuple(sizes)
        self.seed = seed
        # Exact shares from the decimal digits the user wrote: 0.1 means one tenth, so that ties are ties.
        shares = [Fraction(repr(float(weight))) for weight in weights]
        common = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * common) for share in shares]
        self._total = sum(self._weights)
        self._drawn = [0] * len(sizes)
        self._order: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source: (epoch, its permutation)

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
        """Of the sources behind their share far enough to be due, the one that must be drawn soonest; ties by index."""
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
        """Draws so far from each source: all there is to know."""
        return {"drawn": list(self._drawn)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        drawn = list(state["drawn"])
        assert len(drawn) == len(self.sizes), (drawn, self.sizes)
        self._drawn = drawn
