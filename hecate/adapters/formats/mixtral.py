"""Whole models of Mixtral's layout, which transformers, vLLM and others read: of a run with full experts, or of a MixLoRA adapter.

While rank 0 writes what a run has trained, it fetches one expert at a time from its owner, so no rank ever holds all experts of a layer.
A MixLoRA adapter over its base model computes the same as a Mixtral: the routing is Mixtral's, over experts W + s · B A. That has as many
FFNs as there are experts, where MixLoRA has one and pairs. A folder has one file per decoder layer, and one for the other weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.adapters.adapter_format import AdapterFormat, WriteTrained
from hecate.adapters.card import CARD, full_model_card, model_card
from hecate.adapters.description import Adapter
from hecate.adapters.folder import CHAT_TEMPLATE
from hecate.adapters.formats.merged import plus_pair
from hecate.adapters.mixlora.description import MixLoraDescription, other_than_mixtrals
from hecate.adapters.mixlora.names import ATTENTION_MODULES, attention_tensor_name, expert_tensor_name, router_tensor_name
from hecate.adapters.model_files import DTYPE_NAMES, by_file, save_config, write_model
from hecate.checkpoint.layout import TensorEntry, file_layout
from hecate.config import Config, named_model
from hecate.errors import UserError
from hecate.experts.layer import MoeLayer
from hecate.io.durable import write_durable
from hecate.model.base import BaseModel
from hecate.model.files.load import base_of, save_tokenizer
from hecate.model.files.stored_model import StoredModel, open_stored
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel
from hecate.parallel.comm.aborts import arrived
from hecate.parallel.values.units import Unit
from hecate.ranks.backend import is_nccl
from hecate.ranks.ranks import Ranks

_DENSE_TYPES = ("llama", "mistral")
"""the dense model types whose layers, apart from the experts, are the same as Mixtral's"""
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"),
)
MIXTRAL_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""what Mixtral calls the matrices of an expert"""
_PROJECTIONS = {part: projection for projection, part in MIXTRAL_PARTS.items()}
_GATE = "block_sparse_moe.gate.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


class Mixtral(AdapterFormat):
    """A whole model of Mixtral's layout."""

    name = "mixtral"
    what = "a whole model"
    holds = (MixLoraDescription,)

    def output(self, config: Config, base: BaseModel) -> WriteTrained:
        """Raises UserError: the model cannot be written as a Mixtral."""
        experts = config.moe.experts_per_layer(len(decoder_layers(base.model)[1]))
        dense: Any = base.model.config
        described = mixtral_config(dense, experts, config.moe.experts_per_token, config.moe.router_aux_loss_coef)
        card = full_model_card(config, named_model(config.model.name_or_path), described.num_local_experts)
        description = MixtralFolder(described, base.tokenizer, next(base.model.parameters()).dtype, card)
        return lambda folder, moe, ranks: export_mixtral(folder, description, dense_weights(base.model), moe, ranks)

    def export(self, adapter: Adapter, out: Path) -> list[str]:
        assert isinstance(adapter.description, MixLoraDescription)
        base = open_stored(base_of(adapter.folder, adapter.description.base_model_name_or_path))
        return write_mixtral(out, base, adapter.tensors, adapter.description)


FORMAT = Mixtral()


@dataclass(frozen=True)
class MixtralFolder:
    """The description of the folder: the model's configuration and the type of its weights."""

    config: Any
    """a transformers MixtralConfig"""
    tokenizer: Any
    dtype: torch.dtype
    """the type of all weights"""
    card: bytes
    """README.md"""


