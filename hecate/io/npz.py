"""Read arrays of numbers from .npz files that others have written, without believing what their headers promise."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from hecate.errors import UserError
from hecate.io.plain_files import open_plain

_LARGEST_RATIO = 1040
"""The most bytes that deflate can make of one packed byte, rounded up."""
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The methods by which numpy packs; others have no such bound."""


class ArrayError(UserError):
    """The data are no arrays of numbers; the text says why, and not of which file."""


def read_npz(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the named arrays of a file. Nothing is unpickled, and others are not read.

    Memory is taken for an array only if the packed bytes can be those of so many numbers, and all fit into a quarter of the machine's.

    Raises:
        OSError: the file cannot be opened.
        ArrayError: it is no such file, damaged, lacks an array, or an array is too large or of Python objects.
    """
    with open_plain(path) as file:
        try:
            with zipfile.ZipFile(file) as packed:
                sizes = {name: _checked(packed, name) for name in names}
                require_array_room(sum(sizes.values()))
                return {name: _read(packed, name) for name in names}
        except ArrayError:
            raise
        except Exception as error:  # zipfile, zlib, numpy and ast raise errors of ten classes on damaged files
            raise ArrayError(_reason(error)) from error


def array_of(data: bytes) -> np.ndarray:
    """Return the array that the bytes of a .npy file hold. Raises ArrayError: they are none, or hold Python objects."""
    stream = io.BytesIO(data)
    shape, dtype = header_of(stream)
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ArrayError(f"it has {math.prod(shape) * dtype.itemsize} bytes by its header, which are not there")
    stream.seek(0)
    try:
        return np.asarray(npy.read_array(stream, allow_pickle=False))
    except Exception as error:
        raise ArrayError(_reason(error)) from error


def require_array_room(num_bytes: int) -> None:
    """Raises ArrayError: arrays of so many bytes are more than a quarter of the machine's memory."""
    if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4:
        raise ArrayError(f"its arrays have {num_bytes} bytes, more than a quarter of the memory of this machine")


def header_of(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type that the header of a .npy file says; the stream stands behind it then.

    Raises:
        ArrayError: it is no such header, or one of Python objects.
    """
    try:
        version = npy.read_magic(stream)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shape, _, dtype = readers[version](stream)
    except Exception as error:  # numpy reads it by Python's own parser
        raise ArrayError(_reason(error)) from error
    if dtype.hasobject:
        raise ArrayError("it holds Python objects, which are not read")
    if any(size < 0 for size in shape):
        raise ArrayError(f"an array has the shape {str(shape)[:100]}")
    return shape, dtype


def _checked(packed: zipfile.ZipFile, name: str) -> int:
    """The bytes of an array's numbers."""
    try:
        info = packed.getinfo(f"{name}.npy")
    except KeyError:
        found = ", ".join(member.removesuffix(".npy")[:40] for member in packed.namelist()[:8]) or "none"
        raise ArrayError(f"it has no array {name!r}, but {found}") from None
    if info.compress_type not in _KINDS:
        raise ArrayError(f"array {name!r} is packed in another way than numpy's")
    with packed.open(info) as stream:
        shape, dtype = header_of(stream)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > min(info.file_size, _LARGEST_RATIO * info.compress_size):
        raise ArrayError(f"array {name!r} has {num_bytes} bytes by its header, which are not in the file")
    return num_bytes


def _read(packed: zipfile.ZipFile, name: str) -> np.ndarray:
    with packed.open(f"{name}.npy") as stream:
        return np.asarray(npy.read_array(stream, allow_pickle=False))


def _reason(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
