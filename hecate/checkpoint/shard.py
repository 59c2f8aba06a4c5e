"""One rank's tensors on disk: hashed as they are written, read back against the digests."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hecate.checkpoint.files import CheckpointError, open_inside, read_at
from hecate.checkpoint.layout import TensorEntry, file_layout, is_shape, is_tensor_name
from hecate.checkpoint.manifest import Manifest, digest_of
from hecate.io.durable import write_durable

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Write `tensors`, of any device, to the new safetensors file `path` and fsync it. Returns each one's entry.

    Tensors are brought to the CPU one at a time, so host memory peaks at one tensor, two if it is not contiguous. They
    must not change meanwhile. Raises OSError; what it has written is then left to the caller.
    """
    digests: dict[str, str] = {}
    layout = {}
    for name, tensor in tensors.items():
        assert is_tensor_name(name), f"{name!r} is not a tensor name of a checkpoint"
        assert tensor.dtype in _DTYPE_NAMES, f"{name}: {tensor.dtype} has no place in a checkpoint"
        assert is_shape(list(tensor.shape), _DTYPE_NAMES[tensor.dtype]), f"{name}: shape {list(tensor.shape)}"
        layout[name] = TensorEntry(path.name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), digest="")
    head, offsets = file_layout(layout)

    def blocks() -> Iterator[memoryview | bytes]:
        yield head
        for name in offsets:
            data = _bytes_of(tensors[name].detach().cpu().contiguous())
            digests[name] = digest_of(data)
            yield data

    write_durable(path, blocks())
    return {name: TensorEntry(path.name, entry.dtype, entry.shape, digests[name]) for name, entry in layout.items()}


def read_tensors(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint (None: all), on the CPU, in the order of `names`, every digest verified.

    A rank may ask for any names, whoever wrote them. Raises CheckpointError, naming file and tensor, for a name that
    the checkpoint does not hold, a file whose header is not the one that the manifest implies, and a tensor whose bytes
    have changed.
    """
    wanted = list(manifest.tensors if names is None else names)
    # With all tensors asked for, the headers of files without any are checked too.
    wanted_in: dict[str, list[str]] = {file: [] for file in manifest.files} if names is None else {}
    for name in wanted:
        if name not in manifest.tensors:
            raise CheckpointError(f"{folder}: the checkpoint holds no tensor {name!r}")
        wanted_in.setdefault(manifest.tensors[name].file, []).append(name)
    found = {}
    by_file = manifest.by_file()
    for file in wanted_in:
        head, offsets = file_layout(by_file[file])
        with open_inside(folder, file) as descriptor:
            on_disk = bytearray(len(head))
            read_at(descriptor, memoryview(on_disk), 0)
            if on_disk != head:
                raise CheckpointError(f"{folder / file}: its header is not the one in the manifest: the file is damaged")
            for name in wanted_in[file]:
                found[name] = _read_tensor(folder, name, manifest.tensors[name], descriptor, offsets[name])
    return {name: found[name] for name in wanted}


def _read_tensor(folder: Path, name: str, entry: TensorEntry, descriptor: int, offset: int) -> Tensor:
    path = folder / entry.file
    # A manifest may promise more than memory can hold, and a file with holes seems to keep the promise.
    if entry.num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise CheckpointError(f"{path}: tensor {name}: no memory for {entry.num_bytes} bytes")
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    data = _bytes_of(tensor)
    count = read_at(descriptor, data, offset)
    if count != entry.num_bytes or digest_of(data) != entry.digest:
        raise CheckpointError(
            f"{path}: tensor {name} does not have the bytes that were saved (its digest differs).\n"
            "Resume from an earlier checkpoint, or restore this one from a copy."
        )
    return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, not a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
