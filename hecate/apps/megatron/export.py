"""A model of Megatron's under the names and in the layout of transformers' Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hecate.adapters.card import full_model_card
from hecate.adapters.formats.mixtral import MixtralFolder, export_mixtral
from hecate.adapters.trained_output import TrainedOutput
from hecate.apps.megatron.front_end import MegatronModel
from hecate.apps.megatron.gpt import INIT_STD, NORM_EPS, ROTARY_BASE
from hecate.config import Config
from hecate.config.gpt_shape import GptShape
from hecate.model.base import BaseModel
from hecate.model.moe_model import MoeModel
from hecate.ranks.ranks import Ranks

_OUTSIDE = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight"}
_INSIDE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
}
_QKV = "self_attention.linear_qkv.weight"


def mixtral_output(config: Config, base: BaseModel) -> TrainedOutput:
    """Return the output of a run over a model of Megatron's: a folder that transformers reads as a Mixtral."""
    assert isinstance(base, MegatronModel)
    shape = base.shape
    described = mixtral_config_of(shape, base.tokenizer, config.moe.router_aux_loss_coef)
    card = full_model_card(config, None, shape.experts)
    description = MixtralFolder(described, base.tokenizer, next(base.model.parameters()).dtype, card)

    def write(folder: Path, moe: MoeModel, ranks: Ranks) -> None:
        export_mixtral(folder, description, mixtral_weights(shape, dict(moe.whole_others())), moe, ranks)

    return TrainedOutput("model", write)


def mixtral_config_of(shape: GptShape, tokenizer: Any, aux_loss_coef: float) -> Any:
    """The transformers MixtralConfig of such a model."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.seq_len,
        initializer_range=INIT_STD,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": float(ROTARY_BASE)},
        tie_word_embeddings=True,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        router_aux_loss_coef=aux_loss_coef,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["MixtralForCausalLM"],
    )


def mixtral_weights(shape: GptShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights outside experts by Mixtral's names; Megatron's queries, keys and values lie group by group in one matrix."""
    renamed = {}
    for name, tensor in weights.items():
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = tensor.detach()
            continue
        layer, _, inside = name.removeprefix("decoder.layers.").partition(".")
        prefix = f"model.layers.{layer}"
        if inside != _QKV:
            renamed[f"{prefix}.{_INSIDE[inside]}"] = tensor.detach()
            continue
        queries = shape.heads // shape.key_value_heads
        by_group = tensor.detach().view(shape.key_value_heads, queries + 2, shape.head_dim, shape.hidden)
        for part, of_part in zip(("q", "k", "v"), by_group.split((queries, 1, 1), dim=1), strict=True):
            renamed[f"{prefix}.self_attn.{part}_proj.weight"] = of_part.reshape(-1, shape.hidden)
    return renamed
