"""Decides who goes on after a loss, who is started, and when all begin again, for all launchers alike.

A launcher calls `step` with what it has seen, carries out the orders, and calls again a moment later. The facts and orders are in
`facts.py`, the states in `job_states.py`. What follows a loss is in `losses.py`, and for users in `docs/use/survival.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hecate.launch.membership.facts import Cause, Do, Event, Fact, Order
from hecate.launch.membership.job_generation import RankEnd
from hecate.launch.membership.job_members import Ending, JobMembers, with_event
from hecate.launch.membership.job_policy import Decision, decide
from hecate.launch.membership.job_states import ENDED, State
from hecate.launch.membership.losses import answer_error, answer_processes, answer_workers, causes_of, lose_hung
from hecate.launch.membership.turn import AT_WORK, Turn


def step(state: JobMembers, events: Sequence[Event], now: float) -> tuple[JobMembers, tuple[Order, ...]]:
    """The state after some events, and what the launcher is to do.

    Args:
        events: what the launcher has seen since the last call, in its order.
        now: seconds, by a clock that runs while the launcher does.
    """
    if state.phase is State.PLACING and any(event.fact is Fact.PLACED for event in events):
        state = replace(state, phase=State.STARTING, changed_at=now, deadline=now + state.policy.limits.build)
    for event in events:
        state = with_event(state, event)
    if state.phase in (State.PLACING, *ENDED):
        return state, ()
    turn = Turn(state, now)
    (answer_workers if state.policy.workers else answer_processes)(turn, events)
    if turn.state.stopping and turn.state.phase not in (State.STOPPING, *ENDED):
        turn.stop()
    if turn.state.phase not in ENDED and turn.generation.all_ended and turn.ends == {RankEnd.FINISHED}:
        turn.enter(State.FINISHED)
    match turn.state.phase:
        case State.STARTING:
            _start(turn)
        case State.RUNNING | State.RESIZING:
            _run(turn)
        case State.RECOVERING | State.WAITING:
            _recover(turn)
        case State.STOPPING:
            _stop_further(turn)
    _prepare(turn)
    return turn.state, tuple(turn.orders)


def _start(turn: Turn) -> None:
    """Begin the first generation when enough devices are up, and notice when all ranks of a generation have built their part."""
    state, policy, members = turn.state, turn.policy, set(turn.generation.members)
    if not turn.generation.exists:
        if state.awaited <= state.up and len(state.up) >= policy.fewest_to_begin:
            turn.begin()
        elif turn.late:
            turn.fail(Ending("", min(state.awaited - state.up), mistake=True, never_up=True))
    elif state.built >= members or not (policy.workers or policy.copied):
        turn.change(trains=True, described=state.described if state.described >= members else frozenset(members))
        turn.enter(State.RUNNING)
    elif policy.workers and turn.ends & {RankEnd.FAILED, RankEnd.WAITING}:
        turn.begin_recovery()
    elif turn.late:
        late = next(device for device in turn.generation.members if device not in state.built)
        lose_hung(turn, late, f"its part of the run was not built in time{policy.limits.by}")


def _run(turn: Turn) -> None:
    """Notice ranks whose part has ended while that of others goes on, and let the job grow."""
    is_resizing = turn.state.phase is State.RESIZING
    breaking = {RankEnd.FAILED} if is_resizing else {RankEnd.FAILED, RankEnd.WAITING}
    if turn.policy.workers and turn.ends & breaking:
        turn.begin_recovery()
    elif is_resizing and turn.generation.all_ended:
        turn.begin_or_wait()
    elif turn.generation.all_ended:
        turn.fail_by_culprit()
    elif not is_resizing:
        _end_those_too_late(turn)
        _grow(turn)


def _grow(turn: Turn) -> None:
    """Let in those that have loaded. Where ranks cannot go on with others, all save and begin again with a node that has come."""
    state, policy, members = turn.state, turn.policy, turn.generation.members
    if not policy.workers and policy.copied:
        if state.loaded and RankEnd.FINISHED not in turn.ends:
            turn.regroup((*members, *sorted(state.loaded)), Do.GO_ON)
        return
    new = state.loaded if policy.workers else state.up - set(members)
    known = not policy.workers or state.described >= new | set(members)
    if new and known and turn.now - state.grown_at >= policy.limits.pause:
        again = "a node has joined; all ranks save, and start again with it"
        turn.say("a device has returned and joins" if policy.workers else again)
        turn.order(Do.MAKE_WAY, turn.at_work)
        turn.change(grown_at=turn.now)
        turn.enter(State.RESIZING)


def _end_those_too_late(turn: Turn) -> None:
    """End processes that would wait for ever for others, which have ended with all steps done and had not read of this generation.

    They were let in while the others did their last step.
    """
    state, generation = turn.state, turn.generation
    finished = {device for device, end in generation.ends.items() if end is RankEnd.FINISHED}
    if turn.policy.workers or state.arrived >= finished:
        return
    # A rank that has trained, but lost the others in their last message, waits as well.
    late = [device for device in generation.members if device not in state.trained or (device not in finished and device in state.arrived)]
    turn.order(Do.END, late)
    turn.change(generation=replace(generation, members=tuple(device for device in generation.members if device not in late)))


def _recover(turn: Turn) -> None:
    """Wait until all have ended their part, and begin the next generation."""
    if not turn.generation.all_ended:
        if turn.late:
            _end_late(turn)
        return
    if turn.policy.workers and not turn.state.answered:
        if turn.now - turn.state.changed_at < turn.policy.limits.death:
            return
        answer_error(turn)
    elif not turn.policy.workers and turn.state.phase is State.RECOVERING:
        _begin_again(turn)
    if turn.state.phase not in ENDED:
        turn.begin_or_wait()


def _end_late(turn: Turn) -> None:
    """End ranks that have not ended by themselves. A worker that loads or saves notices a loss late: only one counts as hung at a time."""
    if turn.policy.workers:
        seconds = turn.policy.limits.end
        lose_hung(turn, turn.generation.at_work[0], f"it went on for {seconds:.0f} s without the others{turn.policy.limits.by}")
    else:
        turn.change(killed=turn.state.killed | set(turn.at_work), deadline=math.inf)
        turn.order(Do.END, turn.at_work)


def _begin_again(turn: Turn) -> None:
    """Have all processes begin again, unless that was done too often, or one of them has met a user's mistake."""
    failures = sum(turn.state.failures.values()) + 1
    decision = decide(turn.policy, Cause.PROCESS_DIED, 0, copies=False, failures=failures)
    if RankEnd.MISTAKE in turn.ends or decision is Decision.GIVE_UP:
        turn.fail_by_culprit()
        return
    before = " before the run had begun; all ranks start again"
    turn.say(causes_of(turn) + (before if turn.policy.copied else "; all ranks start again from the last checkpoint"))
    turn.change(losses=(), failures={Cause.PROCESS_DIED: failures})


