"""The files and environment variables by which a launcher and its ranks on one machine exchange messages.

The files are in a folder that the launcher makes and removes. (Launchers of several nodes copy them to each other:
`hecate.launch.surviving_nodes`.) The launcher writes which processes train together (`Generation`), and writes
this anew when a rank was lost or one more is ready; the ranks read it. A *member* is a process with a number that stays the same; its rank
is its position among the members.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.io.durable import replace_file
from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.strict_json import dump_json, parse_json

_log = logging.getLogger(__name__)

STORE_VARIABLE = "HECATE_STORE"
"""Path of the file store where the ranks meet. The launcher sets this variable, never a user."""
MEETING_VARIABLE = "HECATE_MEETING"
"""HOST:PORT of the store where ranks of several nodes meet in place of that file. The launcher sets it, never a user."""
TOKEN_VARIABLE = "HECATE_TOKEN"
"""The secret of a job on several nodes, without which its store answers nobody. A user, a job system or a launcher sets it."""
ERRORS_VARIABLE = "HECATE_ERRORS"
"""Folder in which ranks leave the texts of user errors for their launcher."""
LAUNCHED_VARIABLE = "HECATE_LAUNCHED"
"""Process id of the launcher. A rank with this variable dies when the launcher dies."""
MEMBER_VARIABLE = "HECATE_MEMBER"
"""Number of this member. It stays the same while its rank may change, and no other process of the run has had it."""
BEGINS_VARIABLE = "HECATE_BEGINS"
"""Number of the generation that a rank begins with. Above 0 all ranks have been started again."""
JOIN_VARIABLE = "HECATE_JOIN"
"""A variable that is set for a member that joins a run under way."""
COLLECTIVES_VARIABLE = "HECATE_COLLECTIVES"
"""The backend of all ranks' collectives, gloo or nccl. A user may set it; with gloo several ranks can share a GPU."""
SHARED_GPU_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
"""NCCL's own variable, since 2.30: 1 lets several ranks share a GPU under NCCL, too. A user may set it."""
LOST_PEER_EXIT = 3
"""The exit status of a rank that stops because another one is lost, so that its launcher looks further for the cause."""
SURVIVAL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""Variables of ranks that go on after a loss. By default torch ends a process whose peer is lost, or whose abort takes eight minutes; these
abort their groups, and wait until that is done."""

_LONGEST_FAILURE = 200
"""The most characters that a rank leaves of an error's text."""


def may_share_gpus(backend: str | None = None) -> bool:
    """Whether several ranks may share a GPU: with gloo they can, with NCCL if it is told so (`SHARED_GPU_VARIABLE`).

    Args:
        backend: gloo or nccl; None: the one that the environment names, else nccl.
    """
    return (backend or os.environ.get(COLLECTIVES_VARIABLE)) == "gloo" or os.environ.get(SHARED_GPU_VARIABLE) == "1"


def name_process() -> None:
    """Give this process its rank as its name, which `ps` and `top` show. Linux only; elsewhere it does nothing."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"hecate-rank-{os.environ.get('RANK')}", encoding="ascii")


def error_file(folder: Path, rank: int) -> Path:
    """The file in which a rank, or member, leaves the text of a user error."""
    return folder / f"error-{rank}"


def mistakes(folder: Path) -> list[Path]:
    """The error files that ranks have left, sorted by rank."""
    return sorted(folder.glob("error-*"), key=lambda path: int(path.name.removeprefix("error-")))


def exit_with_user_error(error: UserError) -> NoReturn:
    """End this rank with exit status 2 and the error's text.

    All ranks usually find the same mistake, so under a launcher only rank 0 prints it. Every rank leaves the text in a file, and the
    launcher prints it if rank 0 has not.
    """
    folder, rank = os.environ.get(ERRORS_VARIABLE), os.environ.get("RANK", "0")
    if folder:
        error_file(Path(folder), own_number()).write_text(f"hecate: {error}", encoding="utf-8")
    if not folder or (rank == "0" and JOIN_VARIABLE not in os.environ):
        _log.error(f"hecate: {error}")
    sys.exit(USER_ERROR_EXIT)


def leave_failure(error: Exception) -> None:
    """Leave the error by which this rank fails for the launcher, in one line. A `UserError` has a file of its own (`error_file`)."""
    folder = os.environ.get(ERRORS_VARIABLE)
    if folder and not isinstance(error, UserError):
        said = next(iter(str(error).splitlines()), "")[:_LONGEST_FAILURE]
        text = f"{type(error).__name__}: {said}" if said else type(error).__name__
        replace_file(_failure_file(Path(folder), own_number()), [text.encode(errors="replace")], durable=False)


def failure_of(folder: Path, number: int) -> str:
    """What a rank, or member, has failed with, in one line; "": it has left nothing."""
    path = _failure_file(folder, number)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def own_number() -> int:
    """The number by which this process's launcher knows it, of a member or of a rank."""
    return int(os.environ.get(MEMBER_VARIABLE) or os.environ.get("RANK", "0"))


def _failure_file(folder: Path, number: int) -> Path:
    return folder / f"failure-{number}"


def ready_file(store: Path, member: int) -> Path:
    """The file that a member makes when it has loaded the model. From then on it can join a run, or go on with one that has lost ranks."""
    return store.with_name(f"ready-{member}")


def arrival_file(store: Path, generation: int, member: int) -> Path:
    """The file that a member makes just before it connects to the other members of a generation."""
    return store.with_name(f"here-{generation}-{member}")


def leave_pid(folder: Path, number: int) -> None:
    """Leave the id of this process, a rank or a member, for its launcher, which may have started only a process that stands for it.

    The failure that an earlier process of the same number has left is removed.
    """
    _failure_file(folder, number).unlink(missing_ok=True)
    (folder / f"pid-{number}").write_text(str(os.getpid()), encoding="ascii")


def pid_files(folder: Path) -> dict[int, int]:
    """The ids of processes that ranks or members have left, by their numbers."""
    found = {}
    for path in folder.glob("pid-*"):
        with suppress(OSError, ValueError):  # it is being written
            found[int(path.name.removeprefix("pid-"))] = int(path.read_text(encoding="ascii"))
    return found


def store_of(store: Path, generation: int) -> Path:
    """The file store of a generation."""
    return store.with_name(f"{store.name}-{generation}")


@dataclass(frozen=True)
class Generation:
    """The processes that train together."""

    number: int
    """The number of the generation, from 0 in each run."""
    members: tuple[int, ...]
    """The member that has each rank."""
    devices: tuple[int, ...]
    """The device of each rank, as its number in the topology that the run began with. Devices of further nodes have higher numbers."""


def write_generation(store: Path, generation: Generation) -> None:
    """Replace the file with the generation in one operation: a reader sees the old one or the new one, never a part of one."""
    replace_file(store.with_name("generation"), [dump_json(to_json_values(generation))], durable=False)


def read_generation(store: Path) -> Generation:
    """The generation that the launcher has written last."""
    return from_json_values(Generation, parse_json(store.with_name("generation").read_bytes()))
