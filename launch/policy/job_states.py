"""The states of a job on a Ray cluster, and which state may follow which."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    INITIALIZING = "initializing"
    PLACING = "placing"
    """devices are requested from the cluster"""
    STARTING = "starting"
    """workers start, or build their part of a generation"""
    RUNNING = "running"
    RECOVERING = "recovering"
    """a worker was lost, or training failed: the other ranks end the step under way, and a replacement starts"""
    WAITING = "waiting"
    """too few devices are left, so the job waits for one"""
    RESIZING = "resizing"
    """a device has returned: the ranks leave their generation for one with it"""
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


ENDED = (State.FINISHED, State.STOPPED, State.FAILED)
NEXT = {
    State.INITIALIZING: (State.PLACING,),
    State.PLACING: (State.STARTING,),
    State.STARTING: (State.RUNNING, State.RECOVERING, State.STOPPING, State.FINISHED),
    State.RUNNING: (State.RECOVERING, State.RESIZING, State.STOPPING, State.FINISHED),
    State.RECOVERING: (State.STARTING, State.WAITING, State.STOPPING, State.FINISHED),
    State.WAITING: (State.STARTING, State.STOPPING),
    State.RESIZING: (State.STARTING, State.RECOVERING, State.STOPPING, State.FINISHED),
    State.STOPPING: (State.FINISHED,),
}
"""state -> the states that may follow it; FAILED and STOPPED may follow any state"""
