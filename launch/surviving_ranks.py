"""Decides which ranks of a run go on together, or begin again, when some of them die or more of them have come.

The launcher of one machine and the one that leads those of several nodes decide by the same rules. What a rank reads of this is in
`hecate.ranks.launcher_files`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hecate.errors import USER_ERROR_EXIT
from hecate.io.terminal import tell
from hecate.launch.rank_command import Beginning, RankCommand, RankProcess, cause_of
from hecate.launch.stopped_ranks import StoppedRanks
from hecate.ranks.launcher_files import LOST_PEER_EXIT, Generation, error_file, failure_of, here_file, ready_file, write_generation

MOST_REPLACED = 3
"""largest number of ranks that a run starts in place of lost ones, if nothing else is said"""
_END_SECONDS = 1.0
"""how long ranks may take to end by themselves after one of them was lost before the run has begun"""
_WAIT_SECONDS = 600.0
"""how long a run waits for machines before it begins again"""


class Machines(Protocol):
    """Where the processes of a run are started."""

    def start(self, member: int, device: int, begins: Beginning | None) -> RankProcess | None:
        """Start a member on a device; None: the machine of that device is gone. See `RankCommand.start`."""

    def devices_to_begin(self) -> Sequence[int] | None:
        """The devices on which the run may begin now; None: it waits for machines."""

    def new_devices(self) -> Sequence[int]:
        """The devices that have come to the run since the last call."""


class ThisMachine:
    """`Machines` of a run on one machine."""

    def __init__(self, command: RankCommand, num_ranks: int) -> None:
        self.start, self._devices = command.start, range(num_ranks)

    def devices_to_begin(self) -> Sequence[int]:
        return self._devices

    def new_devices(self) -> Sequence[int]:
        return ()


class SurvivingRanks:
    """The ranks of a run that goes on when some of them die.

    After a loss it writes the file from which the remaining ranks read who goes on (`Generation`), and starts a replacement. If a rank is
    lost before all have loaded, nothing was trained yet, and all are started again. Ranks that cannot go on without a lost one are all
    started again after any loss, and after a node has come; they begin with the last checkpoint.
    """

    def __init__(
        self, machines: Machines, store: Path, together: int = 1, most_replaced: int = MOST_REPLACED, *, goes_on: bool = True
    ) -> None:
        """Start the ranks that begin the run.

        Args:
            machines: where ranks are started; all that the run begins with are there.
            store: the path that the files between launcher and ranks are named after (`hecate.ranks.launcher_files`).
            together: see `launch_local`.
            most_replaced: see `launch_local`.
            goes_on: whether the ranks can go on without one that is lost (`fssdp.redundancy`).
        """
        self._machines, self._store, self._together, self._goes_on = machines, store, together, goes_on
        self.processes: dict[int, RankProcess] = {}
        """the process of each member, by number"""
        self._loading: dict[int, int] = {}
        """member that has not joined yet -> the device that it will use"""
        self._left_to_replace = most_replaced
        self._stopped = StoppedRanks()
        self.stopping = False
        """True: lost ranks are not replaced any more"""
        self.failed: int | None = None
        """the member whose loss ended the run before it had begun"""
        self._has_begun = False
        self._ends_at = 0.0
        """until when ranks may end by themselves after one was lost before the beginning; 0: none was"""
        self._waits_until = 0.0
        """until when the run waits for machines before it begins again; 0: it does not"""
        self._makes_way = False
        """whether the ranks save and end, to begin again with a node that has come"""
        devices = machines.devices_to_begin()
        assert devices is not None
        self._now = self._first = self._start_all(0, devices)

    @property
    def members(self) -> tuple[int, ...]:
        return self._now.members

    @property
    def printing(self) -> int:
        """the member that began as rank 0, which prints its own errors"""
        return self._first.members[0]

    @property
    def waits(self) -> bool:
        """whether no rank runs, and all start when enough machines are there"""
        return self._waits_until > 0

    def look(self) -> None:
        """Let members that have loaded join, and let the living members go on without those that have died. It returns at once."""
        if self.waits:
            self._begin_when_possible()
            return
        self._end_late()
        if not self.stopping and self._goes_on:
            for device in self._machines.new_devices():
                if self._together == 1:
                    self._begin(device)
            self._fill_up()
        self._stopped.end_members(self._now.members, self.processes, self._store.parent)
        statuses = {member: self.processes[member].poll() for member in self._now.members}
        if USER_ERROR_EXIT in statuses.values():
            return  # the run ends; others may have lost that rank meanwhile
        dead = [member for member, status in statuses.items() if status not in (None, 0)]
        if not self._goes_on and not dead and self._made_way(statuses):
            return
        if (dead or len(self._first.members) < self._first.num_devices) and not (self._goes_on and self._begun()):
            self._ends_at = self._ends_at or time.monotonic() + _END_SECONDS
            # One of them may be about to say that it has met a user's mistake, by which the others have lost it.
            if time.monotonic() > self._ends_at or None not in statuses.values():
                self._begin_again(dead)
            return
        broken = {self._now.members.index(member) // self._together for member in dead}
        left = [member for rank, member in enumerate(self._now.members) if rank // self._together not in broken]
        if not dead or 0 in statuses.values() or not any(statuses[member] is None for member in left):
            return
        device_of = dict(zip(self._now.members, self._now.devices, strict=True))
        causes = self._causes(dead)
        ended = [member for member in self._now.members if member not in left and member not in dead]
        if ended:
            causes += f"; {len(ended)} more of its tensor group ended, which have only parts of the model"
        self._kill(ended)  # before they can read that the others go on without them
        self._regroup(tuple(left), tuple(device_of[member] for member in left))
        tell(f"hecate: {causes}; {len(left)} ranks go on")
        if not self.stopping and self._together == 1:
            for member in dead:
                self._replace(device_of[member])

    def _made_way(self, statuses: Mapping[int, int | None]) -> bool:
        """Have the ranks save and end where a node has come, and begin with it when they have; False: there is nothing to do."""
        if not self._makes_way and not self.stopping and set(self._machines.new_devices()) - set(self._now.devices):
            self._makes_way = True
            tell("hecate: a node has joined; all ranks save, and start again with it")
            for member in self._now.members:
                self.processes[member].send_signal(signal.SIGTERM)
        if not self._makes_way or self.stopping or None in statuses.values():
            return False
        self._waits_until = time.monotonic() + _WAIT_SECONDS
        self._begin_when_possible()
        return True

    def _begun(self) -> bool:
        """Whether each rank that begins the run has loaded, so that the others can go on without it."""
        self._has_begun = self._has_begun or all(ready_file(self._store, member).exists() for member in self._first.members)
        return self._has_begun

    def _begin_again(self, dead: Sequence[int]) -> None:
        """Start all ranks again, unless one of them has met a user's mistake."""
        self._ends_at, self._makes_way = 0.0, False
        causes = self._causes(dead) or "a node was lost"
        self._kill((*self._now.members, *self._loading))
        self._loading.clear()
        mistaken = [member for member in self._now.members if self.processes[member].wait() == USER_ERROR_EXIT]
        if mistaken or self.stopping or self._left_to_replace == 0:
            causes_first = sorted(dead, key=lambda member: self.processes[member].poll() == LOST_PEER_EXIT)
            self.failed = [*mistaken, *causes_first, *self._now.members][0]
            return
        self._left_to_replace -= 1
        after = " before the run had begun; all ranks start again" if self._goes_on else "; all ranks start again from the last checkpoint"
        tell(f"hecate: {causes}{after}")
        self._waits_until = time.monotonic() + _WAIT_SECONDS
        self._begin_when_possible()

    def _begin_when_possible(self) -> None:
        devices = self._machines.devices_to_begin()
        if devices is not None:
            self._waits_until, self._makes_way = 0.0, False
            self._now = self._first = self._start_all(self._now.number + 1, devices)
            for member in self._first.members if self.stopping else ():  # a signal came meanwhile
                self.processes[member].send_signal(signal.SIGTERM)
        elif self.stopping or time.monotonic() > self._waits_until:
            self._waits_until, self.failed = 0.0, self._now.members[0]

    def _start_all(self, number: int, devices: Iterable[int]) -> Generation:
        places = list(enumerate(devices, start=max(self.processes, default=-1) + 1))
        started = {}
        for rank, (member, device) in enumerate(places):
            process = self._machines.start(member, device, Beginning(rank, len(places), number))
            if process is not None:  # else its machine has gone just now, and `look` starts the others again without it
                self.processes[member], started[member] = process, device
        first = Generation(number, tuple(started), tuple(started.values()), len(places))
        write_generation(self._store, first)
        return first

    def _end_late(self) -> None:
        """Kill members that would wait for ever for others, which have ended with all steps done and had not read of this generation.

        They were let in while the others did their last step.
        """
        number, first = self._now.number, self._first
        ended = [member for member in self._now.members if self.processes[member].poll() == 0]
        if number == first.number or all(here_file(self._store, number, member).exists() for member in ended):
            return
        before = range(first.number, number)
        trained = {m for m in self._now.members if m in first.members or any(here_file(self._store, n, m).exists() for n in before)}
        # One that has trained, but lost the others in their last message, waits as well.
        late = [m for m in self._now.members if m not in trained or (m not in ended and here_file(self._store, number, m).exists())]
        self._kill(late)
        left = [(m, device) for m, device in zip(self._now.members, self._now.devices, strict=True) if m not in late]
        self._now = replace(self._now, members=tuple(m for m, _ in left), devices=tuple(device for _, device in left))

    def _fill_up(self) -> None:
        if any(self.processes[member].poll() == 0 for member in self._now.members):
            return  # the run ends
        if not self._begun():
            return
        for member in [m for m in self._loading if ready_file(self._store, m).exists()]:
            self._regroup((*self._now.members, member), (*self._now.devices, self._loading.pop(member)))
        for member in [m for m in self._loading if self.processes[m].poll() is not None]:
            status, device = self.processes[member].wait(), self._loading.pop(member)
            tell(f"hecate: a rank that was to join the run {self._cause(member)}")
            if status != USER_ERROR_EXIT:
                self._replace(device)
            elif (said := error_file(self._store.parent, member)).exists():
                tell(said.read_text(encoding="utf-8"))

    def _regroup(self, members: tuple[int, ...], devices: tuple[int, ...]) -> None:
        self._now = replace(self._now, number=self._now.number + 1, members=members, devices=devices)
        write_generation(self._store, self._now)

    def _replace(self, device: int) -> None:
        if self._left_to_replace > 0 and self._begin(device):
            self._left_to_replace -= 1

    def _begin(self, device: int) -> bool:
        """Start a member that joins when it has loaded; False: its device is gone, or another member has it by now."""
        living = {at for member, at in zip(self._now.members, self._now.devices, strict=True) if self.processes[member].poll() is None}
        if device in living or device in self._loading.values():
            return False
        member = max(self.processes) + 1
        process = self._machines.start(member, device, None)
        if process is not None:
            self.processes[member], self._loading[member] = process, device
        return process is not None

    def _causes(self, dead: Sequence[int]) -> str:
        alone = [member for member in dead if self.processes[member].wait() != LOST_PEER_EXIT] or dead
        return ", ".join(f"rank {self._now.members.index(member)} {self._cause(member)}" for member in alone)

    def _cause(self, member: int) -> str:
        return cause_of(self.processes[member].wait(), failure_of(self._store.parent, member))

    def _kill(self, members: Iterable[int]) -> None:
        living = [self.processes[member] for member in members if self.processes[member].poll() is None]
        for process in living:
            process.kill()
        for process in living:
            process.wait()
