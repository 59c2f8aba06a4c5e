"""A GPTModel of megatron-core for a shape: its TransformerConfig, its process groups, its layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from hecate.apps.megatron.layer import AnyDeviceRotary, TorchAttention, TorchNorm
from hecate.config.gpt_shape import GptShape
from hecate.ranks.groups import ExpertGroups, TensorGroups

INIT_STD, NORM_EPS, ROTARY_BASE = 0.02, 1e-5, 10_000


def transformer_config(shape: GptShape, dtype: torch.dtype, **changes: Any) -> TransformerConfig:
    """Megatron's configuration of the model. Everything fused is off: it needs CUDA extensions."""
    return TransformerConfig(
        **{
            "num_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "num_query_groups": shape.key_value_heads,
            "kv_channels": shape.head_dim,
            "ffn_hidden_size": shape.ffn,
            "normalization": "RMSNorm",
            "layernorm_epsilon": NORM_EPS,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "init_method_std": INIT_STD,
            "params_dtype": dtype,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            **changes,
        }
    )


def process_groups(groups: ExpertGroups, tensor: TensorGroups | None = None) -> ProcessGroupCollection:
    """Our groups by Megatron's names: data parallel over all ranks (or those with the same part of a model), experts over a sharding group,
    data parallel of experts over a replicate group; everything else is a rank alone.

    Every rank must call it.
    """
    ranks = dist.get_process_group_ranks(groups.world)
    alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in ranks])
    data = dict.fromkeys(("dp", "dp_cp", "intra_dp_cp"), tensor.data if tensor else groups.world)
    model = dict.fromkeys(("tp", "mp", "tp_cp"), tensor.tensor if tensor else alone)
    sharding = dict.fromkeys(("ep", "tp_ep", "tp_ep_pp"), groups.tokens)
    replicate = dict.fromkeys(("expt_dp", "intra_expt_dp"), groups.replicate or alone)
    own = dict.fromkeys(("pp", "cp", "embd", "pos_embd", "expt_tp"), alone)
    return ProcessGroupCollection(tp_dp_cp=groups.world, **data, **model, **sharding, **replicate, **own)


def build_gpt(
    shape: GptShape, vocabulary: int, config: TransformerConfig, mlp: ModuleSpec, groups: ProcessGroupCollection, *, seed: int
) -> GPTModel:
    """The model on the CPU, the same on every rank.

    Args:
        mlp: what takes the place of each layer's FFN. With a module of ours, not with Megatron's, nothing in it is initialised by `seed`.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = TorchAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    spec.submodules.mlp = mlp
    block = TransformerBlockSubmodules(layer_specs=[spec] * shape.layers, layer_norm=TorchNorm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTModel(
            config,
            block,
            vocabulary,
            shape.seq_len,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            rotary_base=ROTARY_BASE,
            pg_collection=groups,
        )
    model.rotary_pos_emb = AnyDeviceRotary(
        shape.head_dim, rotary_percent=1.0, rotary_base=ROTARY_BASE, use_cpu_initialization=True, cp_group=groups.cp
    )
    return model