def mixtral_config(dense: Any, experts_per_layer: tuple[int, ...], top_k: int, aux_loss_coef: float) -> Any:
    """Return the transformers MixtralConfig of a dense model with experts in its layers.

    Raises:
        UserError: the model cannot be written as a Mixtral; the text gives the reasons.
    """
    from transformers import MixtralConfig

    reasons = []
    if dense.model_type not in _DENSE_TYPES:
        reasons.append(f"the base model is a {dense.model_type}, and only {' and '.join(_DENSE_TYPES)} become Mixtral")
    if len(set(experts_per_layer)) != 1:
        reasons.append("moe.num_experts differs between layers, which a Mixtral cannot")
    if getattr(dense, "attention_bias", False) or getattr(dense, "mlp_bias", False):
        reasons.append("the base model has biases")
    if reasons:
        raise UserError("the model cannot be written as a Mixtral: " + "; ".join(reasons))
    same = {name: getattr(dense, name) for name in _SAME if getattr(dense, name, None) is not None or name.endswith("token_id")}
    experts = {"num_local_experts": experts_per_layer[0], "num_experts_per_tok": top_k, "router_aux_loss_coef": aux_loss_coef}
    return MixtralConfig(**same, **experts, architectures=["MixtralForCausalLM"])


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights outside routers and experts by their names in the model. A tied weight is returned once."""
    routed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoeLayer))
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not name.startswith(routed)}


def export_mixtral(folder: Path, description: MixtralFolder, dense: Mapping[str, Tensor], moe: MoeModel, ranks: Ranks) -> None:
    """Write the model to the new folder `folder`. Every rank must call it.

    Args:
        dense: the weights outside routers and experts, by Mixtral's names; rank 0's are written.

    Raises:
        UserError: the disk fails; the folder is then removed.
    """
    entries = _entries(description, dense, moe)
    fetch = _Fetch(description.dtype, dense, moe, ranks)
    if not ranks.is_first:
        for inside in by_file(entries).values():
            for name in file_layout(inside)[1]:
                fetch(name)
        return

    def add_others(staging: Path) -> None:
        description.config.dtype = description.dtype
        save_config(description.config, staging)
        description.tokenizer.save_pretrained(staging)
        write_durable(staging / CARD, [description.card])

    write_model(folder, entries, fetch, add_others)


def _entries(description: MixtralFolder, dense: Mapping[str, Tensor], moe: MoeModel) -> dict[str, TensorEntry]:
    """Return the entry of every tensor of the folder. It is the same on every rank."""
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    for unit in moe.layers:
        family = moe.engine.shards.families[unit]
        prefix = f"model.layers.{unit.layer}.block_sparse_moe"
        shapes[f"{prefix}.gate.weight"] = tuple(moe.routers[unit].shape)
        for expert in range(family.num_experts):
            for spec in family.layout().trainable:
                shapes[f"{prefix}.experts.{expert}.{MIXTRAL_PARTS[spec.name]}.weight"] = spec.shape
    return file_by_layer(shapes, len(moe.layers), description.dtype)


def file_by_layer(shapes: Mapping[str, tuple[int, ...]], layers: int, dtype: torch.dtype) -> dict[str, TensorEntry]:
    """Return the entries of a model's tensors: one file for each decoder layer, and one for the other weights."""

    def file_of(name: str) -> str:
        match = _LAYER.match(name)
        number = 1 if match is None else 2 + int(match[1])
        return f"model-{number:05d}-of-{1 + layers:05d}.safetensors"

    return {name: TensorEntry(file_of(name), DTYPE_NAMES[dtype], shape, digest="") for name, shape in sorted(shapes.items())}


class _Fetch:
    """A function that returns a named tensor of the folder on rank 0, and None on other ranks.

    Every rank must call it for the same names in the same order.
    """

    def __init__(self, dtype: torch.dtype, dense: Mapping[str, Tensor], moe: MoeModel, ranks: Ranks) -> None:
        self._dtype, self._dense, self._moe, self._ranks = dtype, dense, moe, ranks
        self._chunk: tuple[tuple[Unit, int], Tensor | None] | None = None
        """the last requested expert and its chunk"""

    def __call__(self, name: str) -> Tensor | None:
        match = _EXPERT.fullmatch(name)
        if match is None:
            tensor: Tensor | None = self._router_or_dense(name)
        else:
            key = Unit(int(match[1])), int(match[2])
            if self._chunk is None or self._chunk[0] != key:
                self._chunk = key, expert_on_first(self._moe, *key, self._ranks)
            tensor = None if self._chunk[1] is None else self._part(key[0], match[3], self._chunk[1])
        return None if tensor is None or not self._ranks.is_first else tensor.detach().to("cpu", self._dtype).contiguous()

    def _router_or_dense(self, name: str) -> Tensor:
        if name.endswith(_GATE):
            match = _LAYER.match(name)
            assert match is not None
            return self._moe.routers[Unit(int(match[1]))]
        return self._dense[name]

    def _part(self, unit: Unit, part: str, chunk: Tensor) -> Tensor:
        specs = self._moe.engine.shards.families[unit].layout().trainable
        parts = dict(zip((MIXTRAL_PARTS[spec.name] for spec in specs), chunk.split([spec.numel for spec in specs]), strict=True))
        shapes = {MIXTRAL_PARTS[spec.name]: spec.shape for spec in specs}
        return parts[part].view(shapes[part])


def expert_on_first(moe: MoeModel, unit: Unit, expert: int, ranks: Ranks) -> Tensor | None:
    """Return an expert's master chunk, [C], on rank 0 and None on other ranks. Every rank must call it."""
    if not moe.engine.shards.in_first_group:
        return None
    store, owner = moe.engine.shards.stores[unit], int(moe.engine.shards.owners[unit][expert])
    mine = store.owned[store.experts.index(expert)].detach() if owner == moe.engine.shards.rank else None
    if owner == 0:
        return mine
    carrier = ranks.device if is_nccl(ranks.groups.tokens) else "cpu"  # gloo has no messages of GPU tensors
    if mine is not None:
        dist.send(mine.contiguous().to(carrier), group_dst=0, group=ranks.groups.tokens)
    if not ranks.is_first:
        return None
    chunk = store.owned.new_empty(store.chunk_numel, device=carrier)
    dist.recv(chunk, group_src=owner, group=ranks.groups.tokens)
    return arrived(chunk, ranks.groups.tokens)


def mixtral_of(config: MixLoraDescription, base: StoredModel) -> Any:
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


def write_mixtral(folder: Path, base: StoredModel, tensors: Mapping[str, Tensor], config: MixLoraDescription) -> list[str]:
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


def _shapes(base: StoredModel, tensors: Mapping[str, Tensor], config: MixLoraDescription, *, tied: bool) -> dict[str, tuple[int, ...]]:
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


def _weight(name: str, reader: _LastRead, tensors: Mapping[str, Tensor], config: MixLoraDescription) -> Tensor:
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
