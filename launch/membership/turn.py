"""One call of the automaton under way: the state as it becomes, and the orders so far, with the changes that several decisions make."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hecate.launch.membership.facts import Do, Order
from hecate.launch.membership.job_generation import JobGeneration, RankEnd
from hecate.launch.membership.job_members import Ending, JobMembers
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.membership.job_states import NEXT, State

AT_WORK = (State.STARTING, State.RUNNING, State.RESIZING)
"""the states in which ranks train, or are about to"""


class Turn:
    """The state as it becomes, and the orders so far."""

    def __init__(self, state: JobMembers, now: float) -> None:
        self.state, self.now = state, now
        self.orders: list[Order] = []

    @property
    def policy(self) -> JobPolicy:
        return self.state.policy

    @property
    def generation(self) -> JobGeneration:
        return self.state.generation

    @property
    def ends(self) -> set[RankEnd]:
        """How parts of this generation have ended."""
        return set(self.generation.ends.values())

    @property
    def late(self) -> bool:
        return self.now > self.state.deadline

    @property
    def at_work(self) -> list[int]:
        """The members whose part has not ended, and which take orders."""
        return [device for device in self.generation.at_work if device in self.state.up or not self.policy.workers]

    def change(self, **fields: Any) -> None:
        self.state = replace(self.state, **fields)

    def order(self, do: Do, devices: Iterable[int]) -> None:
        if asked := tuple(devices):
            self.orders.append(Order(do, asked))

    def say(self, text: str) -> None:
        self.orders.append(Order(Do.SAY, text=text))

    def enter(self, phase: State, seconds: float = 0.0) -> None:
        """Change the state; `seconds` later its deadline has passed."""
        before = self.state.phase
        if phase is before:
            return
        assert phase in (State.FAILED, State.STOPPED) or phase in NEXT[before], (before, phase)
        self.change(phase=phase, changed_at=self.now, deadline=self.now + seconds)

    def fail(self, ending: Ending) -> None:
        self.change(ending=ending)
        self.enter(State.FAILED)

    def fail_by_culprit(self) -> None:
        """End the job because of the rank that is most likely the cause."""
        device = self.generation.culprit
        assert device is not None
        self.fail(Ending(self.generation.said[device], device, self.generation.ends[device] is RankEnd.MISTAKE))

    def begin_recovery(self) -> None:
        self.enter(State.RECOVERING)
        self.break_off()

    def break_off(self) -> None:
        """Have the ranks at work break off, once in a generation."""
        if not self.state.broken_off:
            self.change(broken_off=True, deadline=self.now + self.policy.limits.end)
            self.order(Do.BREAK_OFF, self.at_work)

    def regroup(self, members: tuple[int, ...], do: Do) -> None:
        """Make the next generation of these members, which begin or go on at once."""
        state, nobody = self.state, frozenset[int]()
        goes_on = do is Do.GO_ON and not self.policy.workers
        self.change(
            generation=JobGeneration(self.generation.number + 1, members),
            loaded=state.loaded - set(members),
            built=frozenset(members) if goes_on else nobody,
            trained=state.trained | state.arrived if goes_on else frozenset(members),
            arrived=nobody, awaited=nobody, killed=nobody, halted=nobody, causes=frozenset(), losses=(), broken_off=False, answered=False,
        )  # fmt: skip
        self.orders.append(Order(do))

    def leave_out(self, device: int) -> None:
        self.change(left_out=self.state.left_out | {device})

    def ready(self) -> list[int]:
        """The devices that could be in the next generation, in their order."""
        state = self.state
        if not self.policy.workers or not self.generation.exists:
            return sorted(state.up - state.left_out)
        return sorted(device for device in state.up if self.generation.stays(device) or device in state.loaded)

    def begin_or_wait(self) -> None:
        """Begin the next generation if enough devices are ready; else wait for them, for a while."""
        state, ready, needed = self.state, self.ready(), self.policy.fewest_to_begin
        if len(ready) >= needed and (state.awaited <= set(ready) or self.late):
            self.begin()
        elif len(ready) < needed and state.phase is not State.WAITING and not state.awaited:
            self.enter(State.WAITING, self.policy.limits.wait)
        elif self.late:
            self.fail(Ending(f"{len(ready)} devices are left, {needed} are needed, and none returned in time{self.policy.limits.by}"))

    def begin(self) -> None:
        """Begin the next generation: warm if possible, which is with the state that waiting ranks have, and with those that have loaded.

        Else all ready devices begin from the last checkpoint.
        """
        state, ready, ends = self.state, self.ready(), self.generation.ends
        waiting = {device for device in ready if ends.get(device) is RankEnd.WAITING and self.policy.workers}
        loaded = [device for device in ready if device in waiting or device in state.loaded]
        nobody_lost = not state.answered and self.ends == {RankEnd.WAITING}
        recoverable = nobody_lost or self.policy.copied or state.checkpoint
        warm = bool(waiting) and len(loaded) >= self.policy.fewest and state.described >= set(ready) and recoverable
        self.regroup(tuple(loaded if warm else ready), Do.GO_ON if warm else Do.BEGIN)
        self.change(trains=warm)
        if not self.policy.workers:
            self.change(loading=frozenset(), loaded=frozenset())
        self.enter(State.STARTING, self.policy.limits.build)

    def stop(self) -> None:
        """Have the ranks save and end, if they are in a step that they could end; else the last checkpoint is what is left."""
        if not self.generation.exists or self.state.phase not in (*AT_WORK, *(() if self.policy.workers else (State.RECOVERING,))):
            self.enter(State.STOPPED)
            return
        self.enter(State.STOPPING, self.policy.limits.end if self.state.broken_off else math.inf)
        self.order(Do.STOP, self.generation.members)
