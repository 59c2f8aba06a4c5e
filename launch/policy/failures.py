"""Decides what follows the loss of a worker: replace it, go on without it, wait, or give up. The controller acts on the decision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum


class Cause(Enum):
    """Why a worker, or the start of all of them, failed. Failures of each cause are counted separately."""

    ACTOR_DIED = "the worker's process died"
    NODE_DIED = "the worker's node died"
    STOPPED = "the worker was stopped"
    HUNG = "the worker did not answer"
    ERROR = "the training raised an error"
    START = "the workers did not come up in time"


class Decision(Enum):
    REPLACE = "replace"
    """start a new worker; all go on when it has loaded"""
    SHRINK = "shrink"
    """go on with the workers that are left; a new worker joins later"""
    WAIT = "wait"
    """too few workers are left: wait for a device"""
    RAISE = "raise"
    """give up"""


@dataclass(frozen=True)
class FailurePolicy:
    """Bounds on failures, and the failures so far. It is a value: each failure gives a new one."""

    max_failures: int
    """largest number of failures of one cause in a row, with no finished step between them"""
    fewest: int
    """smallest number of workers that the job can have"""
    counts: dict[Cause, int] = field(default_factory=dict)
    """cause -> failures in a row so far"""

    def after_progress(self) -> FailurePolicy:
        """The policy after a finished step: failures are counted from 0 again."""
        return replace(self, counts={}) if self.counts else self

    def decide(self, cause: Cause, left: int, *, copied: bool = False, counted: bool = True) -> tuple[Decision, FailurePolicy]:
        """Decide what to do after a failure, and return the policy with this failure counted.

        A process that died or was stopped on a living node is replaced, since its device is free and a new process loads in seconds. If the
        other workers have copies of all that it owned, they go on meanwhile. A device that is gone, or does not answer, is left out if
        enough others remain.

        Args:
            left: number of workers that still live.
            copied: whether the other workers have copies of what the lost worker owned.
            counted: False: it belongs to a failure that was counted already, like the loss of a second rank of one node.
        """
        counts = {**self.counts, cause: self.counts.get(cause, 0) + counted}
        after = replace(self, counts=counts)
        if counts[cause] > self.max_failures:
            return Decision.RAISE, after
        waits = not copied or left < self.fewest
        if cause in (Cause.ERROR, Cause.START) or (cause in (Cause.ACTOR_DIED, Cause.STOPPED) and waits):
            return Decision.REPLACE, after
        return (Decision.SHRINK if left >= self.fewest else Decision.WAIT), after
