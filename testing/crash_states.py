"""What a power cut may leave on a disk: every state of a folder that a journalled file system may have after any operation of a writer.

A writer runs once, and after each operation on files the folder is looked at. What it had before is on the disk. After that, a file's
content is on the disk as it was at the file's last fsync, and an operation on names (a file is made, renamed or removed) if one of the
folders that it touched has been synced since. Of the rest a power cut leaves anything: of the operations on names none, all, the first so
many, or some; of the contents nothing, as many zeros, a half, or all.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from hecate.io import durable

_CALLS = ("open", "write", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "ftruncate", "link")
CONTENTS = ("lost", "zeros", "half", "whole")
"""what becomes of content that was not synced"""
_FEW = 5
"""operations of which every choice is taken"""

Entry = tuple[int, str]
"""the inode of a folder, and a name in it"""
Names = dict[Entry, tuple[int, bool]]
"""what each name means: an inode, and whether that is a folder"""


@dataclass
class Moment:
    """The folder after one operation."""

    operation: str
    changes: dict[Entry, tuple[int, bool] | None]
    """names that have come, gone (None), or now mean another file: all of them reach the disk, or none"""
    contents: dict[int, bytes]
    """of every file, by inode"""
    synced: int | None = None
    """the file or folder that the operation has synced"""


@dataclass
class Log:
    """All that a writer has done to a folder."""

    root: int
    names: Names
    """before the first operation"""
    contents: dict[int, bytes]
    moments: list[Moment] = field(default_factory=list)


def recorded(folder: Path, write: Callable[[], Any]) -> Log:
    """Run `write`, and note after each operation what it has left in the folder."""
    names, contents = _look(folder)
    log, last = Log(folder.stat().st_ino, names, contents), dict(names)
    real = {name: getattr(os, name) for name in _CALLS}
    exchange = durable._exchange

    def put(functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            setattr(os, name, function)

    def note(operation: str, argument: Any) -> None:
        put(real)
        now, contents = _look(folder)
        changes: dict[Entry, tuple[int, bool] | None] = {entry: now.get(entry) for entry in last.keys() | now.keys()}
        changes = {entry: found for entry, found in changes.items() if found != last.get(entry)}
        log.moments.append(Moment(operation, changes, contents, os.fstat(argument).st_ino if operation == "fsync" else None))
        last.clear()
        last.update(now)
        put(noting)

    def call(name: str) -> Callable[..., Any]:
        def call_and_note(*args: Any, **named: Any) -> Any:
            done = real[name](*args, **named)
            note(name, args[0])
            return done

        return call_and_note

    def exchange_and_note(one: Path, other: Path) -> None:
        exchange(one, other)
        note("exchange", None)

    noting = {name: call(name) for name in _CALLS}
    durable._exchange = exchange_and_note
    put(noting)
    try:
        write()
    finally:
        put(real)
        durable._exchange = exchange
    return log


def states(log: Log, seed: int = 0, some: int = 24) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yield the states that a power cut may leave, each once, with what was done last: path -> content, None for a folder.

    Where few operations on names wait for the disk, every choice of them is taken; else the first so many, and `some` random choices.
    """
    draw, seen = random.Random(seed), set()
    synced, sure = dict(log.contents), dict(log.names)
    waiting: list[dict[Entry, tuple[int, bool] | None]] = []
    for number, moment in enumerate(log.moments):
        waiting += [moment.changes] if moment.changes else []
        if moment.synced in moment.contents:
            assert moment.synced is not None
            synced[moment.synced] = moment.contents[moment.synced]
        elif moment.synced is not None:
            for one in [one for one in waiting if any(folder == moment.synced for folder, _ in one)]:
                _apply(sure, one)
                waiting.remove(one)
        if len(waiting) <= _FEW:
            chosen = [[*found] for count in range(len(waiting) + 1) for found in combinations(waiting, count)]
        else:
            chosen = [waiting[:count] for count in range(len(waiting) + 1)]
            chosen += [[one for one in waiting if draw.random() < 0.5] for _ in range(some)]
        for operations in chosen:
            names = dict(sure)
            for one in operations:
                _apply(names, one)
            each = {inode: draw.choice(CONTENTS) for inode in moment.contents}
            for how in (*CONTENTS, "each its own way"):
                of_file = each if how not in CONTENTS else dict.fromkeys(each, how)
                state = dict(_tree(log.root, "", names, moment.contents, synced, of_file))
                key = frozenset(state.items())
                if key not in seen:
                    seen.add(key)
                    yield f"operation {number + 1}, {moment.operation}; {len(operations)} of {len(waiting)} on names, content {how}", state


def lay_out(state: dict[str, bytes | None], folder: Path) -> None:
    """Make the folder that a state describes, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def _apply(names: Names, changes: dict[Entry, tuple[int, bool] | None]) -> None:
    for entry, found in changes.items():
        if found is None:
            names.pop(entry, None)
        else:
            names[entry] = found


def _tree(
    root: int, above: str, names: Names, contents: dict[int, bytes], synced: dict[int, bytes], how: dict[int, str]
) -> Iterator[tuple[str, bytes | None]]:
    """Path and content of all that is below a folder, folders first."""
    for (folder, name), (inode, is_folder) in sorted(names.items()):
        if folder != root:
            continue
        path = f"{above}{name}"
        sure = synced.get(inode, b"")
        yield path, None if is_folder else _left(sure, contents.get(inode, sure), how.get(inode, "whole"))
        if is_folder:
            yield from _tree(inode, f"{path}/", names, contents, synced, how)


def _left(sure: bytes, now: bytes, how: str) -> bytes:
    """What is left of a file's content `now`, of which `sure` was synced."""
    if how == "whole" or now == sure:
        return now
    if how == "lost":
        return sure
    if how == "zeros":
        return sure[: len(now)] + bytes(max(0, len(now) - len(sure)))
    alike = next((place for place, (one, other) in enumerate(zip(now, sure, strict=False)) if one != other), min(len(now), len(sure)))
    return now[: (len(now) + alike) // 2]


def _look(folder: Path) -> tuple[Names, dict[int, bytes]]:
    names: Names = {}
    contents: dict[int, bytes] = {}
    for root, folders, files in os.walk(folder):
        above = os.stat(root).st_ino
        for name in (*folders, *files):
            path = Path(root, name)
            inode = path.lstat().st_ino
            names[above, name] = inode, name in folders
            if name in files:
                contents[inode] = path.read_bytes()
    return names, contents