def _stop_further(turn: Turn) -> None:
    """Wait until all ranks have saved and ended. Steps and saves may take long; once ranks break off, nothing more is saved."""
    workers, all_ended = turn.policy.workers, turn.generation.all_ended
    if workers and all_ended:
        if not turn.ends <= {RankEnd.FINISHED, RankEnd.STOPPED}:
            left = "the last checkpoint is what is left" if turn.state.checkpoint else "there is no checkpoint"
            turn.say(f"the ranks could not save together; {left}")
        turn.enter(State.STOPPED)
    elif all_ended:
        turn.fail_by_culprit()
    elif workers and turn.ends & {RankEnd.FAILED, RankEnd.WAITING}:
        turn.break_off()
    if workers and not all_ended and turn.late:
        turn.fail(Ending("the workers did not stop in time; the last checkpoint is what is left"))
    elif not all_ended and turn.late:
        _end_late(turn)
    elif not workers and turn.state.trains:
        _end_those_too_late(turn)


def _prepare(turn: Turn) -> None:
    """Have devices load that could join the ranks."""
    state, policy = turn.state, turn.policy
    phases = (*AT_WORK, State.RECOVERING, State.WAITING) if policy.workers else AT_WORK
    can_join = policy.workers or (policy.copied and policy.tp_size == 1 and RankEnd.FINISHED not in turn.ends)
    if not can_join or state.stopping or state.phase not in phases or not turn.generation.exists:
        return
    idle = state.up - state.loading - state.loaded - state.left_out
    if new := sorted(device for device in idle if not turn.generation.stays(device)):
        turn.change(loading=state.loading | set(new), trained=state.trained - set(new))
        turn.order(Do.PREPARE, new)
