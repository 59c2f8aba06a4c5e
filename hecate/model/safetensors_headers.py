"""Where each tensor of a safetensors folder lies, from the files' headers alone. No torch, and nothing is loaded."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from hecate.errors import UserError

_LARGEST_HEADER = 200 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""the file with all weights of a model, and the one that says in which of several files they are"""
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""of the types in which weights are stored whole; others are quantised, or no weights"""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    file: Path
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    start: int
    """of its first byte in the file; row-major from there"""

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
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except OSError as error:
        raise UserError(f"{index}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of a sharded model, or damaged: {error}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{index}: names {missing[0]}, which is not there ({len(missing)} missing); is the download complete?")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        length = file.stat().st_size
        with open(file, "rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(size, _LARGEST_HEADER)))
        entries = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(map(int, entry["shape"]))
            first, last = entry.get("data_offsets", (0, 0))
            entries[name] = StoredTensor(file, str(entry["dtype"]), shape, 8 + size + int(first))
            if 8 + size + int(last) > length:
                raise UserError(f"{file}: ends before its tensor {name}; is the download complete?")
        return entries
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: no safetensors file, or damaged: {error}") from error
