"""Read the names and shapes of a base model's tensors from the headers of safetensors folders and GGUF files. Nothing is loaded."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.io.foreign_errors import reading
from hecate.io.plain_files import open_plain, read_plain_text
from hecate.io.strict_yaml import parse_yaml
from hecate.model.files.base_folder import refuse_endless_values
from hecate.model.files.safetensors_headers import StoredTensor, stored_tensors

_GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, outputs first, by the names of transformers.

    Args:
        path: see `hecate.config.find_model`, without weights.

    Raises:
        UserError: a file cannot be read or is damaged.
    """
    if path.suffix == ".gguf":
        return _of_gguf(path)
    return {name: entry.shape for name, entry in tensors_of(path).items()}


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model by its name: those of a folder's files, or, where there are only sizes, those that transformers would make.

    Args:
        path: a folder with config.json, or a file like that one.

    Raises:
        UserError: a file cannot be read or is damaged, or transformers knows no such model.
    """
    if path.is_dir() and any(path.glob("*.safetensors")):
        return stored_tensors(path)
    return _of_sizes(path)


def model_config(path: Path) -> dict[str, Any]:
    """The values of a model's config.json, in a folder or in a file of another name. Raises UserError: it cannot be read."""
    file = path / "config.json" if path.is_dir() else path
    try:
        text = read_plain_text(file)
        value = json.loads(text) if file.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold the sizes of a model, as transformers' config.json does")
    return value


def _of_sizes(path: Path) -> dict[str, StoredTensor]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = model_config(path)
    kind = values.pop("model_type", None)
    refuse_endless_values(values, path)
    with reading(path, f"no model of type {kind} can be made of these sizes"), torch.device("meta"):
        config = AutoConfig.for_model(kind, **values)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return {name: StoredTensor(path, "BF16", shapes[name], 0) for name in sorted(shapes)}  # sorted as in files


def _of_gguf(path: Path) -> dict[str, tuple[int, ...]]:
    """Read a header of version 2 or 3: keys and values, which are skipped, then the tensors' names and sizes."""
    try:
        with open_plain(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, version, num_tensors, num_keys = struct.unpack_from("<4sIQQ", data)
            if magic != b"GGUF" or version not in (2, 3):
                raise UserError(f"{path}: not a GGUF file of version 2 or 3")
            at = 24
            for _ in range(num_keys):
                at = _after_value(data, *_after_type(data, _after_string(data, at)))
            shapes = {}
            for _ in range(num_tensors):
                end = _after_string(data, at)
                name = data[at + 8 : end].decode("utf-8")
                (dims,) = struct.unpack_from("<I", data, end)
                sizes = struct.unpack_from(f"<{dims}Q", data, end + 4)
                shapes[_transformers_name(name)] = tuple(reversed(sizes))
                at = end + 4 + 8 * dims + 12
            return shapes
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, KeyError, OverflowError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a GGUF file, or damaged: {str(error)[:300]}") from error


def _after_string(data: mmap.mmap, at: int) -> int:
    (size,) = struct.unpack_from("<Q", data, at)
    if at + 8 + size > len(data):
        raise ValueError("a text ends beyond the file")
    return int(at + 8 + size)


def _after_type(data: mmap.mmap, at: int) -> tuple[int, int]:
    (kind,) = struct.unpack_from("<I", data, at)
    return kind, at + 4


def _after_value(data: mmap.mmap, kind: int, at: int) -> int:
    if kind == _GGUF_STRING:
        return _after_string(data, at)
    if kind != _GGUF_ARRAY:
        return at + _GGUF_SCALAR_BYTES[kind]
    item, at = _after_type(data, at)
    (count,) = struct.unpack_from("<Q", data, at)
    at += 8
    if item in _GGUF_SCALAR_BYTES:
        return int(at + count * _GGUF_SCALAR_BYTES[item])
    for _ in range(count):
        at = _after_value(data, item, at)
    return at


def _transformers_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        return {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}.get(name, name)
    layer, module, kind = match.groups()
    return f"model.layers.{layer}.{_GGUF_NAMES.get(module, module)}.{kind}"


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
