"""Starts the ranks of a run on this machine: one process for each rank, with the same command and different environment variables.

Nothing listens beyond loopback: the ranks meet through a file, and gloo is set to the loopback interface.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from hecate.errors import USER_ERROR_EXIT
from hecate.io.signals import on_signals
from hecate.launch.fork_server import forking
from hecate.launch.run_folder import run_folder
from hecate.launch.stopped_ranks import StoppedRanks, say_stopped
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.launcher_files import (
    ERRORS_VARIABLE,
    JOIN_VARIABLE,
    LAUNCHED_VARIABLE,
    MEMBER_VARIABLE,
    STORE_VARIABLE,
    SURVIVAL_SETTINGS,
    Generation,
    error_file,
    here_file,
    pid_files,
    ready_file,
    write_generation,
)


class RankProcess(Protocol):
    """The process of a rank, as `subprocess.Popen` has it."""

    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[int, int], RankProcess | None]
"""Starts the process of a member, which will use a device, to join a run under way; None: the device is gone."""
STOPPING = "hecate: stopping: the ranks finish their step and save; a second signal ends them at once\n"
"""the answer to a first Ctrl-C or SIGTERM"""

MOST_REPLACED = 3
"""largest number of ranks that a run starts in place of lost ones, if nothing else is said"""
ALLOCATOR_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""Variables with which glibc keeps freed memory. By default it returns large blocks to the kernel at once and gets them back page by page,
which takes a tenth of a step on a CPU."""


def launch_local(
    program: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    survives: bool = False,
    together: int = 1,
    most_replaced: int = MOST_REPLACED,
) -> int:
    """Run `python -m PROGRAM ARGUMENTS` as `num_ranks` ranks on this machine, and return the exit status of the run.

    Rank 0 prints to the terminal. The first SIGINT or SIGTERM is passed on to the ranks, which save and stop, and the exit status is 130
    or 143, as a shell shows it; a second one kills them. When a rank dies, the others are stopped, and a message names the one that died.

    Args:
        survives: whether the ranks can go on without one that dies. If so they go on, and a new rank is started, which joins them when it
            has loaded.
        together: so many neighbouring ranks can only go on together (`model.tensor_parallel`). If one of them dies, the others are ended,
            and with more than one none of them is replaced.
        most_replaced: how many ranks may be started in place of lost ones.
    """
    with run_folder() as folder, forking(folder, _environment(num_ranks), program) as start:
        return start_and_watch(
            [*start, *arguments], num_ranks, folder / "store", survives=survives, together=together, most_replaced=most_replaced
        )


def start_and_watch(
    command: Sequence[str], num_ranks: int, store: Path, *, survives: bool, together: int = 1, most_replaced: int = MOST_REPLACED
) -> int:
    """`launch_local` with a command that starts a rank.

    Args:
        store: the path that the files between launcher and ranks are named after; in a folder of this run's own.
    """
    own = RankCommand(command, _environment(num_ranks), store, num_ranks, survives)
    ranks: dict[int, RankProcess] = {rank: own.start(rank, rank) for rank in range(num_ranks)}
    surviving = None
    if survives:
        surviving = SurvivingRanks(partial(own.start, joins=True), num_ranks, store, ranks, together, most_replaced)
    return watch(ranks, store, surviving)


def watch(ranks: dict[int, RankProcess], store: Path, surviving: SurvivingRanks | None) -> int:
    """Wait for the end of the run, pass signals on to the ranks, and return the exit status of the run.

    Args:
        ranks: the processes, by rank; by member where `surviving` is given.
    """
    signals: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if surviving:
            surviving.stopping = True
        if len(signals) == 1:  # a step may take long; not print, which the signal may have interrupted
            with suppress(OSError):
                os.write(2, STOPPING.encode())
        for process in ranks.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)

    try:
        with on_signals(pass_on):
            status = _wait(ranks, store, surviving)
        return 128 + signals[0] if signals and status == 0 else status
    finally:
        _stop(ranks)


