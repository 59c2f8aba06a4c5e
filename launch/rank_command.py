"""What starts the process of a rank on this machine, and what the launchers need of such a process wherever it runs."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hecate.ranks.launcher_files import (
    BEGINS_VARIABLE,
    ERRORS_VARIABLE,
    JOIN_VARIABLE,
    LOST_PEER_EXIT,
    MEMBER_VARIABLE,
    STORE_VARIABLE,
    SURVIVAL_SETTINGS,
)


class RankProcess(Protocol):
    """The process of a rank, as `subprocess.Popen` has it."""

    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Beginning:
    """The place of a process among those that begin a run."""

    rank: int
    world_size: int
    generation: int
    """the number of the generation (`hecate.ranks.launcher_files.Generation`); above 0 the run began earlier, and begins again"""


@dataclass(frozen=True)
class RankCommand:
    """What starts the ranks of this machine."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """the variables that are the same for all ranks"""
    store: Path
    """the path that the files between launcher and ranks are named after"""
    survives: bool
    """whether the other ranks go on when one of them dies"""

    def start(self, number: int, device: int, begins: Beginning | None) -> subprocess.Popen[bytes]:
        """Start the process of one rank.

        Args:
            number: the rank, or the member.
            device: the number of its device on this machine.
            begins: its place among the ranks that begin the run; None: it joins a run under way.
        """
        environment = {
            **self.environment,
            STORE_VARIABLE: str(self.store),
            ERRORS_VARIABLE: str(self.store.parent),
            MEMBER_VARIABLE: str(number),
            "RANK": str(number if begins is None else begins.rank),
            "LOCAL_RANK": str(device),
            "WORLD_SIZE": str(number + 1 if begins is None else begins.world_size),
        }
        if self.survives:
            environment = SURVIVAL_SETTINGS | environment
        if begins is None:
            environment[JOIN_VARIABLE] = "1"
        else:
            environment[BEGINS_VARIABLE] = str(begins.generation)
        return subprocess.Popen(self.command, env=environment)


def cause_of(status: int, failure: str = "") -> str:
    """Say how a rank's process ended.

    Args:
        status: its exit status as `subprocess.Popen` has it.
        failure: what the rank has said of it (`hecate.ranks.launcher_files.failure_of`); "": nothing.
    """
    if failure:
        return f"failed with {failure}"
    if status == LOST_PEER_EXIT:
        return "stopped because it lost another rank"
    if status >= 0:
        return f"ended with status {status}"
    name = f"signal {-status}"
    with suppress(ValueError):  # signals without a name of their own
        name = signal.Signals(-status).name
    return f"was killed by {name}"
