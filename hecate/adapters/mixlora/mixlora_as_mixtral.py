"""Write a MixLoRA adapter and its base model as a Mixtral, which computes the same: its routing is Mixtral's, over experts W + s · B A.

It has as many FFNs as there are experts, where MixLoRA has one and pairs. Base and result are read and written tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hecate.adapters.card import CARD, model_card
from hecate.adapters.export_mixtral import MIXTRAL_PARTS, file_by_layer, mixtral_config
from hecate.adapters.folder import CHAT_TEMPLATE
from hecate.adapters.merge import plus_pair
from hecate.adapters.mixlora.config import AdapterConfig
from hecate.adapters.mixlora.names import ATTENTION_MODULES, attention_tensor_name, expert_tensor_name, router_tensor_name
from hecate.adapters.model_files import save_config, write_model
from hecate.config import RouterConfig
from hecate.errors import UserError
from hecate.io.durable import write_durable
from hecate.model.files.load import save_tokenizer
from hecate.model.files.stored_model import StoredModel

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_PROJECTIONS = {part: projection for projection, part in MIXTRAL_PARTS.items()}
_GATE = "block_sparse_moe.gate.weight"


def other_than_mixtrals(config: AdapterConfig) -> str:
    """Return what of an adapter's routing is not Mixtral's: the k largest of a softmax, renormalised, and nothing else. Empty: nothing."""
    choices, usual = config.router, RouterConfig()
    # How a router was trained does not matter, and a dense one chooses all, which is a choice of the k largest, too.
    dense = choices.dense and config.top_k != max(config.experts_per_layer)
    asked = replace(choices, bias_rate=usual.bias_rate, balance=usual.balance, dense=dense)
    different = {key: value for key, value in vars(asked).items() if value != getattr(usual, key)}
    return ", ".join(f"moe.router.{key}: {value}" for key, value in different.items())


def mixtral_of(config: AdapterConfig, base: StoredModel) -> Any:
    """Return the configuration of the Mixtral.

    Raises:
        UserError: the model cannot be written as a Mixtral; the text gives the reasons.
    """
    if different := other_than_mixtrals(config):
        raise UserError(f"the model cannot be written as a Mixtral: its routers choose otherwise ({different})")
    described = mixtral_config(base.config, config.experts_per_layer, config.top_k, config.extra.get("router_aux_loss_coef", 0.001))
    if config.num_layers > base.config.num_hidden_layers:
        raise UserError(f"is for {config.num_layers} layers, but the base model has {base.config.num_hidden_layers}")
    described.num_hidden_layers = config.num_layers
    return described


def write_mixtral(folder: Path, base: StoredModel, tensors: Mapping[str, Tensor], config: AdapterConfig) -> list[str]:
    """Write the new folder `folder`; what the user should know, line by line.

    Raises:
        UserError: the model cannot be written as a Mixtral, a weight is missing or has another shape than the adapter is for, or the disk
            fails.
    """
    described = mixtral_of(config, base)
    shapes = _shapes(base, tensors, config, tied=described.tie_word_embeddings)
    dtype = base.weights["model.embed_tokens.weight"].dtype
    reader = _LastRead(base)

    def fetch(name: str) -> Tensor:
        return _weight(name, reader, tensors, config).to(dtype).contiguous()

    def add_others(staging: Path) -> None:
        described.dtype = dtype
        save_config(described, staging)
        save_tokenizer(base.source, staging, config.extra.get(CHAT_TEMPLATE))
        write_durable(staging / CARD, [card])

    kind = f"{config.experts_per_layer[0]} experts for each layer, of which a token goes to {config.top_k}"
    facts = {
        "base model": config.base_model_name_or_path,
        "was": f"a MixLoRA adapter of rank {config.r} over it",
        "is": f"a Mixtral with {kind}",
    }
    how = (
        "As any Mixtral, with transformers. Servers that read Mixtral should take it, too, but none of them has been run with such a model."
    )
    card = model_card(config.base_model_name_or_path, how, facts, ("mixtral", "mixlora", "mixture-of-experts"))
    write_model(folder, file_by_layer(shapes, config.num_layers, dtype), fetch, add_others)
    notes = [f"a Mixtral with {kind}"]
    if dtype.itemsize < 4:
        notes.append(
            f"  routers were trained in float32 and are written in {str(dtype).removeprefix('torch.')}: near ties they may choose otherwise"
        )
    return notes


def _shapes(base: StoredModel, tensors: Mapping[str, Tensor], config: AdapterConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the Mixtral, by name. Raises UserError: the base lacks a weight, or one has another shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in base.weights.items():
        match = _LAYER.fullmatch(name)
        dropped = match is not None and (int(match[1]) >= config.num_layers or match[2].startswith("mlp."))
        if not (dropped or name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")):
            shapes[name] = weight.shape
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for module in (*ATTENTION_MODULES, *MIXTRAL_PARTS):
            inside = f"{'self_attn' if module in ATTENTION_MODULES else 'mlp'}.{module}"
            name = f"{prefix}.{inside}.weight"
            if name not in base.weights:
                raise UserError(f"the base model has no weight {name}")
            found = base.weights[name].shape
            for expert in range(config.experts_per_layer[layer] if module in MIXTRAL_PARTS else 1):
                if module in config.target_modules:
                    name_a, name_b = _names(layer, module, expert)
                    wanted = len(tensors[name_b]), tensors[name_a].shape[1]
                    if wanted != found:
                        raise UserError(
                            f"{name_a} and its B are for a weight {list(wanted)}, but {name} of the base model is {list(found)}"
                        )
                if module in MIXTRAL_PARTS:
                    shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{MIXTRAL_PARTS[module]}.weight"] = found
        shapes[f"{prefix}.{_GATE}"] = tuple(tensors[router_tensor_name(layer)].shape)
    return shapes


def _weight(name: str, reader: _LastRead, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    if match := _EXPERT.fullmatch(name):
        layer, expert, module = int(match[1]), int(match[2]), _PROJECTIONS[match[3]]
        weight = reader(f"model.layers.{layer}.mlp.{module}.weight")
    elif match := _LAYER.fullmatch(name):
        layer, expert, inside = int(match[1]), 0, match[2]
        if inside == _GATE:
            return tensors[router_tensor_name(layer)]
        weight, module = reader(name), inside.removesuffix(".weight").rpartition(".")[2]
    else:
        return reader(name)
    if module not in config.target_modules:
        return weight
    name_a, name_b = _names(layer, module, expert)
    return plus_pair(weight, tensors[name_a], tensors[name_b], config.scale)


def _names(layer: int, module: str, expert: int) -> tuple[str, str]:
    """A and B of a linear of attention, or of an expert's projection."""
    if module in ATTENTION_MODULES:
        return attention_tensor_name(layer, module, "A"), attention_tensor_name(layer, module, "B")
    return expert_tensor_name(layer, module, expert, "A"), expert_tensor_name(layer, module, expert, "B")


class _LastRead:
    """Reads weights of the base model, and keeps the three matrices of the last FFN, which all experts of a layer begin with."""

    def __init__(self, base: StoredModel) -> None:
        self._base = base
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if ".mlp." not in name:
            return self._base.read(name)
        if name not in self._kept:
            layer = name.partition(".mlp.")[0]
            self._kept = {kept: tensor for kept, tensor in self._kept.items() if kept.startswith(f"{layer}.mlp.")}
            self._kept[name] = self._base.read(name)
        return self._kept[name]
