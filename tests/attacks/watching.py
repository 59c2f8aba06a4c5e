"""What must come out of an attack: a refusal in a sentence that names the file, or nothing at all; and nothing else may have happened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hecate.errors import UserError
from tests.attacks.fuzz.guard import watched

SECONDS, MOST_MIB = 20.0, 512
"""of processor time, and of memory beside what the process has already, that an attack may take"""
REFUSED, HARMLESS = "refused", "harmless"


def _sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a terabyte of nothing": _sparse,
    "nothing": lambda file: None,
}
"""what stands in the place of a file: each makes it where nothing is"""


def outcome(action: Callable[[], object], folder: Path, *, named: str | None = None, lines: int = 8) -> str:
    """`REFUSED` or `HARMLESS`, after looking that no code ran, no process or connection began, and that time and memory were bounded.

    Args:
        folder: where the attacker's files lie; a refusal must name it or something in it.
        named: what a refusal must name in its place.
        lines: of a refusal, at most.

    Raises:
        AssertionError: the attack has done something, or the text of the refusal does not help.
        BaseException: any error other than hecate's own, as it came: a user would see a traceback.
    """
    refused = ""
    with watched(SECONDS) as seen:
        try:
            action()
        except UserError as error:
            refused = str(error)
    done = [one for one in seen.done if not one.startswith("ctypes.dlopen")]  # torch and numpy load their own libraries
    assert not done, done
    assert not [path for path in seen.opened if os.path.basename(path) == "bait"], "a file outside was opened"
    assert seen.grown < MOST_MIB * 2**20, f"{seen.grown / 2**20:.0f} MiB"
    if not refused:
        return HARMLESS
    assert (folder.name if named is None else named) in refused, refused
    assert len(refused.splitlines()) <= lines, refused
    assert len(refused) < 4000, refused[:300]
    return REFUSED
