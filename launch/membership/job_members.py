"""What is known of a job's ranks, as one value, and how each fact changes it. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """whose rank's end is the cause; None: no single one's"""
    mistake: bool = False
    """whether it is the user's to mend"""
    never_up: bool = False
    """whether the device has not come up in time; the launcher knows why, and there is no text"""


@dataclass(frozen=True)
class JobMembers:
    """The state of the automaton. Devices are named by their numbers in the job."""

    policy: JobPolicy
    described: frozenset[int] = _NOBODY
    """the devices that the job's topology has, without which a device cannot join workers that go on; empty: it is to be measured"""
    checkpoint: bool = False
    """whether there is one"""
    names: Mapping[int, str] = field(default_factory=dict)
    """the devices in words, where a rank does not say enough"""
    phase: State = State.PLACING
    generation: JobGeneration = field(default_factory=JobGeneration)
    up: frozenset[int] = _NOBODY
    """those that can be given a rank: of workers those whose processes take orders, of processes those whose machines are there"""
    loading: frozenset[int] = _NOBODY
    """those outside the generation that load by themselves"""
    loaded: frozenset[int] = _NOBODY
    """those that wait to join"""
    left_out: frozenset[int] = _NOBODY
    """those that are given no rank until their machines have come anew"""
    begun: frozenset[int] = _NOBODY
    """the members that have built their part of this generation"""
    arrived: frozenset[int] = _NOBODY
    """the members that were about to connect in this generation"""
    trained: frozenset[int] = _NOBODY
    """the members whose processes have trained in an earlier generation"""
    trains: bool = False
    """whether all that have begun the job together have built their part, so that others can go on without one"""
    awaited: frozenset[int] = _NOBODY
    """devices without which the next generation does not begin"""
    losses: tuple[Event, ...] = ()
    """what has not been decided on"""
    answered: bool = False
    """whether a failure in this generation has been decided on"""
    causes: frozenset[Cause] = frozenset()
    """why ranks of this generation were lost, as far as it was decided on"""
    failures: Mapping[Cause, int] = field(default_factory=dict)
    """what counts against `JobPolicy.most`"""
    killed: frozenset[int] = _NOBODY
    """the members whose processes were ordered to end, because the others could not go on with them"""
    halted: frozenset[int] = _NOBODY
    """the members that people were told are stopped"""
    broken_off: bool = False
    """whether the ranks of this generation were told to break off"""
    stopping: bool = False
    deadline: float = 0.0
    """of the phase, by the caller's clock, like the two that follow"""
    changed_at: float = 0.0
    grown_at: float = -1e9
    ending: Ending | None = None

    @property
    def failed(self) -> int | None:
        """The device whose rank's end has failed the job, if there is one."""
        return None if self.ending is None else self.ending.device


def told(state: JobMembers, event: Event) -> JobMembers:
    """The state when one more fact is known."""
    return _CHANGES[event.fact](state, event)


def _up(state: JobMembers, event: Event) -> JobMembers:
    names = {**state.names, event.device: event.said} if event.said else state.names
    return replace(state, up=state.up | {event.device}, left_out=state.left_out - {event.device}, names=names)


def _down(state: JobMembers, event: Event) -> JobMembers:
    gone = {event.device}
    return replace(state, up=state.up - gone, loading=state.loading - gone, loaded=state.loaded - gone)


def _loaded(state: JobMembers, event: Event) -> JobMembers:
    at_work = event.device in state.generation.at_work
    if at_work and not state.policy.in_memory:
        return _begun(state, event)
    generation = state.generation.with_end(event.device, RankEnd.FAILED) if at_work else state.generation  # it could not connect
    return replace(state, generation=generation, loading=state.loading - {event.device}, loaded=state.loaded | {event.device})


def _begun(state: JobMembers, event: Event) -> JobMembers:
    return replace(state, begun=state.begun | {event.device})


def _arrived(state: JobMembers, event: Event) -> JobMembers:
    return replace(state, arrived=state.arrived | {event.device})


def _left(state: JobMembers, event: Event) -> JobMembers:
    return replace(state, generation=state.generation.with_end(event.device, RankEnd.WAITING))


def _ended(state: JobMembers, event: Event) -> JobMembers:
    if event.device not in state.generation.members:
        return state
    end = event.end
    if end is RankEnd.FINISHED and state.phase is State.RESIZING and not state.policy.in_memory:
        end = RankEnd.WAITING  # a process has saved and ended, to begin again
    if end is RankEnd.MISTAKE and state.policy.in_memory and state.generation.number > 0 and not state.checkpoint:
        end = RankEnd.FAILED  # it may be due to a loss without any checkpoint: all begin anew
    return replace(state, generation=state.generation.with_end(event.device, end, event.said))


def _lost(state: JobMembers, event: Event) -> JobMembers:
    device, end = event.device, state.generation.ends.get(event.device)
    is_member = device in state.generation.members and end not in (RankEnd.LOST, RankEnd.KILLED)
    loads = device in state.loading | state.loaded
    state = replace(state, loading=state.loading - {device}, loaded=state.loaded - {device})
    if state.policy.in_memory:
        state = replace(state, up=state.up - {device})
    if is_member and end in (RankEnd.FINISHED, RankEnd.STOPPED):
        return state
    if is_member:
        killed = device in state.killed and event.end is not RankEnd.MISTAKE
        generation = state.generation.with_end(device, RankEnd.KILLED if killed else event.end, event.more or event.said)
        return replace(state, generation=generation, losses=state.losses if killed else (*state.losses, event))
    if loads or state.policy.in_memory:
        lives = event.cause in (Cause.STOPPED, Cause.HUNG)
        said = f"{event.cause.value} {event.said}" if lives else event.said
        return replace(state, losses=(*state.losses, replace(event, cause=Cause.START, said=said)))
    return state


def _halted(state: JobMembers, event: Event) -> JobMembers:
    if not state.policy.in_memory:
        return state  # the automaton answers it: nothing has changed by itself
    ended = state.generation.ends.get(event.device) is RankEnd.FINISHED
    return state if ended else _lost(state, replace(event, cause=Cause.STOPPED))


def _unfit(state: JobMembers, event: Event) -> JobMembers:
    return replace(state, losses=(*state.losses, event))


def _stepped(state: JobMembers, _: Event) -> JobMembers:
    return replace(state, failures={}) if state.failures else state


_CHANGES: dict[Fact, Callable[[JobMembers, Event], JobMembers]] = {
    Fact.PLACED: lambda state, _: state,
    Fact.UP: _up,
    Fact.DOWN: _down,
    Fact.LOADED: _loaded,
    Fact.BEGUN: _begun,
    Fact.ARRIVED: _arrived,
    Fact.LEFT: _left,
    Fact.ENDED: _ended,
    Fact.LOST: _lost,
    Fact.HALTED: _halted,
    Fact.UNFIT: _unfit,
    Fact.STEPPED: _stepped,
    Fact.SAVED: lambda state, _: replace(state, checkpoint=True),
    Fact.STOP: lambda state, _: replace(state, stopping=True),
}
