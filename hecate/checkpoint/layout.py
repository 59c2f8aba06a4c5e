"""The layout of a rank's safetensors file, as a pure function of its tensors' names, dtypes and shapes.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes end to end. The layout depends
only on what the manifest lists, so a reader never parses a file's header: it builds the expected header and compares.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

ITEM_SIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""The bytes of an element, by the name that safetensors gives its type."""
MAX_DIMS = 16
_MAX_BYTES = 2**62
_TENSOR_NAME = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True)
class TensorEntry:
    """The description of one tensor of a checkpoint."""

    file: str
    """The name of the safetensors file that holds the tensor."""
    dtype: str
    """The name that safetensors gives the dtype."""
    shape: tuple[int, ...]
    digest: str
    """The xxh3_128 hash of the bytes, 32 hex digits."""

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def shard_file(rank: int, world_size: int) -> str:
    """Return the name of a rank's safetensors file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def shard_sidecar(rank: int, world_size: int) -> str:
    """Return the name of the JSON file in a staging folder that lists what a rank has written, for the committing rank."""
    return f"rank-{rank:05d}-of-{world_size:05d}.json"


def is_tensor_name(name: object) -> bool:
    """Return whether `name` can name a tensor: 1 to 512 printable ASCII characters, no blanks, not safetensors' reserved name."""
    return isinstance(name, str) and name != "__metadata__" and _TENSOR_NAME.fullmatch(name) is not None


def is_shape(shape: object, dtype: str) -> bool:
    """Return whether a tensor of `dtype` can have this shape. The strides of an empty tensor must fit in 64 bits, too."""
    return (
        isinstance(shape, list | tuple)
        and len(shape) <= MAX_DIMS
        and all(type(size) is int and 0 <= size < _MAX_BYTES for size in shape)
        and math.prod(size for size in shape if size) * ITEM_SIZE[dtype] < _MAX_BYTES
    )


def file_layout(tensors: Mapping[str, TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """Return the head (header length and header) of the file that holds exactly `tensors`, and each tensor's offset in the file.

    Tensors are sorted by item size, largest first, and then by name, so that each is aligned to its item size.
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
    """Return the size in bytes of the file that holds exactly `tensors`."""
    return len(file_layout(tensors)[0]) + sum(entry.num_bytes for entry in tensors.values())
