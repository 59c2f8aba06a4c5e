"""Recognise data files and tokenizers by their contents, and remember in a folder which contents a file had.

FOLDER/files/       the digests of data files, by path, size and times of change, so that a large file is not read at each start
FOLDER/checked/     an empty file for each source that has been found to have no broken record
"""

from __future__ import annotations

import json
import os
import shlex
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from hecate.config import DataSource
from hecate.config.files.paths import data_files, file_form
from hecate.data.files.formats import Sample
from hecate.data.files.user_features import UserFeatures
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.own_folder import ours_alone
from hecate.io.plain_files import open_plain, read_plain
from hecate.io.strict_json import JsonError, dump_json, parse_json

_CHECKS = 5
"""The version of the check of records; another check has another number."""
_READ = 1 << 24
"""The bytes of a data file that are in memory while it is digested."""
_SETTLED = 2_000_000_000
"""The nanoseconds after its last change from which on a file's times of change are trusted: a file may change twice within one tick."""


def cache_folder(given: str | None) -> Path | None:
    """The folder for tokenized data that `data.cache` names, which is created; None: none is used.

    Raises:
        UserError: it cannot be, or it is the user's own cache, and others can write to it.
    """
    if given is None:
        return None
    folder = Path(given)
    try:
        if given == "auto":
            home = os.environ.get("HECATE_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hecate")
            folder = Path(home) / "tokens"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds what the data hold
        for part in ("files", "checked"):
            (folder / part).mkdir(exist_ok=True)
        if given == "auto" and not ours_alone(folder):
            raise UserError(
                f"{folder}: others can write to it, so that the tokenized data in it may be theirs\n"
                f"  rm -r {shlex.quote(str(folder))}  (they are made again), or name a folder that you share on purpose with data.cache"
            )
    except (OSError, RuntimeError) as error:
        raise unwritable(folder, error) from error
    return folder


def unwritable(folder: str | Path, error: Exception) -> UserError:
    """Return the error that says that a folder for tokenized data cannot be written, and what to do."""
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"tokenized data cannot be written to {folder}: {reason}\n"
        "name another folder with data.cache, or set it to null, so that each rank keeps them in its memory"
    )


def sample_digest(sample: Sample) -> int:
    """A digest of what a sample says, from 0 to 2^64 - 1: of its messages and tools, its text or its tokens, and of nothing else in its
    record."""
    if (row := sample.tokens) is not None:
        return xxhash.xxh3_64_intdigest(row.ids.tobytes() + row.learned.tobytes())
    assert sample.messages is not None or sample.text is not None, "a sample of a new kind needs its own contents here"
    said = [sample.messages, sample.tools, sample.text]
    return xxhash.xxh3_64_intdigest(json.dumps(said, sort_keys=True, default=str).encode())


def digest_of_files(path: str, folder: Path) -> list[list[str]]:
    """The forms and the digests of the contents of a source's files. A file that has not changed since it was last digested is not read."""
    return [[file_form(file) or "", _file_digest(file, folder)] for file in data_files(path)]


def _file_digest(path: str, folder: Path) -> str:
    try:
        before, place = _state_of(path), os.path.realpath(path)
        note = folder / "files" / f"{xxhash.xxh3_128_hexdigest(os.fsencode(place))}.json"
        with suppress(OSError, JsonError, KeyError, TypeError):
            known = parse_json(read_plain(note))
            if known["state"] == before:
                return str(known["digest"])
        digest = xxhash.xxh3_128()
        with open_plain(path) as file:
            while part := file.read(_READ):
                digest.update(part)
        changed = max(before[1:3])
        if _state_of(path) == before and time.time_ns() - changed > _SETTLED:
            with suppress(OSError):  # it is only digested again
                replace_file(note, [dump_json({"path": place, "state": before, "digest": digest.hexdigest()})], durable=False)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error


def _state_of(path: str) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of all by which a fast tokenizer makes tokens of text and conversations."""
    digest = xxhash.xxh3_128(tokenizer.backend_tokenizer.to_str().encode())
    more = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    more += [version("transformers"), version("tokenizers")]
    digest.update(json.dumps(more, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def described_source(source: DataSource) -> dict[str, Any]:
    """All that a source's records, and what is learned of them, depend on beside the contents of its files."""
    described = {name: value for name, value in asdict(source).items() if name not in ("path", "name", "weight")}
    return described | {"roles_to_train": None if source.roles_to_train is None else list(source.roles_to_train)}


def check_mark(source: DataSource, users: UserFeatures | None, folder: Path, *, routed: bool = False) -> Path:
    """The file that exists once all records of a source have been found good. Raises UserError: a data file cannot be read."""
    described = {"version": _CHECKS, "files": digest_of_files(source.path, folder), "users": "" if users is None else users.digest()}
    described |= described_source(source)
    described |= {"routed": True} if routed else {}
    return folder / "checked" / xxhash.xxh3_128_hexdigest(dump_json(described))
