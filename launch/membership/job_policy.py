"""What differs between the jobs of several launchers, in the decisions on a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from hecate.launch.membership.facts import Cause


@dataclass(frozen=True)
class Limits:
    """How long a job waits, in seconds."""

    build: float = math.inf
    """how long ranks may take to build their part of a generation"""
    end: float = 1.0
    """how long ranks that are to break off may take to end by themselves"""
    cause: float = 5.0
    """how long they may take, if all that have ended so far stopped because of another rank, whose end will say more"""
    wait: float = 600.0
    """how long the job waits until there are enough devices again"""
    death: float = 0.0
    """how long an error of a rank may come before the news of the lost rank that caused it"""
    pause: float = 0.0
    """the time between two growths, so that a device that comes and goes does not keep the others from training"""
    by: str = ""
    """the key of the configuration that sets these limits, for messages: in parentheses, after a space; "": none does"""


@dataclass(frozen=True)
class JobPolicy:
    """The rules of one job."""

    copied: bool = False
    """whether the others have copies of what a lost rank owned (`fssdp.redundancy`)"""
    workers: bool = False
    """What the ranks are. True (Ray): workers, which outlast their part in a generation, and are told who goes on. False (launchers):
    processes, which end with their part, and read by themselves who goes on: one that cannot is followed by a new process."""
    most: int = 3
    """Workers: the largest number of failures of one cause in a row, with no finished step between them; after one more the job fails.
    Processes: how many may be started in place of lost ones in the whole job, or how often all; after them the others go on alone, if they
    can."""
    fewest_to_begin: int = 1
    """the fewest ranks with which a generation begins from a checkpoint or from nothing"""
    fewest: int = 1
    """the fewest ranks with which the others go on at once"""
    tp_size: int = 1
    """the number of ranks of a tensor group (`model.tensor_parallel`), which go on or end as a whole; above 1 no rank is replaced alone"""
    limits: Limits = field(default_factory=Limits)


class Decision(Enum):
    """What follows a failure."""

    GO_ON = "the others go on"
    REPLACE = "all wait for another rank"
    WAIT = "too few are left, and the job waits for a device"
    GIVE_UP = "the job cannot go on"


def decide(policy: JobPolicy, cause: Cause, left: int, *, copies: bool, failures: int) -> Decision:
    """What follows a failure.

    Where the others have copies of all that the lost rank owned, they go on. Else a rank whose process died or was stopped on a living node
    is replaced before they do, since its device is free and a new process loads in seconds. A device that is gone, or does not answer, is
    left out if enough others remain.

    Args:
        left: how many can go on. Of workers those that live, of processes the ranks at work.
        copies: whether the others have copies of what the lost rank owned, and all of them have something to go on from.
        failures: how many there were by now that count against `JobPolicy.most`, with this one.
    """
    if not policy.workers and copies:
        return Decision.GO_ON if left else Decision.GIVE_UP
    if failures > policy.most:
        return Decision.GIVE_UP
    waits = not copies or left < policy.fewest
    if not policy.workers or cause in (Cause.ERROR, Cause.START) or (cause in (Cause.PROCESS_DIED, Cause.STOPPED) and waits):
        return Decision.REPLACE
    return Decision.GO_ON if left >= policy.fewest else Decision.WAIT
