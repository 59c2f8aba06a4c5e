"""A model's weights by name, read one at a time from its files; a GGUF file, which has names of its own, is loaded whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hecate.errors import UserError
from hecate.io.plain_files import require_plain
from hecate.model.files.gguf_files import one_gguf_reader
from hecate.model.files.load import ModelSource, load_model, read_config
from hecate.model.files.read_experts import DTYPES
from hecate.model.files.safetensors_headers import SINGLE, stored_tensors


@dataclass(frozen=True)
class StoredWeight:
    """One weight."""

    file: str
    """The name of the file that holds the weight."""
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredModel:
    """The weights of a model and what else its folder holds. No weight is in memory, unless the model is a GGUF file."""

    source: ModelSource
    config: Any
    """The model's configuration as transformers has it."""
    weights: Mapping[str, StoredWeight]
    read: Callable[[str], Tensor]
    """Reads a weight by its name, on the CPU."""


def open_stored(source: ModelSource) -> StoredModel:
    """Return the model's weights as they are stored. Raises UserError: a file cannot be read, or holds weights that are quantised."""
    if source.gguf_file is not None:
        with one_gguf_reader(source.gguf_file):
            model = load_model(source, torch.float32, torch.device("cpu"))
        config: Any = model.config
        config.architectures = [type(model).__name__]  # which a GGUF file does not say, and readers of a model's folder look for
        held = dict(model.named_parameters())
        weights = {name: StoredWeight(SINGLE, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
        return StoredModel(source, config, weights, lambda name: held[name].detach())
    entries = stored_tensors(source.folder)
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file}: {name} is stored as {entry.dtype}: quantised models cannot be changed\n"
                f"  take a checkpoint in {', '.join(sorted(DTYPES))}, or dequantise this one and save it anew"
            )

    def read(name: str) -> Tensor:
        try:
            require_plain(entries[name].file, sys.maxsize)
            with safe_open(entries[name].file, "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{entries[name].file}: {name} cannot be read: {str(error)[:300]}") from error

    weights = {name: StoredWeight(entry.file.name, entry.shape, DTYPES[entry.dtype]) for name, entry in entries.items()}
    return StoredModel(source, read_config(source), weights, read)
