"""Write a whole model as a folder that transformers reads, file by file, with one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecate.checkpoint.layout import TensorEntry, file_layout
from hecate.checkpoint.shard import DTYPES
from hecate.errors import UserError
from hecate.io.durable import new_folder, replace_file, write_durable
from hecate.model.files.safetensors_headers import INDEX, SINGLE

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


def save_config(config: Any, folder: Path) -> None:
    """Write a model's configuration as config.json, for readers of transformers 4 and 5 alike.

    Version 5 writes `rope_parameters` alone. Version 4, and servers that read as it does, look for `rope_theta` and `rope_scaling`, and
    without them compute other logits with their defaults, and say nothing.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    value = json.loads(path.read_bytes())
    replace_file(path, [json.dumps(value | _rope_of_version_4(value), indent=2, sort_keys=True).encode() + b"\n"])


def _rope_of_version_4(value: Mapping[str, Any]) -> dict[str, Any]:
    """The keys for rotary positions that version 4 reads, for a config.json of version 5."""
    rope = value.get("rope_parameters") or {}
    keys: dict[str, Any] = {}
    if str(value.get("model_type")).startswith("gemma3") and "full_attention" in rope:  # the only family with two in version 4
        local = rope.get("sliding_attention") or {}
        keys["rope_local_base_freq"], rope = local.get("rope_theta"), rope["full_attention"]
    outside = ("rope_theta", "partial_rotary_factor")
    keys |= {name: rope.get(name) for name in outside}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {name: one for name, one in rope.items() if name not in outside}
    return {name: one for name, one in keys.items() if one is not None}


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
