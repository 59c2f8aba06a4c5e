"""From a configuration to the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hecate.config import Config, DataSource
from hecate.config.schema import Family
from hecate.data.sources import TokenSource, read_source
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.mixlora import LoraShape
from hecate.model import moe_surgery
from hecate.model.expert_files import refuse_experts
from hecate.model.gated_ffn import decoder_layers
from hecate.model.head import CausalHead, LanguageModelHead
from hecate.model.load import load_model, load_tokenizer, one_gguf_reader, pick_dtype, resolve_model
from hecate.model.load_moe import load_moe_model
from hecate.model.moe_surgery import AdaptedLayer
from hecate.model.sharded_layers import shard_frozen_layers
from hecate.model.surgery import MoeModel, SurgeryPlan, insert_experts, non_moe_flops_per_token
from hecate.model.tensor_files import tensor_entries
from hecate.model.upcycling import UpcyclingPlan, upcycle
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import Topology, local_topology
from hecate.parallel.topology_file import load_topology
from hecate.ranks.ranks import Ranks

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "topologies"


@dataclass(frozen=True)
class BaseModel:
    """A causal language model: a checkpoint as it was loaded, or a new one with experts in it (`hecate.megatron`)."""

    model: nn.Module
    head: CausalHead
    tokenizer: Any
    vocab_size: int
    adapted: tuple[AdaptedLayer, ...] = field(default=(), kw_only=True)
    """with moe.family moe_lora: the layers whose experts were left out when the model was loaded"""


def build_base(name_or_path: str, dtype: str, num_hidden_layers: int | None, ranks: Ranks, family: Family = "mixlora") -> BaseModel:
    """Load model and tokenizer. The model stays in eval mode: dropout of a frozen base would only be noise that depends on ranks.

    Raises:
        UserError: the model cannot be read, or is not of the kind that the family needs.
    """
    source, device = resolve_model(name_or_path), ranks.device
    adapted: tuple[AdaptedLayer, ...] = ()
    model: Any
    with one_gguf_reader():
        if family == "moe_lora":
            model, adapted = load_moe_model(source, pick_dtype(dtype, device), device, num_hidden_layers)
        else:
            if source.gguf_file is None:
                refuse_experts(tensor_entries(source.folder), source.folder, family)
            model = load_model(source, pick_dtype(dtype, device), device, num_hidden_layers)
        model.eval()
        tokenizer = load_tokenizer(source)
    return BaseModel(model, LanguageModelHead(model), tokenizer, model.get_input_embeddings().num_embeddings, adapted=adapted)


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


def build_topology(config: Config, ranks: Ranks) -> Topology:
    """The topology that the configuration names.

    Raises:
        UserError: no such preset, or one with another number of devices than there are ranks.
    """
    topology = whole_topology(config, ranks.world_size, cuda=ranks.device.type == "cuda")
    if topology.world_size != ranks.world_size:
        raise UserError(f"topology: {config.topology} has {topology.world_size} devices, but the job has {ranks.world_size} ranks")
    return topology


def whole_topology(config: Config, num_devices: int, *, cuda: bool) -> Topology:
    """The topology that the configuration names, whatever number of devices it has; auto: so many of this machine's.

    Raises:
        UserError: no such preset.
    """
    if config.topology == "auto":
        return local_topology(num_devices, cuda=cuda)
    is_path = "/" in config.topology or config.topology.endswith((".yaml", ".yml"))
    path = Path(config.topology) if is_path else PRESETS / f"{config.topology}.yaml"
    if not path.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UserError(f"topology: no preset {config.topology}; there are auto, {presets}, or give the path of a YAML file")
    return load_topology(path)


def front_end(config: Config, ranks: Ranks, topology: Topology | None = None) -> BaseModel:
    """The model that the configuration names, by whoever is to build it. Every rank must call it; `topology` as for `engine_config`."""
    if config.model.front_end == "megatron":
        from hecate.megatron.front_end import build_megatron

        return build_megatron(config, ranks, topology)
    return build_base(config.model.name_or_path, config.model.dtype, config.model.num_hidden_layers, ranks, config.moe.family)


def engine_config(config: Config, ranks: Ranks, non_moe_flops: float, topology: Topology | None = None) -> EngineConfig:
    """What the configuration says of the engine.

    Args:
        non_moe_flops: of a layer outside its experts, of one rank in a micro-step, forward.
        topology: of whoever started the ranks and knows better than the configuration.
    """
    return EngineConfig(
        planner=POLICIES[config.fssdp.planner],
        topology=topology or build_topology(config, ranks),
        load_window=config.fssdp.load_window,
        memory_slots=config.fssdp.memory_slots,
        max_imbalance=config.fssdp.max_imbalance,
        top_k=config.moe.experts_per_token,
        non_moe_flops=non_moe_flops,
        plan=config.fssdp.plan,
        rematerialize=config.fssdp.rematerialize,
        prefetch=config.fssdp.prefetch,
    )


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
