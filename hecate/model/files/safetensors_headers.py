"""Where each tensor of a safetensors folder lies, from the files' headers alone. No torch, and nothing is loaded."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from hecate.errors import UserError
from hecate.io.plain_files import open_plain, read_plain

_LARGEST_HEADER = 200 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file with all weights of a model, and the one that says in which of several files they are."""
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""The sizes of the types in which weights are stored whole; others are quantised, or no weights."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    file: Path
    dtype: str
    """The name of the type in safetensors."""
    shape: tuple[int, ...]
    start: int
    """The position of the tensor's first byte in the file; it is row-major from there."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder by its name.

    Raises:
        UserError: a file cannot be read, is damaged, or is named by the index and missing.
    """
    entries: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        entries |= _read_header(file)
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in a folder, by name.

    As transformers does, model.safetensors is taken if it is there, else the files that model.safetensors.index.json names, so that copies
    in another layout beside them do not count; else all *.safetensors.

    Raises:
        UserError: the index cannot be read, is damaged, or names a file that is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = files_of_index(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{index}: names {missing[0]}, which is not there ({len(missing)} missing); is the download complete?")
    return [folder / name for name in names]


def files_of_index(index: Path) -> list[str]:
    """The names of the files that an index says, which are beside it, if they are there.

    Raises:
        UserError: it cannot be read, is damaged, or names something else than a file beside it.
    """
    try:
        names = sorted(set(json.loads(read_plain(index))["weight_map"].values()))
    except OSError as error:
        raise UserError(f"{index}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: no index of a sharded model, or damaged: {str(error)[:300]}") from error
    if strange := [
        name for name in names if not isinstance(name, str) or len(name) > 200 or not name.isprintable() or Path(name).name != name
    ]:
        raise UserError(
            f"{index}: names {str(strange[0])[:200]!r}, which is not a file beside it\n  put all files of the model into one folder"
        )
    return names


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        length = file.stat().st_size
        with open_plain(file) as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > min(_LARGEST_HEADER, length):
                raise UserError(f"{file}: says that its header has {size} bytes; is the download complete?")
            header = json.loads(opened.read(size))
        entries = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(map(int, entry["shape"]))
            first, last = map(int, entry.get("data_offsets", (0, 0)))
            entries[name] = StoredTensor(file, str(entry["dtype"]), shape, 8 + size + first)
            if 8 + size + last > length:
                raise UserError(f"{file}: ends before its tensor {name[:200]}; is the download complete?")
            if min(shape, default=0) < 0 or not 0 <= first <= last:
                raise UserError(f"{file}: no safetensors file, or damaged: tensor {name[:200]} has the shape {str(shape)[:100]}")
        return entries
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: no safetensors file, or damaged: {str(error)[:300]}") from error
