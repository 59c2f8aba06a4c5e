"""Finds devices that are slower, or faster, than the plan assumes, from the work that all ranks report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from hecate.parallel.cluster.topology import Topology
from hecate.report.events import DenseWork

CHANGED = 1.4
"""A device has changed if its real over its planned speed reaches this ratio, or falls to the ratio's inverse."""
WINDOWS = 2
"""How many windows in a row must agree. A single one may contain an evaluation, or a burst of work of another process."""
MIN_SECONDS = 0.1
"""Shortest window, in seconds of each rank's dense work. A shorter one would measure the operating system more than the device."""


def relative_speeds(work: Mapping[int, DenseWork], topology: Topology) -> dict[int, float]:
    """Each rank's real over its planned speed, as a multiple of the median rank's.

    Only these multiples have a meaning. The topology's FLOP/s were measured on a large matmul, whose speed no layer reaches.

    Args:
        work: rank -> its work.
    """
    raw = {rank: done.tokens / done.seconds / topology.flops[rank] for rank, done in work.items() if done.seconds > 0 and done.tokens}
    if not raw:
        return {}
    # Of two devices the faster one takes the median's place, so that the slower one is found.
    middle = max(raw.values()) if len(raw) == 2 else median(raw.values())
    return {rank: value / middle for rank, value in raw.items()}


def changed_ranks(windows: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The ranks whose relative speed differed from the plan in each of the last `WINDOWS` windows, with the median of these speeds."""
    recent = windows[-WINDOWS:]
    if len(recent) < WINDOWS:
        return {}
    changed = {}
    for rank in set.intersection(*(set(window) for window in recent)):
        seen = [window[rank] for window in recent]
        if max(seen) <= 1 / CHANGED or min(seen) >= CHANGED:
            changed[rank] = median(seen)
    return dict(sorted(changed.items()))


class SpeedWindows:
    """The last windows of work of one group of ranks."""

    def __init__(self) -> None:
        self._windows: list[dict[int, float]] = []
        self._work: dict[int, DenseWork] = {}
        """By rank, its work in the window that is not full yet."""

    @property
    def speeds(self) -> dict[int, float]:
        """rank -> real over planned speed (`relative_speeds`) in the last full window; empty before the first."""
        return self._windows[-1] if self._windows else {}

    def add(self, work: Mapping[int, DenseWork], topology: Topology) -> dict[int, float] | None:
        """Take in what each rank has done in a step.

        Args:
            work: by rank; a rank without sequences is left out.
            topology: of all ranks.

        Returns:
            When a window has become full: `changed_ranks` of the last ones. Else None.
        """
        for rank, done in work.items():
            self._work[rank] = self._work.get(rank, DenseWork()) + done
        if not self._work or min(done.seconds for done in self._work.values()) < MIN_SECONDS:
            return None
        self._windows.append(relative_speeds(self._work, topology))
        del self._windows[:-WINDOWS]
        self._work = {}
        return changed_ranks(self._windows)


class SlowRanks:
    """Says once in words that a rank has become slow, and once that it is so no more. Nothing is sent."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin anew, with other ranks."""
        self._seen = SpeedWindows()
        self._named: set[int] = set()

    def after_step(self, work: Mapping[int, DenseWork], topology: Topology) -> list[str]:
        """Take in a step, as `SpeedWindows.add`, and return what is to be said of it, a line for each rank."""
        changed = self._seen.add(work, topology)
        if changed is None:
            return []
        slow = {rank for rank, speed in changed.items() if speed < 1}
        # A rank that was slow is no longer so once it is faster than what makes a rank slow, in one window.
        back = {rank for rank in self._named if self._seen.speeds.get(rank, 0.0) > 1 / CHANGED}
        said = [
            f"straggler: rank {rank} (node {topology.node_of_rank[rank]}) computes at {changed[rank]:.2f} of its planned speed, and all "
            "other ranks wait for it"
            for rank in sorted(slow - self._named)
        ]
        said += [f"rank {rank} is no longer slow" for rank in sorted(back)]
        self._named = (self._named | slow) - back
        return said


def with_speeds(topology: Topology, factors: Mapping[int, float]) -> Topology:
    """The topology with the FLOP/s of some ranks multiplied by factors."""
    return replace(topology, flops=tuple(rate * factors.get(rank, 1.0) for rank, rate in enumerate(topology.flops)))
