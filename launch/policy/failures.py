"""What to do when a worker is lost: replace it, go on without it, wait, or give up. Pure: the controller carries it out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum


class Cause(Enum):
    """Why a worker, or the start of all of them, failed. Each is counted for itself."""

    ACTOR_DIED = "the worker's process died"
    NODE_DIED = "the worker's node died"
    HUNG = "the worker did not answer"
    ERROR = "the training raised an error"
    START = "the workers did not come up in time"


class Decision(Enum):
    REPLACE = "replace"
    """start a new worker in its place, all go on when it is there"""
    SHRINK = "shrink"
    """go on with those that are left, take it back when it returns"""
    WAIT = "wait"
    """too few are left: wait for a device"""
    RAISE = "raise"
    """give up"""


@dataclass(frozen=True)
class FailurePolicy:
    """Bounds on failures, and what happened so far. A value: each failure gives a new one."""

    max_failures: int
    """of one cause in a row, without a finished step in between"""
    fewest: int
    """workers that the job must have"""
    counts: dict[Cause, int] = field(default_factory=dict)

    def after_progress(self) -> FailurePolicy:
        """A step was finished: no failure is in a row with those before."""
        return replace(self, counts={}) if self.counts else self

    def decide(self, cause: Cause, left: int, *, copied: bool = False) -> tuple[Decision, FailurePolicy]:
        """What to do after a failure.

        A process that died on a living node is replaced: its place is free, and a new one is there in seconds. Where the others have
        all that it had, they do not wait for it. A device that is gone, or does not answer, is left out as long as enough remain.

        Args:
            left: workers that still live.
            copied: they have copies of what the lost one alone owned.
        """
        counts = {**self.counts, cause: self.counts.get(cause, 0) + 1}
        after = replace(self, counts=counts)
        if counts[cause] > self.max_failures:
            return Decision.RAISE, after
        waits = not copied or left < self.fewest
        if cause in (Cause.ERROR, Cause.START) or (cause is Cause.ACTOR_DIED and waits):
            return Decision.REPLACE, after
        return (Decision.SHRINK if left >= self.fewest else Decision.WAIT), after
