"""Checkpoints and other files that are damaged, or made to do harm: R8, R9."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hecate.checkpoint import CheckpointError
from hecate.checkpoint.layout import file_layout, file_size
from hecate.checkpoint.manifest import COMMIT, MANIFEST, commit_line, parse_entries
from hecate.drill.disk import watched_disk
from hecate.drill.fuzz import KINDS, fuzz_cases
from hecate.drill.guard import limit_memory, most_grown, watched
from hecate.drill.hostile import HOSTILE, SECONDS, not_refused, tried_file
from hecate.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.drill.ranks import call_on_ranks
from hecate.drill.resuming import save_at
from hecate.drill.saves import load, save

_ROOM = 2**31 + 2**30
"""bytes of address space that the process may take beside what it has: more is promised by no file that is read"""
_MOST = 2**26
"""bytes of memory that reading a hostile checkpoint may take"""
_FEW, _MANY = 2, 150
"""changed files of each kind"""


def bit_flips(scope: Scope) -> DrillOutcome:
    """R8. Of a checkpoint that a run of two ranks has saved; the small files are hit as often as the large ones."""
    call_on_ranks(scope, 2, save_at, scope.workshop, str(scope.path / "run"))
    folder = scope.path / "run" / "checkpoint-2"
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_size)
    draw, left = random.Random(0), 200 if scope.quick else 10_000
    counts, cases = {}, []
    for number, path in enumerate(files):
        sound = path.read_bytes()
        bits = draw.sample(range(8 * len(sound)), min(left // (len(files) - number), 8 * len(sound)))
        counts[path.name], left = len(bits), left - len(bits)
        for bit in bits:
            _write_byte(path, bit // 8, sound[bit // 8] ^ 1 << bit % 8)
            found = refused(folder)
            _write_byte(path, bit // 8, sound[bit // 8])
            cases.append(DrillCase(f"{path.name}, bit {bit}", "" if found else "was not found"))
    cases.append(DrillCase("the sound checkpoint", "is refused" if refused(folder) else ""))
    seen = "every flipped bit is found, in tensors, headers, manifest and COMMIT"
    return outcome_of(cases, seen, {"flips": sum(counts.values()), **counts})


def refused(folder: Path) -> bool:
    """Whether a checkpoint is refused."""
    try:
        load(folder)
    except CheckpointError:
        return True
    return False


def _write_byte(path: Path, at: int, byte: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, bytes([byte]), at)
    os.close(descriptor)


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


def hostile_files(scope: Scope) -> DrillOutcome:
    """R9"""
    limit_memory(_ROOM)
    os.chdir(scope.path)
    outside = scope.path / "outside"
    os.mkfifo(outside)
    cases = []
    for name, forge in FORGED.items():
        cases.append(_hostile(scope, name, lambda folder, forge=forge: _rewrite(folder, forge)))  # type: ignore[misc]
    for name, change in REPLACED.items():
        cases.append(_hostile(scope, name, change))
    for number, one in enumerate(HOSTILE):
        (scope.path / f"file-{number}").mkdir()
        cases.append(tried_file(one, scope.path / f"file-{number}", outside))
    files = len(cases)
    cases += fuzz_cases(scope.path / "fuzz", _FEW if scope.quick else _MANY, quick=scope.quick)
    ran = [str(path) for path in (Path("ran"), scope.path / "ran", Path("/tmp/ran")) if path.exists()]
    cases.append(DrillCase("no code has run", f"{ran[0]} is there" if ran else ""))
    counts = {
        "hostile_files": files,
        "kinds_of_files": len(KINDS),
        "changed_files": len(cases) - files - 1,
        "most_memory_mib": most_grown() / 2**20,
    }
    return outcome_of(cases, "all read or refused; no code run, no file outside opened, memory bounded", counts)


def _hostile(scope: Scope, name: str, change: Callable[[Path], None]) -> DrillCase:
    root = scope.path / "hostile"
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
