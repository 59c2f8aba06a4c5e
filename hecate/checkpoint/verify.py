"""Find what is damaged in a checkpoint. Files are read in blocks, so that no tensor is ever in memory; torch is not needed.

Pruning and saving ask often whether a checkpoint is whole. What this process has written or read whole is not read again for that.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hecate.checkpoint.files import CheckpointError, UnreadableError, open_inside, read_at, read_small
from hecate.checkpoint.layout import TensorEntry, file_layout
from hecate.checkpoint.manifest import COMMIT, read_manifest

_BLOCK_BYTES = 8 * 2**20
_COMMIT_BYTES = 64
_known: dict[tuple[Path, bytes], str | None] = {}
"""By folder and content of its COMMIT, the damage that this process has found there; None: it was whole."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a checkpoint."""

    file: str
    """The file's name in the checkpoint's folder; empty: the checkpoint as a whole is wrong."""
    tensor: str | None
    """The name of the damaged tensor; None: the damage is not of one tensor."""
    text: str
    """What is wrong, with the file's path, in one line."""


def find_damage(folder: Path) -> Iterator[Damage]:
    """Yield all that is damaged in a checkpoint, having read every byte of it; nothing: it is whole.

    If the manifest is not sound, that is all that is found. Of a file that cannot be read, only that is found.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        yield Damage("", None, _one_line(error))
        return
    for file, tensors in manifest.by_file().items():
        try:
            yield from _damage_of_file(folder, file, tensors)
        except CheckpointError as error:
            yield Damage(file, None, _one_line(error))


def first_damage(folder: Path, *, again: bool = False) -> str | None:
    """Return the first thing that is damaged in a checkpoint, in words; None: it is whole.

    Tensors are read only if this process has neither written the checkpoint nor read it whole before.

    Args:
        again: read it once more in any case.

    Raises:
        UnreadableError: the system does not let it be read.
    """
    try:
        manifest, key = read_manifest(folder), _key(folder)
        if again or key not in _known:
            found = (damage.text for file, tensors in manifest.by_file().items() for damage in _damage_of_file(folder, file, tensors))
            _known[key] = next(found, None)
    except UnreadableError:
        raise
    except CheckpointError as error:
        return _one_line(error)
    return _known[key]


def note_damage(folder: Path, damage: str | None) -> None:
    """Note what the ranks together have just found of a checkpoint; None: they have written it, or have verified every digest of it."""
    with contextlib.suppress(CheckpointError):  # without a COMMIT it is damaged, and needs no note
        _known[_key(folder)] = damage


def _key(folder: Path) -> tuple[Path, bytes]:
    return folder, read_small(folder, COMMIT, _COMMIT_BYTES)


def _damage_of_file(folder: Path, file: str, tensors: Mapping[str, TensorEntry]) -> Iterator[Damage]:
    head, offsets = file_layout(tensors)
    with open_inside(folder, file) as descriptor:
        on_disk = bytearray(len(head))
        read_at(descriptor, memoryview(on_disk), 0)
        if on_disk != head:
            yield Damage(file, None, f"{folder / file}: its header is not the one in the manifest: the file is damaged")
        for name, offset in offsets.items():
            if _digest_at(descriptor, offset, tensors[name].num_bytes) != tensors[name].digest:
                yield Damage(file, name, f"{folder / file}: tensor {name} does not have the bytes that were saved (its digest differs)")


def _digest_at(descriptor: int, offset: int, num_bytes: int) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(min(num_bytes, _BLOCK_BYTES)))
    for start in range(0, num_bytes, _BLOCK_BYTES):
        part = block[: num_bytes - start]
        digest.update(part[: read_at(descriptor, part, offset + start)])
    return digest.hexdigest()


def _one_line(error: CheckpointError) -> str:
    return str(error).splitlines()[0]
