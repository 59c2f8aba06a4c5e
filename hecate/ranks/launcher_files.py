"""The files by which a launcher and its ranks on one machine find each other, in a folder that the launcher makes and removes.

The launcher writes which processes train together (`Generation`), and writes it anew when a rank was lost or one more is ready; the ranks
read it. A *member* is a process with a number that it keeps; its rank is its position among the members.
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
"""Path of the file store where the ranks meet. The launcher sets it, never a user."""
ERRORS_VARIABLE = "HECATE_ERRORS"
"""Folder in which ranks leave the texts of a user's mistakes for their launcher."""
LAUNCHED_VARIABLE = "HECATE_LAUNCHED"
"""Process id of the launcher. Ranks that have it die with the launcher."""
MEMBER_VARIABLE = "HECATE_MEMBER"
"""Number of this member. Set where the other ranks go on after a loss."""
JOIN_VARIABLE = "HECATE_JOIN"
"""Set for a member that joins a run under way."""


def error_file(folder: Path, rank: int) -> Path:
    """The file in which a rank leaves the text of a user's mistake."""
    return folder / f"error-{rank}"


def mistakes(folder: Path) -> list[Path]:
    """The files that ranks have left, by rank."""
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
    """The file that a member makes when it has loaded: when it can join, or has trained its first step."""
    return store.with_name(f"ready-{member}")


def here_file(store: Path, generation: int, member: int) -> Path:
    """The file that a member makes when it is about to meet the others of a generation."""
    return store.with_name(f"here-{generation}-{member}")


def store_of(store: Path, generation: int) -> Path:
    """The file store of a generation."""
    return store.with_name(f"{store.name}-{generation}")


@dataclass(frozen=True)
class Generation:
    """The processes that train together."""

    number: int
    """from 0, one more each time"""
    members: tuple[int, ...]
    """by rank"""
    devices: tuple[int, ...]
    """by rank: its device's number in the topology that the run began with"""
    num_devices: int
    """of that topology"""


def write_generation(store: Path, generation: Generation) -> None:
    """Replace the generation at once: a reader sees the old one or the new one, never a part."""
    staged = store.with_name("generation.tmp")
    staged.write_text(json.dumps(vars(generation)), encoding="ascii")
    os.replace(staged, store.with_name("generation"))


def read_generation(store: Path) -> Generation:
    raw = json.loads(store.with_name("generation").read_text(encoding="ascii"))
    return Generation(raw["number"], tuple(raw["members"]), tuple(raw["devices"]), raw["num_devices"])
