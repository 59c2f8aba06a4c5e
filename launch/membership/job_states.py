"""The states of a job, and which state may follow which."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    PLACING = "placing"
    """devices are requested"""
    STARTING = "starting"
    """ranks start, or build their part of a generation"""
    RUNNING = "running"
    RECOVERING = "recovering"
    """ranks were lost, or training failed: the others break off what they do"""
    WAITING = "waiting"
    """too few devices are left, so the job waits for one"""
    RESIZING = "resizing"
    """a device has come: the ranks leave their generation for one with it"""
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


ENDED = (State.FINISHED, State.STOPPED, State.FAILED)
NEXT = {
    State.PLACING: (State.STARTING,),
    State.STARTING: (State.RUNNING, State.RECOVERING, State.STOPPING, State.FINISHED),
    State.RUNNING: (State.RECOVERING, State.RESIZING, State.STOPPING, State.FINISHED),
    State.RECOVERING: (State.STARTING, State.WAITING, State.STOPPING, State.FINISHED),
    State.WAITING: (State.STARTING, State.STOPPING),
    State.RESIZING: (State.STARTING, State.RECOVERING, State.WAITING, State.STOPPING, State.FINISHED),
    State.STOPPING: (State.FINISHED,),
}
"""state -> the states that may follow it; FAILED and STOPPED may follow any state"""
