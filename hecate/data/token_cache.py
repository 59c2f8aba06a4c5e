"""Keep tokenized sources on disk: each is written once, by whichever process comes first, and mapped into memory by all ranks.

A source's folder is named by a digest of all that its tokens depend on: the contents of its files, their format, the tokenizer, and the
rules for samples that are too long or bad. So another run, or the same one after its files have moved, finds it again.

    KEY/ids.i32, targets.i32        the tokens and targets of all samples, end to end
    KEY/starts.i64, numbers.i64     as `EncodedSource.starts` and `lines`; users.i64 likewise
    KEY/digests.u64                 as `EncodedSource.digests`
    KEY/routed.i16                  as `EncodedSource.routed`, if routing is read
    KEY/sums.u64                    checksums of blocks of ids, of targets and, if routing is read, of routed [2 or 3, blocks]
    KEY/skipped.jsonl               the samples that were left out, if any, as a quarantine file; `file` is the index of its file
    KEY/meta.json                   counts, and the checksums of the other files and of itself; a folder without it is none
    KEY.lock                        locked while the folder is written

Nothing is read from these files before it has been compared with its checksum. A folder that is damaged is made again, or refused if the
damage is met while training.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from hecate.config import DataSource
from hecate.config.files.paths import data_files
from hecate.data.content import described_source, digest_of_files, tokenizer_digest, unwritable
from hecate.data.encode import (
    STOP_AT_BAD_SAMPLES,
    BadSamples,
    Counts,
    Encoded,
    EncodedSample,
    EncodedSource,
    Skipped,
    encode_samples,
    logger,
    report_counts,
)
from hecate.data.files.formats import Fault
from hecate.data.files.user_features import UserFeatures
from hecate.data.quarantine import faults_of, quarantined, write_quarantine
from hecate.data.routed_experts import RoutingShape
from hecate.errors import UserError
from hecate.io.durable import delete_files, new_folder, write_durable
from hecate.io.plain_files import read_plain, require_plain
from hecate.io.strict_json import JsonError, dump_json, parse_json

_VERSION = 5
"""The version of the files and of how samples become tokens; a change of either needs another number."""
_BLOCK = 1 << 14
"""The number of tokens in a block, which has a checksum of its own."""
_BUFFERED = 1 << 20
"""The tokens in memory while a source is written."""
_QUIET = 10.0
"""The seconds before a line says that a source is being written; between two such lines it takes six times as long."""
_ARRAYS = {"starts.i64": np.int64, "numbers.i64": np.int64, "digests.u64": np.uint64, "users.i64": np.int64, "sums.u64": np.uint64} | {
    "skipped.jsonl": np.uint8
}
"""The files that are compared with their checksums when a source is opened; tokens are compared when they are first used."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MappedSource(EncodedSource):
    """An encoded source whose arrays lie on disk, mapped into memory."""

    folder: Path
    sums: NDArray[np.uint64]  # [2 or 3, blocks]; checksums of the blocks of ids, of targets and, if there is any, of routing
    compared: NDArray[np.bool_]  # [blocks]; which blocks have been compared with their checksums

    def sample(self, index: int) -> Encoded:
        first, behind = int(self.starts[index]), int(self.starts[index + 1])
        for block in range(first // _BLOCK, (behind - 1) // _BLOCK + 1):
            if not self.compared[block]:
                self._compare(block)
        return super().sample(index)

    def _compare(self, block: int) -> None:
        part = slice(block * _BLOCK, (block + 1) * _BLOCK)
        if [_sum(array[part]) for array in _by_token(self)] != self.sums[:, block].tolist():
            raise UserError(
                f"{self.folder}: the tokenized data of {self.path} have changed on the disk since they were written\n"
                "delete that folder, and resume the run: they are made again"
            )
        self.compared[block] = True


def cached_source(
    source: DataSource,
    tokenizer: Any,
    folder: Path,
    *,
    seq_len: int,
    vocab_size: int,
    bad: BadSamples = STOP_AT_BAD_SAMPLES,
    users: UserFeatures | None = None,
    routing: RoutingShape | None = None,
) -> MappedSource:
    """Open a source that has been tokenized into `folder`, or tokenize it into that first. It holds what `encode_source` returns.

    Several processes may call this at once: one of them writes, and the others of the machine wait.

    Args:
        folder: see `hecate.data.content.cache_folder`. The other arguments are those of `encode_source`.

    Raises:
        UserError: as `encode_source`; or the folder cannot be written, or the data have changed while they were tokenized.
    """
    rules: dict[str, Any] = {"seq_len": seq_len, "vocab_size": vocab_size, "on_bad_sample": bad.rule}
    files, features = data_files(source.path), "" if users is None else users.digest()
    contents = digest_of_files(source.path, folder)
    described = {"version": _VERSION, "files": contents} | described_source(source) | rules
    described |= {"tokenizer": tokenizer_digest(tokenizer), "users": features}
    described |= {} if routing is None else {"routing": [list(routing.experts_per_layer), routing.top_k]}
    key = xxhash.xxh3_128_hexdigest(dump_json(described))
    place = folder / key
    try:
        opened = _open(place, source, features, routing)
        if opened is None:
            with _locked(folder / f"{key}.lock"):
                opened = _open(place, source, features, routing)
                if opened is None:
                    _clear(place)
                    encoded = encode_samples(source, tokenizer, users=users, routing=routing, **rules)
                    samples = _of_contents(contents, encoded, source, folder)
                    _write(place, samples, source, files, seq_len, features, routing)
                    opened = _open(place, source, features, routing)
    except OSError as error:
        opened = _open(place, source, features, routing)  # a process of another machine, whose locks are not seen, may have come first
        if opened is None:
            raise unwritable(folder, error) from error
    if opened is None:
        raise UserError(f"{place}: the tokenized data of {source.path} are not on the disk as they were written\ncheck the disk")
    mapped, first = opened
    counts, faults = mapped.counts, None if first is None else replace(first, file=files[int(first.file)])
    if counts.skipped and bad.quarantine is not None:
        with open(place / "skipped.jsonl", "rb") as lines:
            write_quarantine(bad.quarantine, (replace(fault, file=files[int(fault.file)]) for fault in faults_of(lines)))
    report_counts(source.path, counts, Skipped(counts.skipped, faults), seq_len, speaks=bad.speaks)
    return mapped


def _of_contents(
    contents: list[list[str]], samples: Iterator[EncodedSample | Fault], source: DataSource, folder: Path
) -> Iterator[EncodedSample | Fault]:
    """Yield the samples. Raises UserError at their end if they may be of other contents than those that name their folder."""
    yield from samples
    if digest_of_files(source.path, folder) != contents:
        raise UserError(f"{source.path}: the data have changed while they were tokenized\nstart the run again when nothing writes to them")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which the system gives up if this process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _host() -> str:
    """This machine's name in names of files: locks of other machines are not seen on every disk, and their work is left alone."""
    return re.sub(r"[^A-Za-z0-9.]", "", platform.node())[:40]


def _clear(place: Path) -> None:
    """Delete what a writer of this machine that was killed has left, and a source that is damaged."""
    for stale in place.parent.glob(f"{place.name}.tmp-{_host()}-*"):
        delete_files(stale)
    if place.exists():
        logger.warning("%s is damaged: it is made again", place)
        delete_files(place)


def _write(
    place: Path,
    samples: Iterator[EncodedSample | Fault],
    source: DataSource,
    files: list[str],
    seq_len: int,
    features: str,
    routing: RoutingShape | None,
) -> None:
    """Write the folder of a source, whole or not at all."""
    with new_folder(place, mark=f"{_host()}-") as staging:
        try:
            more = (["users.i64"] if features else []) + (["routed.i16"] if routing else [])
            counts, first = _write_samples(staging, samples, source, files, more)
            report_counts(source.path, counts, Skipped(counts.skipped, first), seq_len, speaks=False)
            ids, targets, starts = (_mapped(staging / name, kind) for name, kind in _TOKENS.items())
            users = _mapped(staging / "users.i64", np.int64) if features else None
            routed = _routed(staging, routing) if routing else None
            whole = EncodedSource(
                source.name, source.path, source.weight, ids, targets, starts, starts, counts, users, features, routed=routed
            )
            blocks = range(0, len(ids), _BLOCK)
            sums = np.array([[_sum(array[at : at + _BLOCK]) for at in blocks] for array in _by_token(whole)], np.uint64)
            write_durable(staging / "sums.u64", [sums.tobytes()])
            meta = {"key": place.name, "tokens": len(ids), "content": whole.digest(), "counts": asdict(counts)}
            meta["first"] = None if first is None else [files.index(first.file), first.line, first.reason]
            meta["sums"] = {name: _sum(_mapped(staging / name, kind)) for name, kind in _ARRAYS.items() if (staging / name).exists()}
            write_durable(staging / "meta.json", [dump_json(meta | {"sum": _sum_of_meta(meta)})])
        except BaseException:
            delete_files(staging)
            raise


def _write_samples(
    staging: Path, samples: Iterator[EncodedSample | Fault], source: DataSource, files: list[str], more: list[str]
) -> tuple[Counts, Fault | None]:
    """Write the arrays of all samples; how many there were, and the first that was left out.

    Args:
        more: names of arrays beside those that every source has.
    """
    kept = truncated = skipped = 0
    unread: Counter[str] = Counter()
    first: Fault | None = None
    number = {file: str(i) for i, file in enumerate(files)}
    said = time.monotonic() + _QUIET
    with _Arrays(staging, more) as arrays, open(staging / "skipped.jsonl", "wb") as left_out:
        for item in samples:
            if isinstance(item, Fault):
                first, skipped = first or item, skipped + 1
                left_out.write(quarantined(replace(item, file=number[item.file])))
            else:
                arrays.add(item)
                kept, truncated = kept + 1, truncated + item.truncated
                unread.update(item.unread)
            if time.monotonic() > said:
                said += 6 * _QUIET
                logger.warning("tokenizing %s: %d samples so far; it is done once and kept in %s", source.path, kept, staging.parent)
        left_out.flush()
        os.fsync(left_out.fileno())
    if not skipped:
        (staging / "skipped.jsonl").unlink()
    return Counts(kept=kept, truncated=truncated, skipped=skipped, unread=dict(unread)), first


class _Arrays:
    """The arrays of a source that is being written, of which a bounded part is in memory."""

    def __init__(self, staging: Path, more: list[str]) -> None:
        self._paths = [staging / name for name in (*_TOKENS, "numbers.i64", "digests.u64", *more)]
        self._files: dict[str, BinaryIO] = {}
        self._opened = ExitStack()
        self._pieces: list[Encoded] = []
        self._digests: list[int] = []  # of the content of each piece's sample
        self._tokens = 0  # that the files hold
        self._waiting = 0  # about how much memory the pieces take, in tokens with their targets

    def __enter__(self) -> _Arrays:
        for path in self._paths:
            self._files[path.name] = self._opened.enter_context(path.open("wb"))
        self._files["starts.i64"].write(np.zeros(1, np.int64).tobytes())
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._opened:
            if kind is None:
                self._flush()
                for file in self._files.values():
                    file.flush()
                    os.fsync(file.fileno())

    def add(self, item: EncodedSample) -> None:
        pieces = item.pieces
        self._pieces += pieces
        self._digests += [item.digest] * len(pieces)
        routed = sum(piece.routed.nbytes for piece in pieces if piece.routed is not None)
        self._waiting += sum(len(piece.input_ids) for piece in pieces) + routed // 8  # a token and its target have 8 bytes
        if self._waiting + 16 * len(self._pieces) > _BUFFERED:  # a piece takes memory of its own, too
            self._flush()

    def _flush(self) -> None:
        pieces = self._pieces
        ends = self._tokens + np.cumsum([len(piece.input_ids) for piece in pieces], dtype=np.int64)
        columns: Mapping[str, NDArray[Any]] = {
            "ids.i32": np.concatenate([np.zeros(0, np.int32), *(piece.input_ids for piece in pieces)]),
            "targets.i32": np.concatenate([np.zeros(0, np.int32), *(piece.targets for piece in pieces)]),
            "starts.i64": ends,
            "numbers.i64": np.array([piece.line for piece in pieces], np.int64),
            "digests.u64": np.array(self._digests, np.uint64),
            "users.i64": np.array([piece.user for piece in pieces], np.int64),
            "routed.i16": np.concatenate([np.zeros(0, np.int16), *(piece.routed.ravel() for piece in pieces if piece.routed is not None)]),
        }
        for name, file in self._files.items():
            file.write(columns[name].tobytes())
        self._tokens += sum(len(piece.input_ids) for piece in pieces)
        self._waiting, self._pieces, self._digests = 0, [], []


_TOKENS = {"ids.i32": np.int32, "targets.i32": np.int32, "starts.i64": np.int64}


def _by_token(source: EncodedSource) -> list[NDArray[Any]]:
    """The arrays with a row for each token, which are compared block by block."""
    return [source.input_ids, source.targets, *([] if source.routed is None else [source.routed])]


def _routed(place: Path, routing: RoutingShape) -> NDArray[np.int16]:
    """Raises ValueError: there is no whole number of tokens."""
    return _mapped(place / "routed.i16", np.int16).reshape(-1, len(routing.moe_layers), routing.top_k)


def _open(place: Path, source: DataSource, features: str, routing: RoutingShape | None) -> tuple[MappedSource, Fault | None] | None:
    """Map the folder of a source; also the first sample that was left out, with the index of its file. None: there is no sound folder."""
    try:
        meta = parse_json(read_plain(place / "meta.json"))
        if meta["sum"] != _sum_of_meta(meta) or meta["key"] != place.name:
            return None
        arrays = {
            name: _mapped(place / name, kind) for name, kind in (_TOKENS | _ARRAYS).items() if name in _TOKENS or name in meta["sums"]
        }
        ids, targets, starts = (arrays[name] for name in _TOKENS)
        numbers, digests, users = arrays["numbers.i64"], arrays["digests.u64"], arrays.get("users.i64")
        if any(_sum(arrays[name]) != checksum for name, checksum in meta["sums"].items()):
            return None
        routed = _routed(place, routing) if routing else None
        tokens = [len(ids), len(targets), starts[-1], *([] if routed is None else [len(routed)])]
        if any(count != meta["tokens"] for count in tokens) or {len(numbers), len(digests)} != {len(starts) - 1}:
            return None
        sums = arrays["sums.u64"].reshape(2 if routed is None else 3, -1)
        first = meta["first"] and Fault(str(meta["first"][0]), meta["first"][1], meta["first"][2])
        mapped = MappedSource(
            name=source.name,
            path=str(source.path),
            weight=source.weight,
            input_ids=ids,
            targets=targets,
            starts=starts,
            lines=numbers,
            counts=Counts(**meta["counts"]),
            users=users,
            features=features,
            routed=routed,
            content=meta["content"],
            digests=digests,
            folder=place,
            sums=sums,
            compared=np.zeros(sums.shape[1], np.bool_),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, JsonError):
        return None
    return mapped, first


def _mapped(path: Path, kind: Any) -> NDArray[Any]:
    """The numbers of a file, read-only. Raises ValueError if it is empty, or no whole number of them; OSError if it is no plain file."""
    require_plain(path, sys.maxsize)
    return np.asarray(np.memmap(path, kind, "r"))


def _sum(array: NDArray[Any]) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).data.cast("B"))


def _sum_of_meta(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(dump_json({name: value for name, value in meta.items() if name != "sum"}))
