"""Ratios of times of two sides that take turns, with their intervals, and what may be said of them.

In a round each side is sampled once, and every other round goes through the sides backwards. So two rounds sample the sides A and B in
the order ABBA, and a drift, which slows each sample by as much more as the one before, cancels. The ratio of such a pair of rounds is the
geometric mean of its two ratios, and the ratio of all is the median of the pairs', since what disturbs one side only makes a pair
worthless.

Other programs disturb for seconds, so pairs that follow each other are not independent. The interval therefore comes from a bootstrap
that draws blocks of pairs (Politis and Romano's circular one, 1992). A block has the square root of all pairs: blocks become longer with
the series, so that they hold what hangs together, and there are as many of them as each has pairs, so that their spread is known. With
few blocks that spread is itself uncertain, and the interval is widened as Student's t widens one (Abramowitz and Stegun 26.7.5, the first
two terms).

An interval says how well a run knows its ratio. It does not say what the ratio would be on another machine, or on another day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE, NORMAL_QUANTILE = 0.90, 1.645
"""of an interval; and the standard normal quantile at its upper end"""
LEAST_PAIRS = 8
"""the fewest pairs of rounds whose interval is known; from fewer nothing is claimed"""
SERIES = 1000
"""the series that the bootstrap draws"""
VERDICTS = {1: "faster", 0: "a tie", -1: "slower"}


@dataclass(frozen=True)
class Budget:
    """How well a ratio has to be known, and what may be spent on it."""

    half_width: float
    """half of the interval's width over the ratio: at most this"""
    rounds: int
    """the most rounds, an even number"""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sides that took turns."""

    value: float
    low: float
    high: float
    """the ends of the interval; of fewer than LEAST_PAIRS pairs the least and the largest of them, which is no interval"""
    pairs: int
    """of rounds"""
    narrow: bool
    """the interval is as narrow as its budget asks"""
    of_times: bool = True
    """the ratio is one of seconds, so below 1 is faster; else one of speeds"""

    @property
    def verdict(self) -> int:
        """1: faster, -1: slower, 0: a tie, because 1 is inside the interval or there is none."""
        if self.pairs < LEAST_PAIRS or self.low <= 1 <= self.high:
            return 0
        return 1 if (self.value < 1) == self.of_times else -1

    def __str__(self) -> str:
        if self.pairs < LEAST_PAIRS:
            return f"{self.value:.3g}: nothing is claimed from {2 * self.pairs} rounds"
        wide = "" if self.narrow else f", not narrow enough after {2 * self.pairs} rounds"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}): {VERDICTS[self.verdict]}{wide}"

    def numbers(self, key: str) -> dict[str, float]:
        """What a summary keeps of it."""
        ends = {key: self.value, f"{key}_low": self.low, f"{key}_high": self.high}
        return {**ends, f"{key}_verdict": float(self.verdict), f"{key}_narrow": float(self.narrow)}


def reached(low: float, high: float, *, at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """What an interval, of these ends, says of a goal: met, missed, or not decided."""
    if at_least <= low and high <= at_most:
        return "met"
    return "missed" if high < at_least or low > at_most else "not decided"


def of_times(these: Sequence[float], those: Sequence[float], budget: Budget) -> Ratio:
    """How many times as long these take as those: both in seconds, of one round after the other (`until_narrow`)."""
    return _ratio(neighbours(these, those), budget, of_times=True)


def speedup(ours: Sequence[float], theirs: Sequence[float], budget: Budget) -> Ratio:
    """How many times as fast ours is as theirs: both in seconds, of one round after the other (`until_narrow`)."""
    return _ratio(-neighbours(ours, theirs), budget, of_times=False)


def largest(ratios: Iterable[Ratio]) -> Ratio:
    """The largest of several, between the largest of their lower ends and the largest of their upper ends."""
    return _extreme(list(ratios), max)


def least(ratios: Iterable[Ratio]) -> Ratio:
    """The least of several, between the least of their lower ends and the least of their upper ends."""
    return _extreme(list(ratios), min)


def until_narrow(
    sample: Callable[[str], float], sides: Sequence[str], compared: Sequence[tuple[str, str]], budget: Budget
) -> dict[str, list[float]]:
    """Sample the sides in turn until all ratios are narrow or the budget is used up. Returns the seconds of each side, by round.

    Args:
        sample: a function that returns the seconds of one sample of a side. On several ranks it returns the same number on each, so that
            they stop together.
        sides: in the order of a round; those that are compared side by side are neighbours.
        compared: pairs of sides whose ratios have to be narrow.
    """
    assert budget.rounds % 2 == 0, budget
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(budget.rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            found[side].append(sample(side))
        if number % 2 and number + 1 >= 2 * LEAST_PAIRS and all(of_times(found[a], found[b], budget).narrow for a, b in compared):
            break
    return found


def neighbours(these: Sequence[float], those: Sequence[float]) -> np.ndarray:
    """The logarithm of each pair of rounds' ratio, float64 [rounds / 2]."""
    rounds = np.log(these) - np.log(those)
    return rounds.reshape(-1, 2).mean(axis=1)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The ends of the interval of the median of a series.

    Args:
        values: float64 [values], which may hang together with those before them.
    """
    count = len(values)
    length = math.ceil(math.sqrt(count))
    starts = np.random.default_rng(seed).integers(0, count, (SERIES, math.ceil(count / length)))
    drawn = (starts[..., None] + np.arange(length)).reshape(SERIES, -1)[:, :count] % count
    ends = np.quantile(np.median(values[drawn], axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    freedom = count / length - 1
    wider = math.sqrt(1 + 1 / freedom) * (1 + (NORMAL_QUANTILE**2 + 1) / (4 * freedom))
    middle = np.median(values)
    low, high = middle + wider * (ends - middle)
    return float(low), float(high)


def _ratio(pairs: np.ndarray, budget: Budget, *, of_times: bool) -> Ratio:
    known = len(pairs) >= LEAST_PAIRS
    value, low, high = np.exp([np.median(pairs), *(interval(pairs) if known else (pairs.min(), pairs.max()))]).tolist()
    return Ratio(value, low, high, len(pairs), known and high - low <= 2 * budget.half_width * value, of_times)


def _extreme(ratios: Sequence[Ratio], choose: Callable[[Iterable[float]], float]) -> Ratio:
    value, low, high = (choose(getattr(one, name) for one in ratios) for name in ("value", "low", "high"))
    return replace(
        ratios[0], value=value, low=low, high=high, pairs=min(one.pairs for one in ratios), narrow=all(one.narrow for one in ratios)
    )
