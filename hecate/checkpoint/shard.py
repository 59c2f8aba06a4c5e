"""Write one rank's tensors to a safetensors file and hash them, and read tensors back with their digests checked."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def layout_of(file: str, tensors: Mapping[str, Tensor], digest: str = "") -> dict[str, TensorEntry]:
    """Return the entries of tensors in a file, with this digest for all."""
    layout = {}
    for name, tensor in tensors.items():
        assert is_tensor_name(name), f"{name!r} is not a tensor name of a checkpoint"
        assert tensor.dtype in _DTYPE_NAMES, f"{name}: {tensor.dtype} cannot be stored in a checkpoint"
        assert is_shape(list(tensor.shape), _DTYPE_NAMES[tensor.dtype]), f"{name}: shape {list(tensor.shape)}"
        layout[name] = TensorEntry(file, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), digest)
    return layout


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], go_on: Callable[[], None] = lambda: None) -> dict[str, TensorEntry]:
    """Write `tensors`, of any device, to the new safetensors file `path` and fsync it. Returns the entry of each tensor.

    Tensors are copied to the CPU one at a time, so host memory peaks at one tensor, or two if it is not contiguous. They must not
    change meanwhile. Raises OSError; the caller then removes what has been written. `go_on` is called before each tensor, and may raise.
    """
    digests: dict[str, str] = {}
    layout = layout_of(path.name, tensors)
    head, offsets = file_layout(layout)

    def blocks() -> Iterator[memoryview | bytes]:
        yield head
        for name in offsets:
            go_on()
            data = _bytes_of(tensors[name].detach().cpu().contiguous())
            digests[name] = digest_of(data)
            yield data

    write_durable(path, blocks())
    return {name: TensorEntry(path.name, entry.dtype, entry.shape, digests[name]) for name, entry in layout.items()}


def read_tensors(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the named tensors of a checkpoint (None: all) on the CPU, in the order of `names`, with every digest verified.

    Any rank may read any tensor, whichever rank wrote it. Raises CheckpointError, naming file and tensor, if the checkpoint lacks a
    name, if a file's header is not the one that the manifest implies, or if a tensor's bytes have changed.
    """
    requested = list(manifest.tensors if names is None else names)
    # If all tensors are requested, the headers of files without tensors are checked, too.
    requested_in: dict[str, list[str]] = {file: [] for file in manifest.files} if names is None else {}
    for name in requested:
        if name not in manifest.tensors:
            raise CheckpointError(f"{folder}: the checkpoint holds no tensor {name!r}")
        requested_in.setdefault(manifest.tensors[name].file, []).append(name)
    found = {}
    by_file = manifest.by_file()
    for file in requested_in:
        head, offsets = file_layout(by_file[file])
        with open_inside(folder, file) as descriptor:
            on_disk = bytearray(len(head))
            read_at(descriptor, memoryview(on_disk), 0)
            if on_disk != head:
                raise CheckpointError(f"{folder / file}: its header is not the one in the manifest: the file is damaged")
            for name in requested_in[file]:
                found[name] = _read_tensor(folder, name, manifest.tensors[name], descriptor, offsets[name])
    return {name: found[name] for name in requested}


def _read_tensor(folder: Path, name: str, entry: TensorEntry, descriptor: int, offset: int) -> Tensor:
    path = folder / entry.file
    # A forged manifest may list more bytes than memory can hold, and a sparse file can have that size.
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
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
