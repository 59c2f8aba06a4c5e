"""The messages of a round: the numbers of a vector that are largest in magnitude, as bytes, and back.

A message begins with a header: magic, version, type of the numbers, layout, length of the vector, count of the numbers, and a checksum of
everything else. Then comes, by the layout,

    dense      all numbers of the vector
    bitmap     one bit for each place of the vector, the lowest bit of each byte first; then the numbers whose bit is 1
    indices    the places of the numbers, 4 bytes each, ascending; then the numbers

whichever of the last two is smaller: 4 bytes for each number, or 1/8 for each place. All is little-endian. Numbers keep their type and
their bits, so a message of density 1 is the vector.

The server holds whole vectors in one process, so that the largest are found by one selection, whatever number of ranks has trained them.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
import xxhash
from torch import Tensor

from hecate.adapters.sets.sums import kept_numbers
from hecate.errors import UserError

_HEADER = struct.Struct("<4sBBBxQQ")
_SUM = struct.Struct("<Q")
_MAGIC, _VERSION = b"HECV", 1
_DTYPES = (np.dtype("<f4"), np.dtype("<f8"))
_DENSE, _BITMAP, _INDICES = range(3)
HEADER_BYTES = _HEADER.size + _SUM.size
"""of a message, before what the layout says"""
MOST_NUMBERS = 1 << 32
"""in a vector: places are sent in 4 bytes"""


def encode(vector: Tensor, density: float) -> bytes:
    """Return a message with the ⌈density · n⌉ numbers of a vector that are largest in magnitude; of equal ones the first.

    Args:
        vector: float32 or float64 [n], on any device.
        density: above 0, at most 1.

    Raises:
        UserError: `density` is out of range; or the vector has NaN or infinity, whose place in the ranking would mean nothing.
    """
    values = vector.detach().cpu().numpy()
    assert values.ndim == 1, values.shape
    assert values.dtype in _DTYPES, values.dtype
    assert len(values) < MOST_NUMBERS, len(values)
    if not np.isfinite(values).all():
        raise UserError("an update has numbers that are not finite, so it cannot be sent\n  lower learning_rate")
    numel, kept = len(values), kept_numbers(density, len(values))
    if kept == numel:
        layout, places = _DENSE, b""
    else:
        keep = _largest(np.abs(values), kept)
        if kept * 32 > numel:
            layout, places = _BITMAP, np.packbits(keep, bitorder="little").tobytes()
        else:
            layout, places = _INDICES, np.flatnonzero(keep).astype("<u4").tobytes()
        values = values[keep]
    numbers = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    header = _HEADER.pack(_MAGIC, _VERSION, _DTYPES.index(values.dtype), layout, numel, kept)
    return header + _SUM.pack(_checksum(header, places + numbers)) + places + numbers


def decode(message: bytes, numel: int) -> Tensor:
    """Return the vector of a message, [numel] on the CPU, with zeros where no number was sent.

    Nothing of the message is trusted: no memory is taken for more than `numel` numbers, and nothing is unpickled.

    Args:
        numel: the length that the receiver expects.

    Raises:
        UserError: the message is none, is damaged or incomplete, is of a vector of another length, or holds NaN or infinity.
    """
    if len(message) < HEADER_BYTES:
        raise _refused(f"it has {len(message)} bytes, and its header alone would have {HEADER_BYTES}")
    header = message[: _HEADER.size]
    magic, version, dtype, layout, length, kept = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise _refused("it does not begin as one")
    if version != _VERSION:
        raise _refused(f"it is of version {version}, and this program reads version {_VERSION}")
    if dtype >= len(_DTYPES) or layout not in (_DENSE, _BITMAP, _INDICES):
        raise _refused(f"there is no type of numbers {dtype} with the layout {layout}")
    if length != numel:
        raise _refused(f"it is of {length} numbers, and {numel} are expected")
    if kept > numel or (layout == _DENSE and kept != numel):
        raise _refused(f"it is of {kept} numbers in {numel} places")
    number = _DTYPES[dtype]
    places = {_DENSE: 0, _BITMAP: -(-numel // 8), _INDICES: 4 * kept}[layout]
    body = message[HEADER_BYTES:]
    if len(body) != places + kept * number.itemsize:
        raise _refused(f"it has {len(message)} bytes instead of {HEADER_BYTES + places + kept * number.itemsize}")
    (expected,) = _SUM.unpack(message[_HEADER.size : HEADER_BYTES])
    if _checksum(header, body) != expected:
        raise _refused("its checksum is another than that of its content")
    values = np.frombuffer(body[places:], dtype=number)
    if not np.isfinite(values).all():
        raise _refused("it has numbers that are not finite")
    vector = np.zeros(numel, dtype=number.newbyteorder("="))
    if layout == _DENSE:
        vector[:] = values
    elif layout == _BITMAP:
        bits = np.unpackbits(np.frombuffer(body[:places], dtype=np.uint8), bitorder="little")
        if int(bits.sum()) != kept or bits[numel:].any():
            raise _refused(f"its bits are not those of {kept} numbers in {numel} places")
        vector[bits[:numel].astype(bool)] = values
    else:
        index = np.frombuffer(body[:places], dtype="<u4").astype(np.int64)
        if (np.diff(index) <= 0).any() or (kept and index[-1] >= numel):
            raise _refused(f"its places are not ascending below {numel}")
        vector[index] = values
    return torch.from_numpy(vector)


def _largest(magnitudes: np.ndarray, kept: int) -> np.ndarray:
    """bool [n]: the `kept` largest, at least one and not all; of those equal to the least the first."""
    least = np.partition(magnitudes, len(magnitudes) - kept)[len(magnitudes) - kept]
    keep: np.ndarray = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)
    keep[equal[: kept - int(keep.sum())]] = True
    return keep


def _checksum(header: bytes, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(header))


def _refused(why: str) -> UserError:
    return UserError(f"a message of a federated round was refused: {why}\n  it was damaged on its way, or is none of this run's")
