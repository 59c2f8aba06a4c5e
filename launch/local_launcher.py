"""Starts the ranks of a run on this machine: one process for each rank, with the same command and different environment variables.

Nothing listens beyond loopback: the ranks meet through a file, and gloo is set to the loopback interface.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from hecate.errors import USER_ERROR_EXIT
from hecate.io.signals import on_signals
from hecate.launch.fork_server import forking
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.membership.job_states import State
from hecate.launch.rank_command import RankCommand
from hecate.launch.run_folder import run_folder
from hecate.launch.surviving_ranks import SurvivingRanks, ThisMachine, end_processes
from hecate.ranks.cores import usable_cores
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.launcher_files import LAUNCHED_VARIABLE
from hecate.ranks.processor import ONEDNN_SETTINGS

_log = logging.getLogger(__name__)

STOPPING = "hecate: stopping: the ranks finish their step and save; a second signal ends them at once\n"
"""the answer to a first Ctrl-C or SIGTERM"""
ENDS_TOGETHER = JobPolicy(most=0)
"""the policy of a run that ends when one of its ranks does"""
_LOOK_SECONDS = 0.02
_ENDED_BY_SIGNAL = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL}
"""the statuses of ranks that get a signal while they begin, and do not know yet what to do with it, or that get a second one"""

RANK_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)} | ONEDNN_SETTINGS
"""Variables of a rank's process. With the first two glibc keeps freed memory. By default it returns large blocks to the kernel at once and
gets them back page by page, which takes a tenth of a step on a CPU."""


def launch_local(
    program: str, arguments: Sequence[str], num_ranks: int, policy: JobPolicy = ENDS_TOGETHER, *, first: Sequence[str] = ()
) -> int:
    """Run `python -m PROGRAM ARGUMENTS` as `num_ranks` ranks on this machine, and return the exit status of the run.

    Rank 0 prints to the terminal. The first SIGINT or SIGTERM is passed on to the ranks, which save and stop, and the exit status is 130
    or 143, as a shell shows it; a second one kills them. When a rank dies, the others are stopped, and a message names the one that died,
    unless they go on or begin again.

    Args:
        policy: what follows when a rank dies. The run begins with all of its ranks, whatever the policy says of their number.
        first: if given, the program runs once with these arguments before the ranks; if that fails, its status is the run's.
    """
    with run_folder() as folder, forking(folder, _environment(num_ranks), program) as start:
        return run_first(start, first, folder) or start_and_watch([*start, *arguments], num_ranks, folder / "store", policy)


def run_first(start: Sequence[str], arguments: Sequence[str], folder: Path) -> int:
    """Run the program of the ranks once before them, and return its exit status; 0 without arguments.

    Args:
        start: the command that starts a rank.
        folder: of this run's own.
    """
    return start_and_watch([*start, *arguments], 1, folder / "first") if arguments else 0


def start_and_watch(command: Sequence[str], num_ranks: int, store: Path, policy: JobPolicy = ENDS_TOGETHER) -> int:
    """`launch_local` with a command that starts a rank.

    Args:
        store: the path that the files between launcher and ranks are named after; in a folder of this run's own.
    """
    own = RankCommand(command, _environment(num_ranks), store, policy.copied)
    return watch(SurvivingRanks(ThisMachine(own, num_ranks), store, replace(policy, fewest_to_begin=num_ranks)))


def watch(ranks: SurvivingRanks) -> int:
    """Wait for the end of the run, pass signals on to the ranks, and return the exit status of the run."""
    signals: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        ranks.stopping = True
        if len(signals) == 1:  # a step may take long; not print, which the signal may have interrupted
            with suppress(OSError):
                os.write(2, STOPPING.encode())
            return
        for process in list(ranks.processes.values()):
            if process.poll() is None:
                process.kill()

    try:
        with on_signals(pass_on):
            while not ranks.over:
                ranks.look()
                time.sleep(_LOOK_SECONDS)
            status = _status_of(ranks, signals)
        return 128 + signals[0] if signals and status == 0 else status
    finally:
        # Also after an error of this process: ranks that nobody watches would go on, and nobody could start the run anew.
        end_processes(ranks.processes.values())


def default_variables(ranks_on_machine: int) -> dict[str, str]:
    """The environment variables that ranks get where the user has not set them."""
    return {
        **RANK_SETTINGS,
        **gpu_allocator_defaults(os.environ),
        "TQDM_DISABLE": "1",  # bars of several ranks would overwrite each other, and the run prints its own progress
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks_on_machine)),
    }


def _environment(num_ranks: int) -> dict[str, str]:
    """The environment variables that are the same for all ranks."""
    own = {LAUNCHED_VARIABLE: str(os.getpid()), "GLOO_SOCKET_IFNAME": "lo"}
    return {"NCCL_SOCKET_IFNAME": "lo"} | default_variables(num_ranks) | dict(os.environ) | own


def _status_of(ranks: SurvivingRanks, signals: Sequence[int]) -> int:
    """The exit status of a run that is over. Says why it has failed, if it has.

    Args:
        signals: those that have come.
    """
    state, codes = ranks.state, [ranks.processes[member].returncode for member in ranks.members]
    ending, failed = state.ending, {code for code in codes if code != 0}
    if ending is not None and ending.mistake:
        if ranks.processes[ranks.printing].returncode != USER_ERROR_EXIT:
            _log.warning(ending.text)
        return USER_ERROR_EXIT
    if state.phase is State.STOPPED or (signals and failed and failed <= _ENDED_BY_SIGNAL):
        _log.warning("hecate: the ranks ended before they could save; resume=true goes on from the run's last checkpoint, if any")
        return 128 + signals[0] if signals else 0
    if ending is None:
        return 0
    rank = None if ending.device is None else state.generation.rank_of(ending.device)
    who = "" if rank is None else f"rank {rank} of {len(codes)} "
    _log.warning(f"hecate: {who}{ending.text}; the run is stopped; resume=true goes on from its last checkpoint, if any")
    return 1
