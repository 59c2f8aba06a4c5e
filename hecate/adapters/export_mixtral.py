"""Write a model with full experts as a Hugging Face folder of Mixtral's layout, which transformers, vLLM and others read.

While rank 0 writes, it fetches one expert at a time from its owner, so no rank ever holds all experts of a layer. The folder has one
file per decoder layer, and one for the other weights.
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

from hecate.adapters.card import CARD
from hecate.adapters.model_files import DTYPE_NAMES, by_file, save_config, write_model
from hecate.checkpoint.layout import TensorEntry, file_layout
from hecate.errors import UserError
from hecate.experts.layer import MoeLayer
from hecate.io.durable import write_durable
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
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


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
        if name.endswith(".block_sparse_moe.gate.weight"):
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
