"""Tiny random models and adapters for `benchmarks.peers.reading`, and what they compute by PEFT and by hecate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hecate.adapters.folder import save_adapter
from hecate.adapters.mixlora.description import MixLoraDescription, expected_shapes
from hecate.apps.answers.opened import load_trained
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import join_ranks
from testing.byte_tokenizer import build_byte_tokenizer

LAYERS, EXPERTS, RANK = 2, 5, 4
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 258,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
MOE_KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
}
DENSE_KINDS = ("llama", "mistral", "qwen2")


def save_moe_lora(kind: str, folder: Path, alpha: int) -> Any:
    """Save a model and PEFT's adapter of its experts and attention in `folder`/model and `folder`/adapter; PEFT's model of both."""
    from peft import LoraConfig, get_peft_model

    _save_model(kind, folder / "model", MOE_KINDS[kind])
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, experts_implementation="eager")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    modules = ["q_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules, target_parameters=parameters)
    adapted = get_peft_model(base, config).eval()
    random = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=random)
    adapted.save_pretrained(folder / "adapter")
    return adapted


def expected_changes(adapted: Any, model: Path) -> dict[str, Tensor]:
    """Return what merging, by PEFT, adds to each weight: LAYER.PART of the attention, LAYER.PART.EXPERT of the experts."""
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).state_dict()
    changes = {}
    for name, after in adapted.merge_and_unload().state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        change = after - before[name]
        if parts[-1] == "gate_up_proj":
            for expert, both in enumerate(change):
                changes[f"{parts[2]}.gate_proj.{expert}"], changes[f"{parts[2]}.up_proj.{expert}"] = both.chunk(2)
        elif parts[-1] == "down_proj":
            changes |= {f"{parts[2]}.down_proj.{expert}": one for expert, one in enumerate(change)}
        elif parts[-1] in ("q_proj", "v_proj", "o_proj"):
            changes[f"{parts[2]}.{parts[-1]}"] = change
        else:
            assert not change.any(), name
    return changes


def save_mixture(kind: str, folder: Path) -> None:
    """Save a dense model and hecate's mixture of experts over its FFNs in `folder`/model and `folder`/adapter."""
    model = _save_model(kind, folder / "model", {})
    config = MixLoraDescription(
        base_model_name_or_path=str(folder / "model"),
        r=RANK,
        alpha=6,
        dropout=0.1,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        num_layers=LAYERS,
        num_experts=3,
        top_k=2,
        act_fn="silu",
    )
    random = torch.Generator().manual_seed(3)
    heads = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj"}
    sizes = {"hidden": model.config.hidden_size, "ffn": model.config.intermediate_size}
    attention = model.model.layers[0].self_attn

    def size(wanted: int | str) -> int:
        if isinstance(wanted, int):
            return wanted
        first = wanted.split()[0]
        if first in heads:
            return int(getattr(attention, first).out_features)
        return int(attention.o_proj.in_features) if first == "o_proj" else sizes[first]

    tensors = {name: 0.3 * torch.randn([size(one) for one in shape], generator=random) for name, shape in expected_shapes(config)}
    save_adapter(folder / "adapter", tensors, config)


def hecate_logits(folder: Path, ids: Tensor) -> Tensor:
    """What hecate computes with an adapter and its base model, in float64, for one row of tokens."""
    with join_ranks() as ranks:
        base, moe = load_trained(folder, ranks, BaseChoice(dtype="float64", kernels="torch"))
        with moe.engine.evaluation(), torch.no_grad():
            return base.head.logits(base.head.hidden(ids, None, torch.arange(ids.shape[1])[None]))


def _save_model(kind: str, folder: Path, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_SIZES, **changes}), dtype=torch.float32)
    model.save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return model
