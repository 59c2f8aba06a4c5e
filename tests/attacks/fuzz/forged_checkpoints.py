"""Checkpoints made to do harm: forged manifests with the COMMIT that goes with them, and what stands in the place of files."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hecate.apps.check.drill.cases.saves import load, save
from hecate.apps.check.drill.disk import watched_disk
from hecate.apps.check.drill.outcome import DrillCase
from hecate.checkpoint.layout import file_layout, file_size
from hecate.checkpoint.manifest import COMMIT, MANIFEST, commit_line, parse_entries
from tests.attacks.fuzz.guard import watched
from tests.attacks.fuzz.hostile import SECONDS, not_refused

_MOST = 2**26
"""bytes of memory that reading one may take"""
SHARD, OTHER = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"
TENSOR = "owned/0.master"  # float32 [3, 5]
_HUGE = 10**4000


def _put(*path_and_value: Any) -> Callable[[Any], Any]:
    *path, last, new = path_and_value

    def change(value: Any) -> None:
        for key in path:
            value = value[key]
        value[last] = new

    return change


def _drop(*path: str) -> Callable[[Any], Any]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


def _moved(file: str) -> Callable[[Any], Any]:
    return lambda value: json.dumps(value).replace(SHARD, file).encode()


def _text(old: str, new: str) -> Callable[[Any], Any]:
    return lambda value: json.dumps(value).replace(old, new, 1).encode()


FORGED: dict[str, Callable[[Any], Any]] = {
    "a path that leads up": _moved("../outside/" + SHARD),
    "an absolute path": _moved("/etc/passwd"),
    "a path into a subfolder": _moved("sub/" + SHARD),
    "a path with a zero byte": _moved("rank\\u0000"),
    "the manifest as a file of tensors": _moved(MANIFEST),
    "a file of no rank": _put("tensors", TENSOR, "file", "rank-00002-of-00002.safetensors"),
    "another rank's file": _put("tensors", TENSOR, "file", OTHER),
    "a number as a file": _put("tensors", TENSOR, "file", 7),
    "a negative size": _put("files", SHARD, -1),
    "a huge size": _put("files", SHARD, _HUGE),
    "99,999 ranks": _put("world_size", 99_999),
    "a huge number of ranks": _put("world_size", _HUGE),
    "a step of another folder": _put("step", 4),
    "a newer version": _put("version", 2),
    "another format": _put("format", "pickle"),
    "no tensors": _drop("tensors"),
    "an unknown field": _put("code", "import os"),
    "a tensor with code": _put("tensors", TENSOR, "code", "import os"),
    "a tensor without a digest": _drop("tensors", TENSOR, "xxh3_128"),
    "a reserved name": _text(TENSOR, "__metadata__"),
    "objects as numbers": _put("tensors", TENSOR, "dtype", "O"),
    "wider numbers": _put("tensors", TENSOR, "dtype", "F64"),
    "a negative shape": _put("tensors", TENSOR, "shape", [-3, -5]),
    "a shape that overflows": _put("tensors", TENSOR, "shape", [2**32, 2**32]),
    "an empty shape that overflows": _put("tensors", TENSOR, "shape", [0, 2**61, 2**61]),
    "a shape of a thousand dimensions": _put("tensors", TENSOR, "shape", [1] * 1000 + [15]),
    "a pickle as a manifest": lambda value: b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR.",
    "a manifest nested 200,000 times": lambda value: b"[" * 200_000 + b"]" * 200_000,
    "a number of 5000 digits": _text('"step": 3', '"step": ' + "3" * 5000),
    "a field given twice": _text('"step": 3', '"step": 3, "step": 3'),
    "no bytes": lambda value: b"",
}
"""what a forged manifest makes of a sound one: changed in place, or other bytes"""


def _replaced(kind: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        moved = folder.parent / "moved"
        shutil.move(folder / name, moved)
        if kind == "link":
            (folder / name).symlink_to(moved)
        elif kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()

    return change


def _promising(folder: Path) -> None:
    """A sparse file of 32 TB, with a manifest that says so."""

    def grow(value: Any) -> None:
        value["tensors"][TENSOR]["shape"] = [2**43]
        inside = {name: one for name, one in parse_entries(value["tensors"]).items() if one.file == SHARD}
        value["files"][SHARD] = file_size(inside)
        with open(folder / SHARD, "r+b") as file:
            file.write(file_layout(inside)[0])
            os.truncate(file.fileno(), min(file_size(inside), 2**43))

    _rewrite(folder, grow)


def _header(folder: Path) -> None:
    """A header that says it is 2**60 bytes long."""
    with open(folder / SHARD, "r+b") as file:
        file.write(struct.pack("<Q", 2**60))


REPLACED: dict[str, Callable[[Path], None]] = {
    **{f"{kind} for {name}": _replaced(kind, name) for kind in ("link", "pipe", "folder") for name in (SHARD, MANIFEST, COMMIT)},
    "a file of 32 TB that has no bytes": _promising,
    "a header of 2**60 bytes": _header,
}


CHANGES: dict[str, Callable[[Path], None]] = {
    **{name: lambda folder, forge=forge: _rewrite(folder, forge) for name, forge in FORGED.items()},  # type: ignore[misc]
    **REPLACED,
}
"""what is done to a checkpoint's folder"""


def tried_checkpoint(scratch: Path, name: str, change: Callable[[Path], None]) -> DrillCase:
    """Write a checkpoint below a folder, change it, and load it."""
    root = scratch / "hostile"
    shutil.rmtree(root, ignore_errors=True)
    folder = save(root / "run", 3, 3.0)
    for outside in (root / "run" / "outside", folder / "sub"):  # the bait is a sound file
        outside.mkdir()
        shutil.copy(folder / SHARD, outside)
    change(folder)
    opened: list[Path] = []

    def note(_number: int, operation: str, args: tuple[Any, ...]) -> None:
        if operation == "open":
            opened.append(Path(os.fspath(args[0])))

    def read() -> None:
        with watched_disk(note):
            load(folder)

    with watched(SECONDS) as seen:
        problem = not_refused(read, folder)
    elsewhere = [path for path in opened if path.parent != folder]
    if seen.grown > _MOST:
        problem = f"took {seen.grown / 2**20:.0f} MiB"
    return DrillCase(name, problem or (f"{elsewhere[0]} was opened" if elsewhere else ""))


def _rewrite(folder: Path, change: Callable[[Any], Any]) -> None:
    """Give a checkpoint a forged manifest, and the COMMIT that goes with it."""
    value = json.loads((folder / MANIFEST).read_bytes())
    changed = change(value)
    data = changed if isinstance(changed, bytes) else json.dumps(value).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / COMMIT).write_bytes(commit_line(data))
