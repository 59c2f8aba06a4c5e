"""Every kind of file that hecate reads, changed in every way that `mutants` knows.

Each changed file must be read to a value or refused by one of hecate's own errors, whose text names it. No other error, no code, no file
outside, no endless loop, and no more memory than the kind's own bound.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from numpy.lib import format as npy

from hecate.apps.check.drill.outcome import DrillCase
from hecate.errors import UserError
from tests.attacks.fuzz import data_files, model_files, run_files
from tests.attacks.fuzz.file_kinds import FileKind
from tests.attacks.fuzz.guard import TooLong, watched
from tests.attacks.fuzz.mutants import OUTSIDE, changed_bytes, changed_value, json_text

_SECONDS = 10.0
"""of processor time that reading a file may take"""
_LONGEST_TEXT, _MOST_LINES = 2500, 12
_MANY = 20
"""as many characters as others have texts that list all problems"""
_SPARSE = 1 << 36
"""bytes of a file that has none of them on the disk"""
_UNBOUND = ("/dev/", "/etc/")

Change = Callable[[Path], None]
"""what happens to a file"""
KINDS: tuple[FileKind, ...] = (*model_files.KINDS, *data_files.KINDS, *run_files.KINDS)


def fuzz_cases(folder: Path, mutants: int, kinds: tuple[FileKind, ...] = KINDS, seed: int = 0, *, quick: bool = False) -> list[DrillCase]:
    """Return a case for each changed file, and one for the sound example of each kind.

    Args:
        folder: empty.
        mutants: of each kind, beside those whose place something else has: a pipe, a folder, a link, nothing.
        quick: only one of the latter for each kind.
    """
    outside = folder / "outside"
    outside.mkdir(parents=True)
    bait = outside / "bait"
    os.mkfifo(bait)  # who opens it waits, and does not come to an end unseen
    cases = []
    for number, kind in enumerate(kinds):
        draw = random.Random(f"{seed} {kind.name}")
        sound, place = folder / "sound", folder / "case"
        shutil.rmtree(sound, ignore_errors=True)
        sound.mkdir()
        kind.write(sound)
        shutil.copytree(sound, place, symlinks=True)
        first = _read(kind, place, bait)
        shutil.rmtree(place)
        cases.append(DrillCase(f"{kind.name}: as it was written", first if first else ""))
        if first:
            continue
        replaced = [*_REPLACED.items(), ("is a link to a pipe", lambda path: _linked(path, bait))] if kind.is_file else []
        if quick and replaced:
            replaced = [replaced[number % len(replaced)]]
        for name, change in (*replaced, *_changes(kind, sound, mutants, draw, bait)):
            shutil.copytree(sound, place, symlinks=True)
            change(place / kind.file_in(sound))
            if kind.forge:
                kind.forge(place)
            problem = _read(kind, place, bait)
            cases.append(DrillCase(f"{kind.name}: {name}"[:200], "" if problem in ("", _REFUSED) else problem))
            shutil.rmtree(place)
    return cases


_REFUSED = "refused"


def _read(kind: FileKind, place: Path, bait: Path) -> str:
    """Read a file: empty, `_REFUSED`, or what is wrong with how it was read."""
    problem = ""
    try:
        with watched(_SECONDS) as seen:
            try:
                kind.read(place)
            except UserError as error:
                problem = _problem_of(str(error), kind, place)
    except TooLong as late:
        return str(late)
    except BaseException as error:  # noqa: BLE001 - any other error is a fault of the reader
        return _place_of(error)
    if seen.done:
        return f"did {seen.done[0]}"
    if kind.closed:
        # The changed file itself may be a link: who names a link means what it leads to.
        elsewhere = [path for path in map(os.path.normpath, seen.opened) if not path.startswith(f"{place}{os.sep}")]
        if strange := [path for path in elsewhere if path == str(bait) or path.startswith(_UNBOUND)]:
            return f"{strange[0]} was opened, which is not in {place}"
    if seen.grown > kind.most_mib * 2**20:
        return f"took {seen.grown / 2**20:.0f} MiB, more than {kind.most_mib}"
    return problem


def _problem_of(text: str, kind: FileKind, place: Path) -> str:
    if kind.named and str(place) not in text:
        return f"the text does not name the file: {text[:150]!r}"
    if len(text) > _LONGEST_TEXT * (_MANY if kind.lists else 1) or (text.count("\n") >= _MOST_LINES and not kind.lists):
        return f"the text has {len(text)} characters in {text.count(chr(10)) + 1} lines: {text[:100]!r}"
    return _REFUSED


def _place_of(error: BaseException) -> str:
    """Class, text and the innermost line of hecate of an error."""
    at, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/hecate/" in code.co_filename:
            at = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {at}: {str(error)[:150]!r}"


def _changes(kind: FileKind, sound: Path, mutants: int, draw: random.Random, bait: Path) -> Iterator[tuple[str, Change]]:
    """The changes of the content of a kind's file, each with its name."""
    file = sound / kind.file_in(sound)
    data = file.read_bytes()
    for number in range(mutants):
        # Every third change is of bytes, whatever the file's form; where there is no other form, all are.
        by_bytes = kind.form == "bytes" or number % 3 == 2
        name, changed = changed_bytes(data, draw) if by_bytes else _FORMS[kind.form](data, draw)
        content = changed.replace(OUTSIDE.encode(), str(bait).encode())
        yield f"{number}, {name}", lambda path, content=content: _written(path, content)  # type: ignore[misc]


