"""Count what makes the host wait for the device, and the operators that the device was given, by the line of the project that asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.host_waits import place_of
from tests.mock_cuda.install import device

NO_WAITS = frozenset({"H2D pinned", "D2H pinned"})
"""what is reported, but is no wait"""


@dataclass
class Watched:
    """What happened in a block."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(place, kind) -> how often; a place is FILE:FUNCTION of the innermost line of the project's own"""
    operators: dict[str, int] = field(default_factory=dict)
    """name -> how often"""

    def by_place(self) -> dict[str, int]:
        """Place -> waits."""
        places: Counter[str] = Counter()
        for (place, kind), number in self.waits.items():
            if kind not in NO_WAITS:
                places[place] += number
        return dict(places)

    def by_kind(self) -> dict[str, int]:
        """Kind -> how often, waits or not."""
        kinds: Counter[str] = Counter()
        for (_, kind), number in self.waits.items():
            kinds[kind] += number
        return dict(kinds)


@contextmanager
def watching() -> Iterator[Watched]:
    """Watch all threads of this process until the end of the block."""
    watched = Watched()

    def note(kind: str, what: str) -> None:
        watched.waits[place_of(sys._getframe(1)), kind] += 1

    device.observe(note)
    device.count_operators(True)
    try:
        yield watched
    finally:
        watched.operators = device.operators()
        device.count_operators(False)
        device.observe(None)
