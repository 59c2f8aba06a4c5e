"""What the launchers tell the automaton, and what it orders them to do, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hecate.launch.membership.job_generation import RankEnd


class Fact(Enum):
    """What a launcher has seen."""

    PLACED = "all devices that the job begins with are requested"
    UP = "the device can be given a rank"
    DOWN = "the device's machine is gone"
    LOADED = "the device's rank has loaded by itself, and waits to join"
    BUILT = "the rank has built its part of the generation, and could go on without the others"
    ARRIVED = "the rank is about to connect to the others of this generation"
    LEFT = "the rank has left this generation with its state, and waits for the next one"
    ENDED = "the rank's part has ended well or with an error, and its machine and worker live"
    LOST = "the rank is gone"
    HALTED = "the rank's process is stopped, as by SIGSTOP"
    UNFIT = "the device can never be given a rank, as it is now"
    STEPPED = "ranks have finished steps"
    SAVED = "there is a checkpoint"
    STOP = "the job is to save and to stop"


class Cause(Enum):
    """Why a rank, or the start of all of them, failed."""

    PROCESS_DIED = "the worker's process died"
    NODE_DIED = "the worker's node died"
    STOPPED = "the worker was stopped"
    HUNG = "the worker did not answer"
    ERROR = "the training raised an error"
    START = "the workers did not come up in time"


@dataclass(frozen=True)
class Event:
    """A fact, and which device it is about."""

    fact: Fact
    device: int = -1
    """the device's number in the job; -1: the fact is about no device alone"""
    said: str = ""
    """what is known of the fact, in words"""
    end: RankEnd = RankEnd.LOST
    """how the rank's part has ended (ENDED and LOST)"""
    cause: Cause = Cause.PROCESS_DIED
    """why the rank was lost (LOST)"""
    more: str = ""
    """what else people should read: how to help (HALTED), or the text of a user's mistake (LOST)"""


class Do(Enum):
    """What a launcher is to do."""

    REQUEST = "have these devices be given a process, and tell when they are UP"
    BEGIN = "have all members of the state's generation begin as its ranks; whatever else their processes do ends"
    GO_ON = "have the members of the state's generation go on as its ranks, with the state that they have or get from others"
    PREPARE = "have these devices load by themselves what a rank needs"
    MAKE_WAY = "have these devices' ranks leave the generation after the step under way, with their state or after a save"
    BREAK_OFF = "have these devices' ranks break off what they do: one of their peers is lost"
    STOP = "have these devices' ranks save and end after the step under way"
    END = "end these devices' processes at once"
    SAY = "tell people"


@dataclass(frozen=True)
class Order:
    """Something to do, and with which devices."""

    do: Do
    devices: tuple[int, ...] = ()
    text: str = ""
    """what to say (SAY)"""