def _written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _linked(path: Path, target: Path | str) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name[-90:])
            if path.name[-90:] != path.name:
                os.rename(path.name[-90:], path.name)
    finally:
        os.chdir(here)


_REPLACED: dict[str, Change] = {
    "is missing": lambda path: path.unlink(),
    "is empty": lambda path: _written(path, b""),
    "is a folder": _folder,
    "is a pipe": _pipe,
    "is a socket": _socket,
    "is a link to a device": lambda path: _linked(path, "/dev/zero"),
    "is a link to itself": lambda path: _linked(path, path),
    "has 64 GiB of nothing": lambda path: os.truncate(path, _SPARSE),
}
"""what stands in the place of a file"""


def _json(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    name, value = changed_value(json.loads(data), draw)
    return name, json_text(value).encode("utf-8", "surrogatepass")


def _yaml(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """JSON is YAML, too; and some of what only YAML has."""
    if draw.random() < 0.25:
        at = draw.choice([number for number, one in enumerate(data) if one == 0x3A])
        words = draw.choice(_YAML_WORDS)
        return f"{words[:20]!r} stands in it", data[: at + 1] + b" " + words + b"\n" + data[at + 1 :]
    name, value = changed_value(yaml.safe_load(data), draw)
    return name, json_text(value).encode("utf-8", "surrogatepass")


_YAML_WORDS = (
    *(
        b"&a [*a]",
        b"&a",
        b"*b",
        b"!!python/object/apply:os.system ['touch ran']",
        b"!!binary a",
        b"!!set {a}",
        b"!!timestamp x",
        b"!!int ''",
    ),
    *(b"2001-99-99", b"0o9", b"12:70:99", b"<<: *a", b"? [a]", b"%YAML 9", b"---", b"- -", b"\t", b"|", b"{" * 300, b"[" * 30_000, b".nan"),
    b"\n".join(b"x%d: &x%d [%s]" % (n, n, b", ".join([b"*x%d" % (n - 1)] * 9) if n else b"a, a") for n in range(12)),
)


def _lines(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    lines = data.splitlines()
    at = draw.randrange(len(lines))
    if draw.random() < 0.2:
        lines[at] = draw.choice((b"", b"null", b"[]", b"12", b'"a"', b"NaN", b"{}", lines[0]))
        return f"line {at + 1} is {lines[at][:20]!r}", b"\n".join(lines) + b"\n"
    name, lines[at] = _json(lines[at], draw)
    return f"line {at + 1}, {name}", b"\n".join(lines) + b"\n"


def _safetensors(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    name, header = _json(data[8 : 8 + size], draw)
    return name, struct.pack("<Q", len(header)) + header + data[8 + size :]


def _npz(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One array of a .npz file with another header, or with other numbers; or all packed in another way."""
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    chosen = draw.choice(sorted(members))
    content = io.BytesIO(members[chosen])
    version = npy.read_magic(content)
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(content)
    numbers = content.read()
    if chosen == "header.npy" and draw.random() < 0.7:
        name, numbers = _json(numbers, draw)
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(numbers)},)}}"
    elif draw.random() < 0.3:
        name, text = changed_bytes(npy_header(dtype.str, shape).encode(), draw)  # type: ignore[assignment]
        text = text.decode("latin-1")  # type: ignore[attr-defined]
    else:
        kind, sizes = draw.choice(((repr(dtype.str), draw.choice(_SHAPES)), (draw.choice(_DTYPES), repr(shape))))
        text = f"{{'descr': {kind}, 'fortran_order': {draw.choice((True, False))}, 'shape': {sizes}}}"
        name = text[:60]
    line = text.encode("latin-1", "replace")
    members[chosen] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line) % 2**16) + line + numbers
    if draw.random() < 0.1:
        del members[chosen]
    made = io.BytesIO()
    with zipfile.ZipFile(
        made, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    ) as packed:
        for member, raw in members.items():
            packed.writestr(member, raw)
    return f"{chosen}, {name}", made.getvalue()


def npy_header(kind: str, shape: tuple[int, ...]) -> str:
    """The text of a .npy file's header."""
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}}}"


_SHAPES = (
    *("()", "(0,)", "(-1,)", "(2**40,)", "(1099511627776,)", "(0, 2305843009213693952, 2305843009213693952)", "(4294967296, 4294967296)"),
    *("[2]", "'2'", "(1.5,)", "(True,)", "(1,) * 70", f"({'1, ' * 70})", f"({'1, ' * 20}2)", f"{'(' * 200}{')' * 200}", "(268435456,)"),
)
_DTYPES = (
    "'|O'",
    "'<U999999999'",
    "'V8'",
    "'<f4'",
    "'|S100000'",
    "'>i4'",
    "[('a', '<i4')]",
    "'<c16'",
    "'x'",
    "None",
    "'<M8[ns]'",
    "'|b1'",
    "1",
)

_FORMS: dict[str, Callable[[bytes, random.Random], tuple[str, bytes]]] = {
    "json": _json,
    "yaml": _yaml,
    "lines": _lines,
    "safetensors": _safetensors,
    "npz": _npz,
}
"""by `FileKind.form`"""
