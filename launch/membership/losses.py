"""What follows when ranks are lost: who goes on, who is replaced, and what people read of it."""

from __future__ import annotations

from collections.abc import Sequence

from hecate.launch.membership.facts import Cause, Do, Event, Fact
from hecate.launch.membership.job_generation import RankEnd
from hecate.launch.membership.job_members import Ending, with_event
from hecate.launch.membership.job_policy import Decision, decide
from hecate.launch.membership.job_states import ENDED, State
from hecate.launch.membership.turn import AT_WORK, Turn


def answer_processes(turn: Turn, events: Sequence[Event]) -> None:
    """Answer losses of ranks that are processes. They notice by themselves that others are lost, and read who goes on.

    Args:
        events: of this call.
    """
    _answer_halted(turn, [event for event in events if event.fact is Fact.HALTED])
    for loss in turn.state.losses:
        if loss.cause is Cause.START:
            _answer_lost_joiner(turn, loss)
    losses = tuple(loss for loss in turn.state.losses if loss.cause is not Cause.START)
    turn.change(losses=losses)
    state = turn.state
    trains = state.trains or state.built >= set(turn.generation.members)
    copies = turn.policy.copied and trains and RankEnd.MISTAKE not in turn.ends and state.phase is not State.RECOVERING
    if not copies and (new := [loss for loss in losses if loss in events]):
        _give_time(turn, new)
    elif copies and losses and RankEnd.FINISHED not in turn.ends:
        _go_on(turn, losses)


def causes_of(turn: Turn) -> str:
    """What was lost, in words; ranks that stopped because of others are named only if they are alone."""
    losses = turn.state.losses
    named = [loss for loss in losses if loss.end is not RankEnd.CONSEQUENCE] or losses
    return ", ".join(f"rank {turn.generation.rank_of(loss.device)} {loss.said}" for loss in named) or "a node was lost"


def _answer_halted(turn: Turn, halted: Sequence[Event]) -> None:
    """End processes that are stopped, where the others can do without them; where their end would be the run's, only say it."""
    at_work = [event for event in halted if event.device in turn.generation.at_work]
    for event in at_work:
        rank = turn.generation.rank_of(event.device)
        if turn.policy.copied or turn.policy.most > 0:
            turn.say(f"rank {rank} has been stopped {event.said}, and is ended")
            turn.order(Do.END, [event.device])
        elif event.device not in turn.state.halted:
            turn.say(f"rank {rank} is stopped, as by SIGSTOP, and the others wait for it; {event.more}")
    turn.change(halted=frozenset(event.device for event in at_work))


def _answer_lost_joiner(turn: Turn, loss: Event) -> None:
    turn.say(f"a rank that was to join the run {loss.said}")
    if loss.end is RankEnd.MISTAKE:
        turn.say(loss.more)
    if loss.end is RankEnd.MISTAKE or (loss.device in turn.state.up and not _may_replace(turn)):
        turn.leave_out(loss.device)


def _give_time(turn: Turn, losses: Sequence[Event]) -> None:
    """Let the others end by themselves, within a while: one of them may be about to say what the cause is."""
    state, limits, ends = turn.state, turn.policy.limits, turn.generation.ends
    new = {loss.device for loss in losses}
    known = {end for device, end in ends.items() if device not in new} - {RankEnd.CONSEQUENCE, RankEnd.FINISHED}
    if state.phase in AT_WORK:
        turn.begin_recovery()
    elif state.phase is State.STOPPING and not state.broken_off:
        turn.break_off()
    elif state.killed or known:
        return
    unsaid = {ends[device] for device in new} <= {RankEnd.CONSEQUENCE, RankEnd.MISTAKE}
    turn.change(deadline=turn.now + (limits.cause if unsaid else limits.end))


