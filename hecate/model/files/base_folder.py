"""What a base model's folder must not hold: what transformers would read by itself beside the weights, and sizes that nothing has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.io.plain_files import read_plain
from hecate.model.files.safetensors_headers import stored_tensors

_MOST_LAYERS, _LARGEST = 10_000, 2**31
"""The most layers of any model, and a bound of all other whole numbers in its configuration."""
_ELSEWHERE = ("transformers_weights",)
"""The keys of config.json by which transformers takes its weights from other files than those that are digested."""


def refuse_what_is_loaded_unseen(folder: Path) -> None:
    """Check that transformers loads of a model's folder what hecate has looked at, and no more.

    Raises:
        UserError: the folder holds an adapter, which transformers would apply by itself, or the configuration names other weights, or
            attention kernels that would be fetched.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: holds an adapter_config.json, by which transformers would apply an adapter to the base model unasked\n"
            "  give the base model's own folder; an adapter that training begins with is named by lora.init_from"
        )
    try:
        values = json.loads(read_plain(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong
    for key, value in values.items() if isinstance(values, dict) else ():
        fetches = key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal") and "/" in str(value)
        if key in _ELSEWHERE or fetches:
            raise UserError(f"{folder}/config.json: {key}: would have transformers load other files than the model's own\n  remove the key")


def refuse_endless_values(values: Mapping[str, Any], file: Path) -> None:
    """Check the sizes of a model before it is built, module by module, in time and memory that grow with them.

    Raises:
        UserError: a number is larger than any model's.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            refuse_endless_values(value, file)
        elif type(value) is int and (abs(value) >= _LARGEST or (key.endswith(("layers", "n_layer")) and value > _MOST_LAYERS)):
            most = _MOST_LAYERS if abs(value) < _LARGEST else _LARGEST
            raise UserError(f"{file}: {key}: {str(value)[:40]} is more than any model has (at most {most})\n  is the file damaged?")


def refuse_whole_numbers(folder: Path) -> None:
    """Check that weights are stored as floating point: transformers would take whole numbers for weights, one by one.

    Raises:
        UserError: a weight is not.
    """
    for name, entry in stored_tensors(folder).items():
        if name.endswith((".weight", ".bias")) and entry.dtype.startswith(("I", "U", "BOOL")):
            raise UserError(f"{entry.file}: {name[:200]} is stored as {entry.dtype}, and weights are floating point\n  is it quantised?")
