"""Where a tensor lies in a rank's file: the safetensors layout as a pure function of names, dtypes and shapes.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes end to end. Because
ours is a pure function of what the manifest lists, a reader never parses a file's header: it builds the one that must
be there and compares.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

ITEM_SIZE = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}  # bytes
MAX_DIMS = 16
_MAX_BYTES = 2**62
_TENSOR_NAME = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint. `dtype`: safetensors' name; `digest`: xxh3_128 of the bytes, 32 hex digits."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def shard_file(rank: int, world_size: int) -> str:
    """Name of a rank's safetensors file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def shard_sidecar(rank: int, world_size: int) -> str:
    """Name of the JSON file that tells the committing rank what a rank has written; in staging folders only."""
    return f"rank-{rank:05d}-of-{world_size:05d}.json"


def is_tensor_name(name: object) -> bool:
    """Printable ASCII without blanks, 1 to 512 characters, not the name that safetensors keeps for itself."""
    return isinstance(name, str) and name != "__metadata__" and _TENSOR_NAME.fullmatch(name) is not None


def is_shape(shape: object, dtype: str) -> bool:
    """Whether a tensor of `dtype` can have this shape; the strides of an empty one must fit in 64 bits too."""
    return (
        isinstance(shape, list | tuple)
        and len(shape) <= MAX_DIMS
        and all(type(size) is int and 0 <= size < _MAX_BYTES for size in shape)
        and math.prod(size for size in shape if size) * ITEM_SIZE[dtype] < _MAX_BYTES
    )


def file_layout(tensors: Mapping[str, TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """The head (length and header) of the file that holds exactly `tensors`, and each one's offset in the file.

    Largest items first and then by name, so that every tensor is aligned to its item size.
    """
    order = sorted(tensors, key=lambda name: (-ITEM_SIZE[tensors[name].dtype], name))
    header, offsets, end = {}, {}, 0
    for name in order:
        entry = tensors[name]
        offsets[name], end = end, end + entry.num_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def file_size(tensors: Mapping[str, TensorEntry]) -> int:
    """Bytes of the file that holds exactly `tensors`."""
    return len(file_layout(tensors)[0]) + sum(entry.num_bytes for entry in tensors.values())
