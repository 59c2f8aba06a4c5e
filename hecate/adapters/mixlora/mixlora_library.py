"""Write a MixLoRA adapter as the `mixlora` and `moe-peft` libraries load it: adapter_config.json and adapter_model.bin.

What a run leaves has the same configuration and tensors in adapter_model.safetensors, which neither library reads. Both libraries apply
dropout in inference, too, and fail for a dropout of 0, so that their key says 1e-9 (`hecate.adapters.mixlora.config.config_to_json`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.card import CARD, Loading, adapter_card
from hecate.adapters.folder import OLD_WEIGHTS, description_files, write_folder
from hecate.adapters.mixlora.config import AdapterConfig, config_to_json
from hecate.adapters.mixlora.mixlora_as_mixtral import other_than_mixtrals

BASES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "phi", "phi3")
"""transformers' types of the models that the libraries know"""
_LOADING = Loading(
    "mixlora",
    ("lora", "mixlora", "mixture-of-experts"),
    "With the `mixlora` library; hecate's tests compare the logits of version 0.2.3:\n\n"
    "    from mixlora import MixLoraModelForCausalLM\n"
    "    model, config = MixLoraModelForCausalLM.from_pretrained(FOLDER)\n\nWith hecate:\n\n    hecate generate FOLDER 'What is FSSDP?'",
)


def not_for_libraries(config: AdapterConfig, model_type: str) -> str:
    """Return why the libraries cannot hold an adapter; empty: they can."""
    if len(set(config.experts_per_layer)) > 1:
        return "its layers differ in their number of experts, and the libraries know one number for all"
    if different := other_than_mixtrals(config):
        return f"its routers choose otherwise than the libraries' own ({different})"
    if model_type not in BASES:
        return f"its base model is a {model_type}, and the libraries know {', '.join(BASES)}"
    return ""


def write_library_folder(folder: Path, tensors: Mapping[str, Tensor], config: AdapterConfig) -> None:
    """Write the new folder `folder`, all of it or nothing.

    Raises:
        UserError: the folder exists, or the disk fails.
    """
    value = config_to_json(config)
    buffer = io.BytesIO()
    torch.save({name: tensor.float().contiguous() for name, tensor in tensors.items()}, buffer)
    write_folder(folder, {OLD_WEIGHTS: buffer.getvalue(), CARD: adapter_card(value, _LOADING), **description_files(value)})
