"""Write a whole model as a folder that transformers reads, file by file, with one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hecate.checkpoint.layout import TensorEntry, file_layout
from hecate.checkpoint.shard import DTYPES
from hecate.errors import UserError
from hecate.io.durable import new_folder, write_durable
from hecate.model.safetensors_headers import INDEX, SINGLE

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def by_file(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Return the entries of each file, in the order in which files are written."""
    files: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        files.setdefault(entry.file, {})[name] = entry
    return files


def write_model(
    folder: Path, entries: Mapping[str, TensorEntry], fetch: Callable[[str], Tensor | None], add_others: Callable[[Path], None]
) -> None:
    """Write the new folder `folder`, all of it or nothing.

    Args:
        fetch: returns a tensor on the CPU, contiguous and as its entry says. It is called once for each, file by file, in the order of
            `file_layout`.
        add_others: writes what the folder holds beside weights: configuration and tokenizer.

    Raises:
        UserError: the disk fails; the folder is then removed.
    """
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())},
        "weight_map": {name: entry.file for name, entry in entries.items()},
    }
    files = by_file(entries)
    try:
        with new_folder(folder) as staging:
            for file, inside in files.items():
                write_durable(staging / file, blocks(inside, fetch))
            if set(files) != {SINGLE}:
                write_durable(staging / INDEX, [json.dumps(index, indent=1).encode()])
            add_others(staging)
    except OSError as error:
        raise UserError(f"{folder}: the model cannot be written: {error.strerror}") from error


def blocks(inside: Mapping[str, TensorEntry], fetch: Callable[[str], Tensor | None]) -> Iterator[memoryview | bytes]:
    """Yield a safetensors file, whose tensors are fetched one at a time, as in `write_model`."""
    head, offsets = file_layout(inside)
    yield head
    for name in offsets:
        tensor = fetch(name)
        assert tensor is not None
        assert tuple(tensor.shape) == inside[name].shape, name
        assert DTYPE_NAMES[tensor.dtype] == inside[name].dtype, name
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
