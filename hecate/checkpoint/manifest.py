"""The manifest of a checkpoint: which tensors its files hold, and the checks that a reader makes before using them.

The xxh3 digests detect damage but not forgery. Anyone may have written a manifest, so every field is checked before it is used.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from hecate.checkpoint.files import CheckpointError, open_inside, read_small
from hecate.checkpoint.layout import ITEM_SIZE, TensorEntry, file_size, is_shape, is_tensor_name, shard_file
from hecate.io.strict_json import JsonError, parse_json

FORMAT = "hecate-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
COMMIT = "COMMIT"
MAX_MANIFEST_BYTES = 2**30
MAX_WORLD_SIZE = 99_999
_MAX_STEP = 2**53
_DIGEST = re.compile(r"[0-9a-f]{32}")
_STEP_FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]{0,15})")


@dataclass(frozen=True)
class Manifest:
    """The content of a committed checkpoint."""

    step: int
    """The number of finished optimizer steps."""
    world_size: int
    """The number of ranks that wrote the checkpoint."""
    tensors: Mapping[str, TensorEntry]
    """Every tensor by name."""
    meta: Any
    """The JSON value that the trainer passed to `commit`."""

    @property
    def files(self) -> list[str]:
        """The names of the safetensors files, one for each rank that wrote the checkpoint."""
        return [shard_file(rank, self.world_size) for rank in range(self.world_size)]

    def by_file(self) -> dict[str, dict[str, TensorEntry]]:
        """Return the tensors of each file. A file may have none."""
        files: dict[str, dict[str, TensorEntry]] = {file: {} for file in self.files}
        for name, entry in self.tensors.items():
            files[entry.file][name] = entry
        return files


def step_of(name: str) -> int | None:
    """Return the step in a folder name `checkpoint-{step}`, or None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def digest_of(data: bytes | memoryview) -> str:
    """Return the xxh3_128 hash as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def manifest_value(manifest: Manifest) -> dict[str, Any]:
    """Return the JSON value of manifest.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "files": {file: file_size(inside) for file, inside in manifest.by_file().items()},
        "tensors": {name: entry_value(entry) for name, entry in manifest.tensors.items()},
        "meta": manifest.meta,
    }


def entry_value(entry: TensorEntry) -> dict[str, Any]:
    """Return the JSON value of one tensor's entry."""
    return {"file": entry.file, "dtype": entry.dtype, "shape": list(entry.shape), "xxh3_128": entry.digest}


def read_manifest(folder: Path) -> Manifest:
    """Read and check COMMIT and manifest.json of `folder`, and check the size of every file that the manifest names.

    Tensors are not read. Raises CheckpointError if the folder is not a complete checkpoint: it is not committed, is damaged or of a
    newer version, a field has the wrong type or range, or a file is unexpected, missing, a link, or of another size than its
    tensors need.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    commit = read_small(folder, COMMIT, 1024)
    data = read_small(folder, MANIFEST, MAX_MANIFEST_BYTES)
    if commit != commit_line(data):
        raise CheckpointError(f"{folder / MANIFEST}: its digest is not the one in {COMMIT}: one of the two is damaged")
    try:
        manifest, sizes = parse_manifest(parse_json(data))
    except (JsonError, CheckpointError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    if step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{folder}: the manifest is of step {manifest.step}; rename the folder back to checkpoint-{manifest.step}")
    for file, size in sizes.items():
        with open_inside(folder, file) as descriptor:
            found = os.fstat(descriptor).st_size
        if found != size:
            raise CheckpointError(f"{folder / file}: {found} bytes, {size} in the manifest: the file is damaged")
    return manifest


def commit_line(manifest: bytes) -> bytes:
    """Return the content of COMMIT for these bytes of manifest.json."""
    return digest_of(manifest).encode("ascii") + b"\n"


def parse_manifest(value: Any) -> tuple[Manifest, dict[str, int]]:
    """Return the manifest in a JSON value, and the size of each file in bytes. Raises CheckpointError if a field is wrong."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CheckpointError(f"not a manifest of the format {FORMAT!r}")
    version = _whole(value, "version", 1, _MAX_STEP)
    if version > VERSION:
        raise CheckpointError(f"format version {version} is newer than {VERSION}, the newest that this hecate reads; use a newer hecate")
    _same_names(value, {"format", "version", "step", "world_size", "files", "tensors", "meta"}, "the manifest")
    step = _whole(value, "step", 0, _MAX_STEP)
    world_size = _whole(value, "world_size", 1, MAX_WORLD_SIZE)
    if not isinstance(value["files"], dict) or len(value["files"]) != world_size:
        raise CheckpointError(f"'files' must list one file for each of {world_size} ranks")
    manifest = Manifest(step, world_size, parse_entries(value["tensors"]), value["meta"])
    files = set(manifest.files)
    _same_names(value["files"], files, "'files'")
    for name, entry in manifest.tensors.items():
        if entry.file not in files:
            raise CheckpointError(f"tensor {name}: {entry.file[:200]!r} is not a file of this checkpoint")
    for file, inside in manifest.by_file().items():
        size = _whole(value["files"], file, 0, 2**63)
        if size != file_size(inside):
            raise CheckpointError(f"{file}: {size} bytes given, its tensors need {file_size(inside)}")
    return manifest, dict(value["files"])


def parse_entries(value: Any) -> dict[str, TensorEntry]:
    """Return the tensor entries in a JSON value {name: entry}. Raises CheckpointError for a wrong name, dtype, shape or digest."""
    if not isinstance(value, dict):
        raise CheckpointError("'tensors' must be a JSON object")
    entries = {}
    for name, item in value.items():
        if not is_tensor_name(name):
            raise CheckpointError(f"{name[:100]!r} is not a tensor name")
        if not isinstance(item, dict):
            raise CheckpointError(f"tensor {name}: not a JSON object")
        _same_names(item, {"file", "dtype", "shape", "xxh3_128"}, f"tensor {name}")
        file, dtype, shape, digest = item["file"], item["dtype"], item["shape"], item["xxh3_128"]
        if not isinstance(file, str):
            raise CheckpointError(f"tensor {name}: 'file' is not text")
        if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
            raise CheckpointError(f"tensor {name}: unknown dtype {str(dtype)[:100]!r}")
        if not is_shape(shape, dtype):
            raise CheckpointError(f"tensor {name}: {str(shape)[:100]} is not the shape of a tensor")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"tensor {name}: 'xxh3_128' is not 32 hex digits")
        entries[name] = TensorEntry(file, dtype, tuple(shape), digest)
    return entries


def _whole(value: dict[str, Any], name: str, low: int, high: int) -> int:
    number = value.get(name)
    if type(number) is not int or not low <= number <= high:
        raise CheckpointError(f"{name!r} must be a whole number from {low} to {high}")
    return number


def _same_names(value: dict[str, Any], names: set[str], where: str) -> None:
    if wrong := set(value) ^ names:
        first = min(wrong)
        raise CheckpointError(f"{where}: {first[:100]!r} is {'unknown' if first in value else 'missing'}")
