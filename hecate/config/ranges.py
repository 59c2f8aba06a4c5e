"""What a configuration key has beside its type, default and meaning: the range of its number, and what it is about."""

import math
from dataclasses import dataclass
from typing import Any

from hecate.parallel.values.expert_kinds import Family

MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`. Each end is included unless it is marked open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'>' if self.low_open else '>='} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'<' if self.high_open else '<='} {self.high:.10g}"


COUNT = Range(1, MAX_INT)
"""whole numbers of things of which there is at least one"""
WHOLE = Range(0, MAX_INT)
"""whole numbers, 0 included"""
POSITIVE = Range(0, low_open=True)
AT_LEAST_ZERO = Range(0)
SHARE = Range(0, 1)


def key(allowed: Range | None = None, *, computes: bool = True, family: Family | None = None) -> dict[str, Any]:
    """Return the metadata of a key's field: what a key has beside its type and default.

    Args:
        allowed: the range of a number, or None if the value is not a number.
        computes: whether another value changes what is computed. False: the key may differ when a run is resumed; of a section: all
            its keys may.
        family: the value of moe.family without which the key means nothing; None: it has a meaning with several.
    """
    return {"range": allowed, "computes": computes, "family": family}
