"""What is known of a job's ranks, as one value, and how each fact changes it. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hecate.launch.membership.facts import Cause, Event, Fact
from hecate.launch.membership.job_generation import JobGeneration, RankEnd
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.membership.job_states import State

_NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ending:
    """Why a job has failed."""

    text: str
    device: int | None = None
    """the device whose rank's end is the cause; None: there is no single one"""
    mistake: bool = False
    """whether the user has to mend it"""
    never_up: bool = False
    """whether the device has not come up in time; the launcher knows why, and there is no text"""


@dataclass(frozen=True)
class JobMembers:
    """The state of the automaton. Devices are named by their numbers in the job."""

    policy: JobPolicy
    described: frozenset[int] = _NOBODY
    """the devices that the job's topology has, without which a device cannot join workers that go on; empty: it is to be measured"""
    checkpoint: bool = False
    """whether there is a checkpoint"""
    names: Mapping[int, str] = field(default_factory=dict)
    """the devices in words, where a rank does not say enough"""
    phase: State = State.PLACING
    generation: JobGeneration = field(default_factory=JobGeneration)
    up: frozenset[int] = _NOBODY
    """the devices that can be given a rank: with workers, their processes take orders; with processes, their machines are in the job"""
    loading: frozenset[int] = _NOBODY
    """the devices outside the generation that load by themselves"""
    loaded: frozenset[int] = _NOBODY
    """the devices that have loaded, and wait to join"""
    left_out: frozenset[int] = _NOBODY
    """the devices that are given no rank until their machines have come anew"""
    built: frozenset[int] = _NOBODY
    """the members that have built their part of this generation"""
    arrived: frozenset[int] = _NOBODY
    """the members that were about to connect in this generation"""
    trained: frozenset[int] = _NOBODY
    """the members whose processes have trained in an earlier generation"""
    trains: bool = False
    """whether all that began the job have built their part, so that others can go on without one of them"""
    awaited: frozenset[int] = _NOBODY
    """the devices without which the next generation does not begin"""
    losses: tuple[Event, ...] = ()
    """the losses that have not been decided on"""
    answered: bool = False
    """whether a failure in this generation has been decided on"""
    causes: frozenset[Cause] = frozenset()
    """why ranks of this generation were lost, as far as it was decided on"""
    failures: Mapping[Cause, int] = field(default_factory=dict)
    """the failures that count against `JobPolicy.most`"""
    killed: frozenset[int] = _NOBODY
    """the members whose processes were ordered to end, because the others could not go on with them"""
    halted: frozenset[int] = _NOBODY
    """the members of which people know that they are stopped"""
    broken_off: bool = False
    """whether the ranks of this generation were ordered to break off"""
    stopping: bool = False
    deadline: float = 0.0
    """the time by the caller's clock from which on the phase is late"""
    changed_at: float = 0.0
    """the time by the caller's clock when the phase began"""
    grown_at: float = -1e9
    """the time by the caller's clock when the job last let devices in"""
    ending: Ending | None = None

    @property
    def failed(self) -> int | None:
        """The device whose rank's end has failed the job, if there is one."""
        return None if self.ending is None else self.ending.device


def with_event(state: JobMembers, event: Event) -> JobMembers:
    """The state when one more fact is known."""
    device, at_work = event.device, event.device in state.generation.at_work
    gone = {device}
    match event.fact:
        case Fact.UP:
            names = {**state.names, device: event.said} if event.said else state.names
            return replace(state, up=state.up | gone, left_out=state.left_out - gone, names=names)
        case Fact.DOWN:
            return replace(state, up=state.up - gone, loading=state.loading - gone, loaded=state.loaded - gone)
        case Fact.LOADED if not at_work:
            return replace(state, loading=state.loading - gone, loaded=state.loaded | gone)
        case Fact.LOADED if state.policy.workers:  # it was let in, and could not connect
            return replace(state, generation=state.generation.with_end(device, RankEnd.FAILED), loaded=state.loaded | gone)
        case Fact.BUILT | Fact.LOADED:
            return replace(state, built=state.built | gone)
        case Fact.ARRIVED:
            return replace(state, arrived=state.arrived | gone)
        case Fact.LEFT:
            return replace(state, generation=state.generation.with_end(device, RankEnd.WAITING))
        case Fact.ENDED:
            return _ended(state, event)
        case Fact.LOST:
            return _lost(state, event)
        case Fact.HALTED if state.policy.workers and state.generation.ends.get(device) is not RankEnd.FINISHED:
            return _lost(state, replace(event, cause=Cause.STOPPED))
        case Fact.UNFIT:
            return replace(state, losses=(*state.losses, event))
        case Fact.STEPPED:
            return replace(state, failures={})
        case Fact.SAVED:
            return replace(state, checkpoint=True)
        case Fact.STOP:
            return replace(state, stopping=True)
    return state


def _ended(state: JobMembers, event: Event) -> JobMembers:
    end = event.end
    if event.device not in state.generation.members:
        return state
    if end is RankEnd.FINISHED and state.phase is State.RESIZING and not state.policy.workers:
        end = RankEnd.WAITING  # a process has saved and ended, to begin again
    if end is RankEnd.MISTAKE and state.policy.workers and state.generation.number > 0 and not state.checkpoint:
        end = RankEnd.FAILED  # it may be due to a loss without any checkpoint: all begin anew
    return replace(state, generation=state.generation.with_end(event.device, end, event.said))


def _lost(state: JobMembers, event: Event) -> JobMembers:
    device, end = event.device, state.generation.ends.get(event.device)
    loads = device in state.loading | state.loaded
    state = replace(state, loading=state.loading - {device}, loaded=state.loaded - {device})
    if state.policy.workers:
        state = replace(state, up=state.up - {device})
    if device in state.generation.members and end in (RankEnd.FINISHED, RankEnd.STOPPED):
        return state
    if device in state.generation.members and end not in (RankEnd.LOST, RankEnd.KILLED):
        killed = device in state.killed and event.end is not RankEnd.MISTAKE
        generation = state.generation.with_end(device, RankEnd.KILLED if killed else event.end, event.more or event.said)
        return replace(state, generation=generation, losses=state.losses if killed else (*state.losses, event))
    if loads or state.policy.workers:  # one outside the generation could not start
        lives = event.cause in (Cause.STOPPED, Cause.HUNG)
        said = f"{event.cause.value} {event.said}" if lives else event.said
        return replace(state, losses=(*state.losses, replace(event, cause=Cause.START, said=said)))
    return state
