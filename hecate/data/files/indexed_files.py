"""Open Megatron's indexed data sets: PREFIX.bin holds token ids end to end, PREFIX.idx says where documents begin.

megatron-core's own reader is not used: it takes seconds to import, needs torch, and does not check the files.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecate.errors import UserError
from hecate.io.plain_files import require_plain

_HEADER = b"MMIDIDX\x00\x00"
_FIXED = struct.Struct("<9sQBQQ")  # header, version, code of the ids' type, number of sequences, number of document bounds
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True, eq=False)
class IndexedFiles:
    """The token ids of all documents, memory-mapped."""

    ids: NDArray[np.integer]  # [tokens]
    bounds: NDArray[np.int64]  # [documents + 1]; document d is ids[bounds[d]:bounds[d + 1]]


def open_indexed(prefix: str) -> IndexedFiles:
    """Map the two files of an indexed data set.

    Raises UserError if a file cannot be read, is not of this format, or the two do not belong together.
    """
    index = _mapped(prefix + ".idx", np.dtype(np.uint8))
    if len(index) < _FIXED.size or index[: len(_HEADER)].tobytes() != _HEADER:
        raise _unusable(f"{prefix}.idx", "is not an index of Megatron's: its first bytes are not those of one")
    _, version, code, num_sequences, num_bounds = _FIXED.unpack_from(index.data)
    if version != 1 or code not in _TYPES:
        what = f"has version {version}" if version != 1 else f"holds numbers of type {code}, which are no token ids"
        raise _unusable(f"{prefix}.idx", what)
    # A data set with several modes has one more byte per sequence, which is not read.
    if len(index) - _FIXED.size - 12 * num_sequences - 8 * num_bounds not in (0, num_sequences):
        raise _unusable(f"{prefix}.idx", "is longer or shorter than its header says: it seems cut off")
    lengths = np.frombuffer(index, np.int32, num_sequences, _FIXED.size)
    pointers = np.frombuffer(index, np.int64, num_sequences, _FIXED.size + 4 * num_sequences)
    documents = np.frombuffer(index, np.int64, num_bounds, _FIXED.size + 12 * num_sequences)
    dtype = np.dtype(_TYPES[code])
    ends = np.cumsum(np.append(0, lengths), dtype=np.int64)
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise _unusable(f"{prefix}.idx", "does not list its sequences one after the other")
    if num_bounds < 2 or documents[0] != 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise _unusable(f"{prefix}.idx", "has no documents" if num_bounds < 2 else "has documents that do not hold all its sequences")
    ids = _mapped(prefix + ".bin", dtype)
    if len(ids) != ends[-1]:
        what = (
            f"has {ids.nbytes} bytes, but {prefix}.idx gives {ends[-1] * dtype.itemsize}: the two do not belong together, or one is cut off"
        )
        raise _unusable(f"{prefix}.bin", what)
    return IndexedFiles(ids, ends[documents])


def _mapped(path: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        require_plain(path, sys.maxsize)
        size = os.path.getsize(path)
        if size % dtype.itemsize:
            raise _unusable(path, f"has {size} bytes, which is not a whole number of ids: it seems cut off")
        # An empty file cannot be mapped.
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error


def _unusable(path: str, what: str) -> UserError:
    return UserError(
        f"{path} {what}\nan indexed data set is two files, PREFIX.idx and PREFIX.bin, as Megatron's preprocess_data.py writes them"
    )
