"""Starts the ranks of a run on this machine: one process for each rank, with the same command and different environment variables.

Nothing listens beyond loopback: the ranks meet through a file, and gloo is set to the loopback interface.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from hecate.errors import USER_ERROR_EXIT
from hecate.io.signals import on_signals
from hecate.launch.fork_server import forking
from hecate.launch.rank_command import Beginning, RankCommand, RankProcess, cause_of
from hecate.launch.run_folder import run_folder
from hecate.launch.stopped_ranks import StoppedRanks
from hecate.launch.surviving_ranks import MOST_REPLACED, SurvivingRanks, ThisMachine
from hecate.ranks.cores import usable_cores
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.launcher_files import LAUNCHED_VARIABLE, LOST_PEER_EXIT, error_file, failure_of, pid_files
from hecate.ranks.processor import ONEDNN_SETTINGS

_log = logging.getLogger(__name__)

STOPPING = "hecate: stopping: the ranks finish their step and save; a second signal ends them at once\n"
"""the answer to a first Ctrl-C or SIGTERM"""
_ENDED_BY_SIGNAL = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL}
"""how ranks end that get a signal while they begin, and do not know yet what to do with it, or that get a second one"""

RANK_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)} | ONEDNN_SETTINGS
"""Variables of a rank's process. With the first two glibc keeps freed memory. By default it returns large blocks to the kernel at once and
gets them back page by page, which takes a tenth of a step on a CPU."""


def launch_local(
    program: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    survives: bool = False,
    begins_again: bool = False,
    together: int = 1,
    most_replaced: int = MOST_REPLACED,
    first: Sequence[str] = (),
) -> int:
    """Run `python -m PROGRAM ARGUMENTS` as `num_ranks` ranks on this machine, and return the exit status of the run.

    Rank 0 prints to the terminal. The first SIGINT or SIGTERM is passed on to the ranks, which save and stop, and the exit status is 130
    or 143, as a shell shows it; a second one kills them. When a rank dies, the others are stopped, and a message names the one that died,
    unless they go on or begin again.

    Args:
        survives: whether the ranks can go on without one that dies. If so they go on, and a new rank is started, which joins them when it
            has loaded.
        begins_again: whether all ranks start again from the last checkpoint when one dies, if they cannot go on.
        together: so many neighbouring ranks can only go on together (`model.tensor_parallel`). If one of them dies, the others are ended,
            and with more than one none of them is replaced.
        most_replaced: how many ranks may be started in place of lost ones, or how often all may start again.
        first: if given, the program runs once with these arguments before the ranks; if that fails, its status is the run's.
    """
    with run_folder() as folder, forking(folder, _environment(num_ranks), program) as start:
        if status := run_first(start, first, folder):
            return status
        return start_and_watch(
            [*start, *arguments],
            num_ranks,
            folder / "store",
            survives=survives,
            begins_again=begins_again,
            together=together,
            most_replaced=most_replaced,
        )


def run_first(start: Sequence[str], arguments: Sequence[str], folder: Path) -> int:
    """Run the program of the ranks once before them, and return its exit status; 0 without arguments.

    Args:
        start: the command that starts a rank.
        folder: of this run's own.
    """
    return start_and_watch([*start, *arguments], 1, folder / "first", survives=False) if arguments else 0


def start_and_watch(
    command: Sequence[str],
    num_ranks: int,
    store: Path,
    *,
    survives: bool,
    begins_again: bool = False,
    together: int = 1,
    most_replaced: int = MOST_REPLACED,
) -> int:
    """`launch_local` with a command that starts a rank.

    Args:
        store: the path that the files between launcher and ranks are named after; in a folder of this run's own.
    """
    own = RankCommand(command, _environment(num_ranks), store, survives)
    if survives or begins_again:
        surviving = SurvivingRanks(ThisMachine(own, num_ranks), store, together, most_replaced, goes_on=survives)
        return watch(surviving.processes, store, surviving)
    return watch({rank: own.start(rank, rank, Beginning(rank, num_ranks, 0)) for rank in range(num_ranks)}, store, None)


def watch(ranks: Mapping[int, RankProcess], store: Path, surviving: SurvivingRanks | None) -> int:
    """Wait for the end of the run, pass signals on to the ranks, and return the exit status of the run.

    Args:
        ranks: the processes, by rank; by member where `surviving` is given, which adds to them.
        store: see `start_and_watch`.
    """
    signals: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if surviving:
            surviving.stopping = True
        if len(signals) == 1:  # a step may take long; not print, which the signal may have interrupted
            with suppress(OSError):
                os.write(2, STOPPING.encode())
        for process in list(ranks.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)

    try:
        with on_signals(pass_on):
            status = _wait(ranks, store, surviving, signals)
        return 128 + signals[0] if signals and status == 0 else status
    finally:
        _stop(ranks)


def _environment(num_ranks: int) -> dict[str, str]:
    """The environment variables that are the same for all ranks."""
    environment = {**os.environ, LAUNCHED_VARIABLE: str(os.getpid()), "GLOO_SOCKET_IFNAME": "lo"}
    environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    for name, value in (RANK_SETTINGS | gpu_allocator_defaults(os.environ)).items():
        environment.setdefault(name, value)
    # Progress bars of several ranks would overwrite each other, and the run prints its own progress.
    environment.setdefault("TQDM_DISABLE", "1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_ranks)))
    return environment


def _wait(ranks: Mapping[int, RankProcess], store: Path, surviving: SurvivingRanks | None, signals: Sequence[int]) -> int:
    """Wait for the end of the run, and return its exit status.

    Args:
        ranks: the processes, by rank; by member where `surviving` is given.
        signals: those that have come so far; others may be added.
    """
    seen: list[int] = []
    killed: list[int] = []
    deadline = 0.0
    waiting = None if surviving else StoppedRanks()

    def running() -> list[int]:
        return [number for number in (surviving.members if surviving else ranks) if ranks[number].poll() is None]

    while True:
        if surviving:
            surviving.look()
        if not running():
            if surviving:
                surviving.look()  # once more: the last rank may have ended since
            if not running() and not (surviving and surviving.waits):
                break
        if waiting:
            waiting.say_new(pid_files(store.parent))
        for number in surviving.members if surviving else ranks:
            if number in seen or ranks[number].poll() in (None, 0):
                continue
            if surviving is None or ranks[number].returncode == USER_ERROR_EXIT or not running():
                if all(ranks[one].returncode == LOST_PEER_EXIT for one in seen):
                    # All ranks find a user's mistake at about the same time, and one whose failure makes others stop may end after
                    # them, so they get a few seconds to end by themselves.
                    own_end = ranks[number].returncode in (USER_ERROR_EXIT, LOST_PEER_EXIT)
                    deadline = time.monotonic() + (5.0 if own_end else 0.5)
                seen.append(number)
        if seen and time.monotonic() > deadline:
            killed = running()
            _stop(ranks)
        time.sleep(0.02)
    codes = {number: ranks[number].wait() for number in (surviving.members if surviving else ranks)}
    failed = [number for number, code in codes.items() if code != 0]
    if not failed:
        return 0
    said = {number: failure_of(store.parent, number) for number in failed}

    def consequence(number: int) -> tuple[bool, bool, bool, bool, int]:
        """Larger, the more likely this end is a consequence of another rank's."""
        lost, place = codes[number] == LOST_PEER_EXIT, seen.index(number) if number in seen else len(seen)
        return codes[number] != USER_ERROR_EXIT, not said[number], number in killed, lost, place

    number = min(failed, key=consequence) if surviving is None or surviving.failed is None else surviving.failed
    if codes[number] == USER_ERROR_EXIT:
        if codes.get(surviving.printing if surviving else 0) != USER_ERROR_EXIT:
            left = error_file(store.parent, number)
            text = left.read_text(encoding="utf-8") if left.exists() else "hecate: a rank has met an error and has not said which"
            _log.error(text)
        return USER_ERROR_EXIT
    if signals and {codes[number] for number in failed} <= _ENDED_BY_SIGNAL:
        text = "hecate: the ranks ended before they could save; resume=true goes on from the run's last checkpoint, if any"
        _log.error(text)
        return 128 + signals[0]
    _log.error(
        f"hecate: rank {list(codes).index(number)} of {len(codes)} {cause_of(codes[number], said[number])}; the run is stopped; "
        "resume=true goes on from its last checkpoint, if any"
    )
    return 1


def _stop(ranks: Mapping[int, RankProcess]) -> None:
    """Kill all ranks that still run. Without their peers they cannot finish a step, so there is nothing new that they could save."""
    for process in list(ranks.values()):
        if process.poll() is None:
            process.kill()
            process.wait()
