"""Finds ranks whose processes were stopped, as by SIGSTOP.

Such a rank answers nobody, its connections stay open, and its peers wait for it. Where the run can go on without it, it is ended; where its
end would be the run's, it is named.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hecate.launch.rank_command import RankProcess
from hecate.ranks.launcher_files import pid_files

_log = logging.getLogger(__name__)

STOPPED_SECONDS = 1.5
"""how long a rank may be stopped before the others go on without it"""
LOOK_SECONDS = 0.25


class StoppedRanks:
    """Since when each process has been stopped, as it was seen. One that has run between two looks was not stopped all the time."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[float, int]] = {}
        """the time when a process was first seen stopped, and its processor time then"""

    def look(self, pid_of: Mapping[int, int]) -> dict[int, float]:
        """The processes that have been stopped for `STOPPED_SECONDS`, and for how long; named by the keys of `pid_of`. Linux only."""
        now = time.monotonic()
        before, self._since = self._since, {}
        for name, pid in pid_of.items():
            state, ticks = _state_of(pid)
            if state == "T":
                # Processor time that has grown says that it ran between two looks, so what was seen are several short stops.
                since, then = before.get(name, (now, ticks))
                self._since[name] = (since if then == ticks else now, ticks)
        return {name: now - since for name, (since, _) in self._since.items() if now - since > STOPPED_SECONDS}

    def end_members(self, members: Sequence[int], processes: Mapping[int, RankProcess], folder: Path) -> None:
        """Name and kill members that have been stopped for a while: their peers wait for them, and nothing else would end that.

        Args:
            members: the member of each rank.
            processes: the processes of members; only those that run are looked at.
            folder: where members of this machine leave the ids of their processes.
        """
        pid_of = pid_files(folder)
        running = {
            member: pid_of[member] for member in members if member in pid_of and member in processes and processes[member].poll() is None
        }
        for member, seconds in self.look(running).items():
            rank = members.index(member)
            _log.warning(f"hecate: rank {rank} has been stopped for {seconds:.1f} s, as by SIGSTOP, and is ended")
            processes[member].kill()
            processes[member].wait()


def _state_of(pid: int) -> tuple[str, int]:
    """State and processor time (in clock ticks) of a process; empty and 0 if there is none. One that a debugger holds is not in state T."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    state, *others = stat.rpartition(")")[2].split()
    return state, int(others[10]) + int(others[11])
