"""Save a checkpoint: ranks write their shards into a staging folder, then one rank commits the folder with a single rename.

The caller runs a save in this order: the ranks of the first sharding group call `write_shard`; a barrier; one rank calls `commit`; a
barrier. If any rank fails before the rename, one rank calls `discard` after all have stopped writing. A folder named `checkpoint-{step}` is
always complete, whenever a process dies.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hecate.checkpoint.file_system import advice
from hecate.checkpoint.files import CheckpointError, UnreadableError, read_small
from hecate.checkpoint.layout import TensorEntry, file_size, shard_file, shard_sidecar
from hecate.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_WORLD_SIZE,
    Manifest,
    commit_line,
    entry_value,
    manifest_value,
    parse_entries,
    step_of,
)
from hecate.checkpoint.shard import layout_of, write_safetensors
from hecate.io.durable import delete_files, sync_folder, write_durable
from hecate.io.strict_json import JsonError, dump_json, parse_json

_NONCE = re.compile(r"[0-9A-Za-z]{1,64}")
_ENTRY_BYTES, _SIZE_BYTES = 160, 21
"""More bytes than a tensor's entry takes in JSON beside its name, and than each number of its shape takes."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the committed checkpoint of `step`."""
    return root / f"checkpoint-{step}"


def staging_folder(root: Path, step: int, nonce: str) -> Path:
    """Return the folder into which a save of `step` is written until it is committed.

    `nonce` is made of letters and digits, the same on all ranks and different for each attempt.
    """
    assert _NONCE.fullmatch(nonce), nonce
    return root / f"checkpoint-{step}.tmp-{nonce}"


def shard_bytes(rank: int, world_size: int, tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes a save of these tensors writes: the shard, its JSON file, and entries in the manifest; rather too many."""
    layout = layout_of(shard_file(rank, world_size), tensors, digest="0" * 32)
    return file_size(layout) + 2 * sum(len(name) + _ENTRY_BYTES + _SIZE_BYTES * len(entry.shape) for name, entry in layout.items())


def write_shard(staging: Path, rank: int, world_size: int, tensors: Mapping[str, Tensor], go_on: Callable[[], None] = lambda: None) -> None:
    """Write this rank's tensors, and a small JSON file with their digests for the committing rank.

    Both are durable when it returns. Every rank calls it, with no tensors if it owns none; each tensor name may come from one rank
    only. The folder is created if it does not exist. Raises CheckpointError if the disk is full or fails; this rank's files are
    then removed, and so is the folder if it is empty.

    Args:
        go_on: called before each tensor; it raises CheckpointError where the save is to be broken off. What was written stays then.
    """
    assert 0 <= rank < world_size <= MAX_WORLD_SIZE, (rank, world_size)
    shard, sidecar = staging / shard_file(rank, world_size), staging / shard_sidecar(rank, world_size)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        entries = write_safetensors(shard, tensors, go_on)
        write_durable(sidecar, [dump_json({name: entry_value(entry) for name, entry in entries.items()}, depth=1)])
    except FileExistsError as error:
        raise CheckpointError(f"{error.filename}: exists already; each save needs a nonce of its own") from error
    except OSError as error:
        for path in (shard, sidecar):
            with contextlib.suppress(OSError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(staging)
        raise _failed(staging, error) from error


def commit(staging: Path, final: Path, meta: Any, world_size: int) -> None:
    """Turn the shards in `staging` into the checkpoint `final` (see `checkpoint_folder`), which must be in the same folder.

    One rank calls it, after every rank's `write_shard` has returned. `meta` is any JSON value and is read back equal. When it
    returns, the checkpoint survives a power cut. Raises CheckpointError if `final` exists, if a rank's shard is missing or differs in
    size from its JSON file, if two ranks wrote the same name, or if the disk fails. `staging` is then removed if possible, and older
    checkpoints are unchanged.
    """
    step = step_of(final.name)
    assert step is not None, final
    assert staging.parent == final.parent, (staging, final)
    assert staging.name.startswith(f"{final.name}.tmp-"), (staging, final)
    try:
        if os.path.lexists(final):
            raise CheckpointError(f"{final}: exists already; a checkpoint is never written over. Remove it or save another step")
        manifest = Manifest(step, world_size, _gather_entries(staging, world_size), meta)
        data = dump_json(manifest_value(manifest), depth=2)
        # Whatever the folder holds is on the disk before the rename, and the rename before the return: at a power cut in between, the name
        # `final` is either missing or of a complete checkpoint.
        write_durable(staging / MANIFEST, [data])
        write_durable(staging / COMMIT, [commit_line(data)])
        for rank in range(world_size):
            os.unlink(staging / shard_sidecar(rank, world_size))
        sync_folder(staging)
        try:
            os.rename(staging, final)
        except OSError:
            if os.path.lexists(final):
                raise CheckpointError(f"{final}: another process has just written it; this save is dropped") from None
            raise
        sync_folder(final.parent)
    except UnreadableError as error:
        discard(staging)
        raise (_failed(staging, error.__cause__) if isinstance(error.__cause__, OSError) else error) from error
    except CheckpointError:
        discard(staging)
        raise
    except OSError as error:
        discard(staging)
        raise _failed(staging, error) from error


def discard(staging: Path) -> None:
    """Remove a staging folder as far as possible. `remove_stale_staging` deletes the rest later."""
    with contextlib.suppress(OSError):
        delete_files(staging)


def _gather_entries(staging: Path, world_size: int) -> dict[str, TensorEntry]:
    """Return the tensor entries of all ranks' JSON files, checked against the shards. Raises CheckpointError for missing or double ones."""
    tensors: dict[str, TensorEntry] = {}
    for rank in range(world_size):
        file, sidecar = shard_file(rank, world_size), shard_sidecar(rank, world_size)
        try:
            entries = parse_entries(parse_json(read_small(staging, sidecar, MAX_MANIFEST_BYTES)))
        except JsonError as error:
            raise CheckpointError(f"{staging / sidecar}: {error}") from error
        for name, entry in entries.items():
            if name in tensors:
                raise CheckpointError(f"{staging}: both {tensors[name].file} and {file} hold tensor {name}")
            if entry.file != file:
                raise CheckpointError(f"{staging / sidecar}: tensor {name} is said to be in {entry.file!r}")
        size = os.stat(staging / file).st_size
        if size != file_size(entries):
            raise CheckpointError(f"{staging / file}: {size} bytes, rank {rank} wrote {file_size(entries)}")
        tensors |= entries
    return tensors


def _failed(staging: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot save {staging.name.partition('.')[0]}: {error.strerror} ({error.filename or staging})\n"
        f"  older checkpoints in {staging.parent} are untouched; {advice(error)}"
    )
