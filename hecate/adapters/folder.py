"""Write and read adapter folders: adapter_config.json, adapter_model.safetensors and a model card, all written or none."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hecate.adapters.card import CARD, adapter_card
from hecate.adapters.description import Description
from hecate.checkpoint.shard import write_safetensors
from hecate.config.files.paths import ADAPTER_CONFIG as CONFIG
from hecate.config.files.paths import TRAINED_HINT, require_trained
from hecate.data.chat.templates import FILE
from hecate.errors import UserError
from hecate.io.durable import new_folder, write_durable
from hecate.io.plain_files import read_plain, require_plain
from hecate.io.strict_json import dump_json, parse_json

WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
CHAT_TEMPLATE = "chat_template"
_MAX_CONFIG_BYTES = 2**24
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], description: Description, card: bytes | None = None) -> None:
    """Write an adapter to the new folder `folder`.

    Args:
        tensors: all of the adapter's, under the names of its format, A and B unscaled: readers multiply by alpha / r, or with `use_rslora`
            by alpha / sqrt(r).
        card: the model card; None: that of adapters as a run leaves them.

    Raises:
        UserError: the folder exists, a tensor is not as the format has it (`Description.checked`), or the disk fails.
    """
    try:
        checked = description.checked(tensors)
    except UserError as error:
        raise UserError(f"the adapter cannot be saved to {folder}: {error}") from error

    def write_weights(staging: Path) -> Description:
        write_safetensors(staging / WEIGHTS, checked)
        return description

    write_adapter_folder(folder, write_weights, card)


def write_adapter_folder(folder: Path, write_weights: Callable[[Path], Description], card: bytes | None = None) -> None:
    """Write the files of an adapter to the new folder `folder`, all or none.

    Args:
        write_weights: writes the file with the weights into a folder, and returns the description.
        card: see `save_adapter`.

    Raises:
        UserError: the folder exists, `write_weights` raises it, or the disk fails.
    """
    refuse_existing(folder)
    try:
        with new_folder(folder) as staging:
            description = write_weights(staging)
            config = description.to_json()
            for name, content in description_files(config).items():
                write_durable(staging / name, [content])
            write_durable(staging / CARD, [adapter_card(config, description.loading) if card is None else card])
    except OSError as error:
        raise UserError(f"{folder}: the adapter cannot be written: {error.strerror}") from error


def description_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return adapter_config.json, and beside it the chat template of the training, if that was not the base model's own.

    In an adapter's description it stands among `extra`; in its folder it is the file that transformers and others look for.
    """
    extra = dict(config.get("hecate", {}).get("extra", {}))
    template = extra.pop(CHAT_TEMPLATE, None)
    if template is None:
        return {CONFIG: dump_json(dict(config))}
    return {CONFIG: dump_json({**config, "hecate": {**config["hecate"], "extra": extra}}), FILE: template.encode()}


def described_template(template: str | None) -> dict[str, Any]:
    """Return what a description has among `extra` of the chat template of the training; None or empty: it was the base model's own."""
    return {CHAT_TEMPLATE: template} if template else {}


def refuse_existing(folder: Path) -> None:
    """Raises UserError: something has the name of the folder that is to be written."""
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already, and nothing is written over; remove it or name another folder")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return an adapter folder's tensors: those of adapter_model.safetensors if it exists, otherwise of adapter_model.bin.

    Raises:
        UserError: there is neither, or as `read_finite`.
    """
    return read_finite(weights_path(folder))


def read_finite(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, of safetensors or one that torch has written.

    Raises:
        UserError: it cannot be read, or a tensor is not of finite numbers of floating point.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
            raise UserError(f"{path}: tensor {name[:200]} is {tensor.dtype}, not a dense tensor of floating point of 16 bits or more")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: tensor {name[:200]} holds NaN or infinity: the training that left it has failed")
    return tensors


def weights_path(folder: Path) -> Path:
    """Return the file with an adapter folder's weights. Raises UserError: there is none."""
    path = folder / WEIGHTS if (folder / WEIGHTS).exists() else folder / OLD_WEIGHTS
    if not path.exists():
        raise UserError(f"{folder}: holds neither {WEIGHTS} nor {OLD_WEIGHTS}")
    return path


def read_adapter_config(folder: Path) -> Any:
    """Return the JSON value of an adapter folder's adapter_config.json, of any kind of adapter.

    Raises:
        UserError: the file cannot be read.
    """
    config_path = folder / CONFIG
    try:
        return parse_json(read_plain(config_path, _MAX_CONFIG_BYTES))
    except OSError as error:
        require_trained(folder)
        raise UserError(f"{config_path}: cannot be read: {error.strerror}; is this an adapter folder?\n  {TRAINED_HINT}") from error
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from error


def peft_type_of(folder: Path) -> str | None:
    """Return which kind of adapter the folder's adapter_config.json says that it is; None: there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    if not os.path.lexists(folder / CONFIG):
        return None
    value = read_adapter_config(folder)
    return str(value.get("peft_type") if isinstance(value, dict) else None)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        require_plain(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a sound safetensors file: {str(error)[:300]}") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    """Read adapter_model.bin. Only this function opens a pickle, with torch's `weights_only` reader, which runs no code."""
    try:
        require_plain(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: refused, because it is damaged or holds more than tensors: {reason}\n"
            f"Ask its author for {WEIGHTS}, or convert it yourself on a machine where that is safe."
        ) from error
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        raise UserError(f"{path}: not a flat table of tensors by name")
    return value
