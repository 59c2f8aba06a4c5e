"""From a configuration to the parts of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hecate.config import Config, DataSource
from hecate.data.sources import TokenSource, read_source
from hecate.engine.from_config import engine_config
from hecate.experts.mixlora import LoraShape
from hecate.model import moe_surgery
from hecate.model.base import BaseModel, build_base
from hecate.model.gated_ffn import decoder_layers
from hecate.model.sharded_layers import shard_frozen_layers
from hecate.model.surgery import MoeModel, SurgeryPlan, insert_experts, non_moe_flops_per_token
from hecate.model.upcycling import UpcyclingPlan, upcycle
from hecate.parallel.topology import Topology
from hecate.ranks.ranks import Ranks


def settled(config: Config, base: BaseModel) -> Config:
    """The configuration with the numbers that the model has brought.

    Raises:
        UserError: it gives other ones.
    """
    if not base.adapted:
        return config
    blocks = {layer.block.layer: layer.block for layer in base.adapted}
    layers = len(decoder_layers(base.model)[1])
    each = tuple(blocks[layer].num_experts if layer in blocks else 0 for layer in range(layers))
    return replace(config, moe=config.moe.of_model(each, base.adapted[0].block.top_k))


def front_end(config: Config, ranks: Ranks, topology: Topology | None = None) -> BaseModel:
    """The model that the configuration names, by whoever is to build it. Every rank must call it; `topology` as for `engine_config`."""
    if config.model.front_end == "megatron":
        from hecate.megatron.front_end import build_megatron

        return build_megatron(config, ranks, topology)
    return build_base(config.model.name_or_path, config.model.dtype, config.model.num_hidden_layers, ranks.device, config.moe.kind)


def build_moe(config: Config, base: BaseModel, ranks: Ranks, topology: Topology | None = None) -> MoeModel:
    """Put the configured experts and adapters into the model, if they are not there already; `topology` as for `engine_config`."""
    if config.model.front_end == "megatron":
        from hecate.megatron.front_end import MegatronModel

        assert isinstance(base, MegatronModel)
        return base.moe
    tokens = config.micro_batch_size * config.data.seq_len
    if base.adapted:
        flops = moe_surgery.non_moe_flops_per_token(base.model, base.adapted)
        for_engine = engine_config(config, ranks, flops * tokens, topology)
        moe = moe_surgery.adapt_experts(base.model, base.adapted, moe_lora_plan(config), for_engine, ranks.groups)
        if config.model.shard_non_experts:
            shard_frozen_layers(moe, ranks.new_sharding_group())
        return moe
    for_engine = engine_config(config, ranks, non_moe_flops_per_token(base.model) * tokens, topology)
    num_layers = len(decoder_layers(base.model)[1])
    if config.moe.family == "full":
        return upcycle(base.model, upcycling_plan(config, num_layers), for_engine, ranks.groups)
    return insert_experts(base.model, surgery_plan(config, num_layers), for_engine, ranks.groups)


def moe_lora_plan(config: Config) -> moe_surgery.MoeLoraPlan:
    return moe_surgery.MoeLoraPlan(
        lora_shape(config),
        config.lora.target_modules,
        train_router=config.moe.train_router,
        seed=config.seed,
        kernels=config.kernels,
    )


def lora_shape(config: Config) -> LoraShape:
    scale = config.lora.alpha / (config.lora.r**0.5 if config.lora.use_rslora else config.lora.r)
    return LoraShape(config.lora.r, scale, config.lora.dropout)


def surgery_plan(config: Config, num_layers: int) -> SurgeryPlan:
    return SurgeryPlan(
        experts_per_layer=config.moe.experts_per_layer(num_layers),
        top_k=config.moe.experts_per_token,
        lora=lora_shape(config),
        target_modules=config.lora.target_modules,
        seed=config.seed,
        kernels=config.kernels,
    )


def upcycling_plan(config: Config, num_layers: int) -> UpcyclingPlan:
    return UpcyclingPlan(
        experts_per_layer=config.moe.experts_per_layer(num_layers),
        top_k=config.moe.experts_per_token,
        noise=config.moe.upcycle_noise,
        seed=config.seed,
        train_non_experts=config.model.train_non_experts,
        kernels=config.kernels,
    )


def encode_sources(sources: tuple[DataSource, ...], config: Config, base: BaseModel, ranks: Ranks) -> list[TokenSource]:
    """Tokenize data sources; rank 0 writes what was left out beside the run."""
    return [
        read_source(
            source,
            base.tokenizer,
            seq_len=config.data.seq_len,
            vocab_size=base.vocab_size,
            on_bad_sample=config.data.on_bad_sample,
            quarantine=Path(config.output_dir) / f"quarantine-{source.name}.jsonl" if ranks.is_first else None,
        )
        for source in sources
    ]