def _go_on(turn: Turn, losses: Sequence[Event]) -> None:
    """Have the others go on at once. Those of a tensor group that has lost one are ended, since they have only parts of the model."""
    members, tp_size, dead = turn.generation.members, turn.policy.tp_size, [loss.device for loss in losses]
    broken = {members.index(device) // tp_size for device in dead}
    left = tuple(device for rank, device in enumerate(members) if rank // tp_size not in broken)
    at_work = sum(device in turn.generation.at_work for device in left)
    if decide(turn.policy, losses[0].cause, at_work, copies=True, failures=0) is Decision.GIVE_UP:
        return
    said = causes_of(turn)
    ended = [device for device in members if device not in left and device not in dead]
    if ended:
        said += f"; {len(ended)} more of its tensor group ended, which have only parts of the model"
    turn.order(Do.END, ended)  # before they can read that the others go on without them
    turn.regroup(left, Do.GO_ON)
    turn.say(f"{said}; {len(left)} ranks go on")
    for device in dead:
        if device in turn.state.up and tp_size == 1 and not _may_replace(turn):
            turn.leave_out(device)


def _may_replace(turn: Turn) -> bool:
    """Whether one more process may be started in place of a lost one, which then counts."""
    count = sum(turn.state.failures.values())
    if count >= turn.policy.most or turn.state.stopping:
        return False
    turn.change(failures={Cause.PROCESS_DIED: count + 1})
    return True


def answer_workers(turn: Turn, _: Sequence[Event] = ()) -> None:
    """Answer losses of ranks that live in workers. The others break off as ordered, report when they have, and wait for the next
    generation."""
    losses = turn.state.losses
    turn.change(losses=())
    for loss in losses:
        if turn.state.phase not in ENDED:
            (_answer_unfit if loss.fact is Fact.UNFIT else _answer_worker)(turn, loss)
    if turn.state.phase not in ENDED and RankEnd.MISTAKE in turn.ends:
        turn.fail_by_culprit()


def lose_hung(turn: Turn, device: int, said: str) -> None:
    """Count a member whose worker lives as lost, since it does not carry out its orders."""
    turn.state = with_event(turn.state, Event(Fact.LOST, device, said, cause=Cause.HUNG))
    answer_workers(turn)


def answer_error(turn: Turn) -> None:
    """Answer that training has failed, and no worker was lost."""
    errors = [turn.generation.said[device] for device, end in turn.generation.ends.items() if end is RankEnd.FAILED]
    _answer_worker(turn, Event(Fact.LOST, said=next(filter(None, errors), "a message among the ranks failed"), cause=Cause.ERROR))
    turn.change(answered=True)


def _others_train(turn: Turn) -> bool:
    """Whether ranks train, whom a worker that is not among them yet need not end."""
    return turn.state.phase in (State.RUNNING, State.RESIZING)


def _answer_unfit(turn: Turn, loss: Event) -> None:
    """Go on without a device where others train; else the user has to mend it."""
    if not _others_train(turn) or loss.device in turn.generation.at_work:
        turn.fail(Ending(loss.said, loss.device, mistake=True))
        return
    turn.say(f"{turn.state.names[loss.device]} is left out: {loss.said}")
    _give_up(turn, loss.device)


def _give_up(turn: Turn, device: int) -> None:
    """End the worker of a device, and have no other one come."""
    turn.state = with_event(turn.state, Event(Fact.DOWN, device))
    turn.order(Do.END, [device])


def _answer_worker(turn: Turn, loss: Event) -> None:
    """Decide what follows a failure, and begin to carry it out."""
    state, device, cause, rank = turn.state, loss.device, loss.cause, turn.generation.rank_of(loss.device)
    who = f"{state.names[device]} (rank {'none yet' if rank is None else rank})" if device >= 0 else "the workers"
    what = f"{who}: {cause.value} ({loss.said[:160]})"
    loses_rank = rank is not None and cause is not Cause.START
    if state.phase is State.STOPPING:
        turn.say(f"{what}; the job stops without it")
        _give_up(turn, device)
        if loses_rank:
            turn.break_off()
        return
    # Before the topology is known no rank has trained anything, and one that was measured without the lost device could not grow again.
    copies = turn.policy.copied and bool(state.described) and not state.answered
    count = state.failures.get(cause, 0) + (not loses_rank or cause not in state.causes)  # the ranks of a lost node are one failure
    decision = decide(turn.policy, cause, len(state.up), copies=copies, failures=count)
    turn.change(failures={**state.failures, cause: count})
    turn.say(f"{what}; {decision.value}")
    if decision is Decision.GIVE_UP and device >= 0 and not loses_rank and _others_train(turn):
        turn.say(f"{state.names[device]} is left out, because it cannot start; the others go on")
        _give_up(turn, device)
    elif decision is Decision.GIVE_UP:
        text = f"{who}: {cause.value}, {count} times in a row without a finished step: {loss.said[:200]}"
        turn.fail(Ending(text, device if device >= 0 else None))
    else:
        if device >= 0:
            _give_up(turn, device)
            turn.order(Do.REQUEST, [device])  # it starts now, or when a node returns
            if decision is Decision.REPLACE and (rank is not None or not turn.generation.exists):
                turn.change(awaited=turn.state.awaited | {device})
        if loses_rank:
            turn.change(causes=turn.state.causes | {cause}, answered=True)
            _break_off_for(turn, cause)


def _break_off_for(turn: Turn, cause: Cause) -> None:
    if turn.state.phase in AT_WORK:
        turn.begin_recovery()
    elif cause is Cause.HUNG:  # the others may have waited for it, and a new worker has to load
        turn.change(deadline=turn.now + turn.policy.limits.end)