class SurvivingRanks:
    """The ranks of a run that goes on when some of them die.

    After a loss it writes the file from which the remaining ranks read who goes on (`Generation`), and starts a replacement.
    """

    def __init__(
        self,
        start: Start,
        num_ranks: int,
        store: Path,
        processes: dict[int, RankProcess],
        together: int = 1,
        most_replaced: int = MOST_REPLACED,
        new_devices: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """Args:
        start: starts a member that joins.
        store: the path that the files between launcher and ranks are named after (`hecate.ranks.launcher_files`).
        processes: the process of each member, by number. Members that are started later are added to it.
        together: see `launch_local`.
        most_replaced: see `launch_local`.
        new_devices: the devices that have come to the run since the last call; on each a member is started, which joins.
        """
        self._together = together
        self._start, self._store, self._processes, self._new_devices = start, store, processes, new_devices
        everyone = tuple(range(num_ranks))
        self._now = Generation(0, everyone, everyone, num_ranks)
        self._loading: dict[int, int] = {}
        """member that has not joined yet -> the device that it will use"""
        self._left_to_replace = most_replaced
        self._stopped = StoppedRanks()
        self.stopping = False
        """True: lost ranks are not replaced any more"""
        write_generation(store, self._now)

    @property
    def members(self) -> tuple[int, ...]:
        return self._now.members

    def look(self) -> None:
        """Let members that have loaded join, and let the living members go on without those that have died. It returns at once."""
        self._end_late()
        if not self.stopping:
            for device in self._new_devices():
                if self._together == 1:
                    self._begin(device)
            self._fill_up()
        self._evict_stopped()
        dead = [member for member in self._now.members if self._processes[member].poll() not in (None, 0, USER_ERROR_EXIT)]
        broken = {self._now.members.index(member) // self._together for member in dead}
        left = [member for rank, member in enumerate(self._now.members) if rank // self._together not in broken]
        if not dead or not any(self._processes[member].poll() is None for member in left):
            return
        device_of = dict(zip(self._now.members, self._now.devices, strict=True))
        causes = ", ".join(f"rank {self._now.members.index(m)} {_cause(self._processes[m].wait())}" for m in dead)
        ended = [member for member in self._now.members if member not in left and member not in dead]
        if ended:
            causes += f"; {len(ended)} more of its tensor group ended, which have only parts of the model"
        for member in ended:  # before they can read that the others go on without them
            self._processes[member].kill()
            self._processes[member].wait()
        self._regroup(tuple(left), tuple(device_of[member] for member in left))
        print(f"hecate: {causes}; {len(left)} ranks go on", file=sys.stderr, flush=True)
        if not self.stopping and self._together == 1:
            for member in dead:
                self._replace(device_of[member])

    def _end_late(self) -> None:
        """Kill new members if the run has ended without them, since they would wait for the others for ever.

        They were let in while the others did their last step, which then ended, all steps done, and had not read of this generation.
        """
        number = self._now.number
        ended = [member for member in self._now.members if self._processes[member].poll() == 0]
        if number == 0 or all(here_file(self._store, number, member).exists() for member in ended):
            return
        first_new = self._now.num_devices  # members before it began the run
        trained = {m for m in self._now.members if m < first_new or any(here_file(self._store, n, m).exists() for n in range(number))}
        late = [member for member in self._now.members if member not in trained]
        for member in late:
            self._processes[member].kill()
            self._processes[member].wait()
        left = [(m, device) for m, device in zip(self._now.members, self._now.devices, strict=True) if m not in late]
        self._now = replace(self._now, members=tuple(m for m, _ in left), devices=tuple(device for _, device in left))

    def _evict_stopped(self) -> None:
        """Kill members that have been stopped for a while: their peers wait for them, and nothing else would end that."""
        pid_of = pid_files(self._store.parent)
        members = {member: pid_of[member] for member in self._now.members if member in pid_of and self._processes[member].poll() is None}
        for member, seconds in self._stopped.look(members).items():
            say_stopped(self._now.members.index(member), seconds)
            self._processes[member].kill()
            self._processes[member].wait()

    def _fill_up(self) -> None:
        if any(self._processes[member].poll() == 0 for member in self._now.members):
            return  # the run ends
        for member in [m for m in self._loading if ready_file(self._store, m).exists()]:
            self._regroup((*self._now.members, member), (*self._now.devices, self._loading.pop(member)))
        for member in [m for m in self._loading if self._processes[m].poll() is not None]:
            print(f"hecate: a rank that was to join the run {_cause(self._processes[member].wait())}", file=sys.stderr)
            self._replace(self._loading.pop(member))

    def _regroup(self, members: tuple[int, ...], devices: tuple[int, ...]) -> None:
        self._now = replace(self._now, number=self._now.number + 1, members=members, devices=devices)
        write_generation(self._store, self._now)

    def _replace(self, device: int) -> None:
        if self._left_to_replace > 0 and self._begin(device):
            self._left_to_replace -= 1

    def _begin(self, device: int) -> bool:
        """Start a member that joins when it has loaded; False: its device is gone."""
        member = max(self._processes) + 1
        process = self._start(member, device)
        if process is not None:
            self._processes[member], self._loading[member] = process, device
        return process is not None


def _environment(num_ranks: int) -> dict[str, str]:
    """The environment variables that are the same for all ranks."""
    environment = {**os.environ, LAUNCHED_VARIABLE: str(os.getpid()), "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in (ALLOCATOR_SETTINGS | gpu_allocator_defaults(os.environ)).items():
        environment.setdefault(name, value)
    # Progress bars of several ranks would overwrite each other, and the run prints its own progress.
    environment.setdefault("TQDM_DISABLE", "1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    return environment


@dataclass(frozen=True)
class RankCommand:
    """What starts the ranks of this machine."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """variables that are the same for all ranks"""
    store: Path
    """see `start_and_watch`"""
    num_ranks: int
    """of the whole run, when it begins"""
    survives: bool
    """whether the other ranks go on when one of them dies"""

    def start(self, number: int, device: int, *, joins: bool = False) -> subprocess.Popen[bytes]:
        """Start the process of one rank.

        Args:
            number: the rank, or the member that begins as this rank.
            device: the number of its device on this machine.
            joins: whether it joins a run under way.
        """
        environment = {
            **self.environment,
            STORE_VARIABLE: str(self.store),
            ERRORS_VARIABLE: str(self.store.parent),
            "RANK": str(number),
            "LOCAL_RANK": str(device),
            "WORLD_SIZE": str(self.num_ranks),
        }
        if self.survives:
            environment = SURVIVAL_SETTINGS | environment | {MEMBER_VARIABLE: str(number)}
        if joins:
            environment[JOIN_VARIABLE] = "1"
        return subprocess.Popen(self.command, env=environment)


def _wait(ranks: dict[int, RankProcess], store: Path, surviving: SurvivingRanks | None) -> int:
    """Wait for the end of the run, and return its exit status.

    Args:
        ranks: the processes, by rank; by member where `surviving` is given.
    """
    first_failure: int | None = None
    deadline = 0.0
    waiting = None if surviving else StoppedRanks()

    def running() -> list[int]:
        return [number for number in (surviving.members if surviving else ranks) if ranks[number].poll() is None]

    while running():
        if surviving:
            surviving.look()
        if waiting:
            waiting.say_new(pid_files(store.parent))
        for number in surviving.members if surviving else ranks:
            if first_failure is not None or ranks[number].poll() in (None, 0):
                continue
            if surviving is None or ranks[number].returncode == USER_ERROR_EXIT or not running():
                first_failure = number
                # All ranks find a user's mistake at about the same time, so they get a few seconds to end by themselves.
                deadline = time.monotonic() + (5.0 if ranks[number].returncode == USER_ERROR_EXIT else 0.5)
        if first_failure is not None and time.monotonic() > deadline:
            _stop(ranks)
        time.sleep(0.02)
    codes = {number: ranks[number].wait() for number in (surviving.members if surviving else ranks)}
    failed = [number for number, code in codes.items() if code != 0]
    if not failed:
        return 0
    number = failed[0] if first_failure is None else first_failure
    if codes[number] == USER_ERROR_EXIT:
        if codes.get(0) != USER_ERROR_EXIT:  # rank 0 prints its own error
            print(error_file(store.parent, number).read_text(encoding="utf-8"), file=sys.stderr)
        return USER_ERROR_EXIT
    print(
        f"hecate: rank {list(codes).index(number)} of {len(codes)} {_cause(codes[number])}; the run is stopped; "
        "resume=true goes on from its last checkpoint, if any",
        file=sys.stderr,
    )
    return 1


def _cause(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _stop(ranks: dict[int, RankProcess]) -> None:
    """Kill all ranks that still run. Without their peers they cannot finish a step, so there is nothing new that they could save."""
    for process in ranks.values():
        if process.poll() is None:
            process.kill()
            process.wait()
