"""How ranks started on one machine find each other: files in a folder that their launcher makes and removes.

The launcher writes who is in (`Generation`), anew whenever a rank was lost or one more is ready; ranks read it. A *member* is a process,
numbered for good as it was started; its rank is its place among the members.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hecate.errors import USER_ERROR_EXIT, UserError

STORE_VARIABLE = "HECATE_STORE"
"""path of the file store; set for the ranks, never by a user"""
ERRORS_VARIABLE = "HECATE_ERRORS"
"""the folder in which ranks leave the texts of a user's mistakes for their launcher"""
LAUNCHED_VARIABLE = "HECATE_LAUNCHED"
"""process id of the launcher; set for ranks that die with it"""
MEMBER_VARIABLE = "HECATE_MEMBER"
"""the number of this member; set where lost ranks are survived"""
JOIN_VARIABLE = "HECATE_JOIN"
"""set for a member that is to join a run under way"""


def error_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves the text of a user's mistake that rank 0 may not have met."""
    return folder / f"error-{rank}"


def mistakes(folder: Path) -> list[Path]:
    """What ranks have left, by rank."""
    return sorted(folder.glob("error-*"), key=lambda path: int(path.name.removeprefix("error-")))


def exit_with_user_error(error: UserError) -> NoReturn:
    """End this rank with exit status 2 and the error's text.

    All ranks usually meet the same mistake, so rank 0 alone prints it where a launcher watches. Every rank leaves it in a file for the
    launcher, which prints it if rank 0 did not meet it.
    """
    folder, rank = os.environ.get(ERRORS_VARIABLE), os.environ.get("RANK", "0")
    if folder:
        error_file(Path(folder), int(rank)).write_text(f"hecate: {error}", encoding="utf-8")
    if not folder or rank == "0":
        print(f"hecate: {error}", file=sys.stderr)
    sys.exit(USER_ERROR_EXIT)


def ready_file(store: Path, member: int) -> Path:
    """What a member makes when it has loaded: when it could join, or has trained its first step."""
    return store.with_name(f"ready-{member}")


def here_file(store: Path, generation: int, member: int) -> Path:
    """What a member makes when it is about to meet the others of a generation."""
    return store.with_name(f"here-{generation}-{member}")


def store_of(store: Path, generation: int) -> Path:
    """The file store of a generation."""
    return store.with_name(f"{store.name}-{generation}")


@dataclass(frozen=True)
class Generation:
    """Who is in."""

    number: int
    """from 0, one more each time"""
    members: tuple[int, ...]
    """by rank"""
    devices: tuple[int, ...]
    """by rank, each one's number in the topology that the run began with"""
    num_devices: int
    """of that topology"""


def write_generation(store: Path, generation: Generation) -> None:
    """Readers see the old one or the new one, whole."""
    staged = store.with_name("generation.tmp")
    staged.write_text(json.dumps(vars(generation)), encoding="ascii")
    os.replace(staged, store.with_name("generation"))


def read_generation(store: Path) -> Generation:
    raw = json.loads(store.with_name("generation").read_text(encoding="ascii"))
    return Generation(raw["number"], tuple(raw["members"]), tuple(raw["devices"]), raw["num_devices"])
