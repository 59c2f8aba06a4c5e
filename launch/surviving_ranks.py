"""The ranks of a run as processes: what the launcher sees of them, and how it carries out what the automaton decides.

The automaton is in `hecate.launch.membership`. The launcher of one machine and the one that leads those of several nodes both use this
file, with other `Machines`. What a rank reads is in `hecate.ranks.launcher_files`.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

from hecate.errors import USER_ERROR_EXIT
from hecate.launch.membership.automaton import step
from hecate.launch.membership.facts import Cause, Do, Event, Fact, Order
from hecate.launch.membership.job_generation import RankEnd
from hecate.launch.membership.job_members import JobMembers
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.membership.job_states import ENDED
from hecate.launch.rank_command import Beginning, RankCommand, RankProcess, cause_of
from hecate.launch.stopped_ranks import StoppedRanks
from hecate.ranks.launcher_files import (
    LOST_PEER_EXIT,
    Generation,
    arrival_file,
    error_file,
    failure_of,
    pid_files,
    ready_file,
    write_generation,
)

_log = logging.getLogger(__name__)


class Machines(Protocol):
    """Where the processes of a run are started."""

    def start(self, member: int, device: int, begins: Beginning | None) -> RankProcess:
        """Start a member on a device; see `RankCommand.start`. If the machine is gone meanwhile, the process is one that was killed."""

    def present(self) -> Collection[int]:
        """The devices whose machines are in the job now. It must be called often."""


class ThisMachine:
    """`Machines` of a run on one machine."""

    def __init__(self, command: RankCommand, num_ranks: int) -> None:
        self.start, self._devices = command.start, range(num_ranks)

    def present(self) -> range:
        return self._devices


class SurvivingRanks:
    """The processes of a run's ranks. A device has one process at a time, whose number, the member, is new for each."""

    def __init__(self, machines: Machines, store: Path, policy: JobPolicy) -> None:
        """Start the ranks that begin the run.

        Args:
            machines: where ranks are started; all that the run begins with have come.
            store: the path that the files between launcher and ranks are named after (`hecate.ranks.launcher_files`).
        """
        self._machines, self._store = machines, store
        self.processes: dict[int, RankProcess] = {}
        """the process of each member, by number"""
        self.member_on: dict[int, int] = {}
        """a device -> its newest member"""
        self._seen: set[tuple[Fact, int, int]] = set()
        """the facts about members that the automaton knows: the fact, the member, the generation"""
        self._present: frozenset[int] = frozenset()
        self._stopped = StoppedRanks()
        self.printing = 0
        """the member that began as rank 0, which prints its own errors"""
        self.stopping = False
        """whether the ranks are to save and to end"""
        self.stops_by_itself = False
        """whether a rank has the signal to stop already, and tells the others: a second one might reach a rank that ends"""
        self.state = JobMembers(policy)
        self.look([Event(Fact.PLACED)])

    @property
    def members(self) -> tuple[int, ...]:
        """The member of each rank."""
        return tuple(self.member_on[device] for device in self.state.generation.members)

    @property
    def over(self) -> bool:
        return self.state.phase in ENDED

    def look(self, events: Iterable[Event] = ()) -> None:
        """Tell the automaton what has happened, and carry out what it decides. It returns at once."""
        seen = [*events, *self._see()]
        while True:
            self.state, orders = step(self.state, seen, time.monotonic())
            for order in orders:
                self._carry_out(order)
            if not orders:
                return
            # An order to end has been carried out to its end, which the automaton is to know before other things happen.
            seen = self._see()

    def _see(self) -> list[Event]:
        """What has happened since the last call."""
        present, statuses = self._present_and_statuses()
        events = [Event(Fact.DOWN, device) for device in sorted(self._present - present)]
        events += [Event(Fact.UP, device) for device in sorted(present - self._present)]
        self._present = present
        number = self.state.generation.number
        for device, member in self.member_on.items():
            for key, path in (
                ((Fact.LOADED, member, 0), ready_file(self._store, member)),
                ((Fact.ARRIVED, member, number), arrival_file(self._store, number, member)),
            ):
                if key not in self._seen and path.exists():
                    self._seen.add(key)
                    events.append(Event(key[0], device))
            key, status = (Fact.ENDED, member, 0), statuses[device]
            if key not in self._seen and status is not None:
                self._seen.add(key)
                events.append(self._end_of(device, member, status))
        pid_of = pid_files(self._store.parent)
        living = {
            device: pid_of[member]
            for device, member in self.member_on.items()
            if member in pid_of and self.processes[member].poll() is None
        }
        for device, seconds in self._stopped.look(living).items():
            said = f"for {seconds:.1f} s, as by SIGSTOP"
            events.append(Event(Fact.HALTED, device, said, more=f"kill -CONT {living[device]} lets it go on"))
        return [Event(Fact.STOP), *events] if self.stopping else events

    def _present_and_statuses(self) -> tuple[frozenset[int], dict[int, int | None]]:
        """The devices that are there, and the exit status of each one's newest process, both of one moment.

        A node may be lost while the statuses are read. If its device counted as being there, others would be started in its place.
        """
        while True:
            present = frozenset(self._machines.present())
            statuses = {device: self.processes[member].poll() for device, member in self.member_on.items()}
            if frozenset(self._machines.present()) == present:
                return present, statuses

    def _end_of(self, device: int, member: int, status: int) -> Event:
        if status == 0:
            return Event(Fact.ENDED, device, end=RankEnd.FINISHED)
        failure = failure_of(self._store.parent, member)
        end = RankEnd.FAILED if failure else RankEnd.CONSEQUENCE if status == LOST_PEER_EXIT else RankEnd.LOST
        cause = Cause.PROCESS_DIED if device in self._present else Cause.NODE_DIED
        mistake = error_file(self._store.parent, member)
        if status != USER_ERROR_EXIT:
            return Event(Fact.LOST, device, cause_of(status, failure), end, cause)
        text = mistake.read_text(encoding="utf-8") if mistake.exists() else "hecate: a rank has met an error and has not said which"
        return Event(Fact.LOST, device, cause_of(status, failure), RankEnd.MISTAKE, cause, more=text)

    def _carry_out(self, order: Order) -> None:
        processes = [self.processes[self.member_on[device]] for device in order.devices if device in self.member_on]
        match order.do:
            case Do.BEGIN:
                self._begin()
            case Do.GO_ON:
                self._write()
            case Do.PREPARE:
                for device in order.devices:
                    self._start(device, None)
            case Do.STOP if self.stops_by_itself:
                pass
            case Do.MAKE_WAY | Do.STOP:  # a rank saves, and ends, at this signal
                for process in processes:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
            case Do.END:
                end_processes(processes)
            case Do.SAY:
                _log.info(order.text if order.text.startswith("hecate: ") else f"hecate: {order.text}")
            case Do.BREAK_OFF | Do.REQUEST:
                pass  # the ranks notice a loss by themselves, and a device is free when its process has ended

    def _begin(self) -> None:
        generation = self.state.generation
        end_processes(self.processes.values())
        first = self._next_member
        for rank, device in enumerate(generation.members):
            self._start(device, Beginning(rank, len(generation.members), generation.number))
        self.printing = first
        self._write()

    def _start(self, device: int, begins: Beginning | None) -> None:
        member = self._next_member
        self.processes[member] = self._machines.start(member, device, begins)
        self.member_on[device] = member

    @property
    def _next_member(self) -> int:
        return max(self.processes, default=-1) + 1

    def _write(self) -> None:
        generation = self.state.generation
        write_generation(self._store, Generation(generation.number, self.members, generation.members))


def end_processes(processes: Iterable[RankProcess]) -> None:
    """Kill all of these that run, and wait for their ends."""
    living = [process for process in list(processes) if process.poll() is None]
    for process in living:  # all of them before the first is waited for, or the others would notice its loss and begin to answer it
        process.kill()
    for process in living:
        process.wait()
