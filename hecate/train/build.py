"""From a configuration to the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hecate.config import Config, DataSource
from hecate.data.encode import EncodedSource, encode_source
from hecate.errors import UserError
from hecate.model.gated_ffn import decoder_layers
from hecate.model.head import LanguageModelHead
from hecate.model.load import load_model, load_tokenizer, one_gguf_reader, pick_dtype, resolve_model
from hecate.model.surgery import MoeModel, SurgeryPlan, insert_experts, non_moe_flops_per_token
from hecate.moe.engine import EngineConfig
from hecate.moe.mixlora import LoraShape
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import Topology, local_topology
from hecate.parallel.topology_file import load_topology
from hecate.train.ranks import Ranks

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "topologies"


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen causal language model."""

    model: nn.Module
    head: LanguageModelHead
    tokenizer: Any
    vocab_size: int


def build_base(name_or_path: str, dtype: str, num_hidden_layers: int | None, ranks: Ranks) -> BaseModel:
    """Load model and tokenizer. The model stays in eval mode: dropout of a frozen base would only be noise that depends on ranks."""
    source = resolve_model(name_or_path)
    with one_gguf_reader():
        model: Any = load_model(source, pick_dtype(dtype, ranks.device), ranks.device, num_hidden_layers).eval()
        tokenizer = load_tokenizer(source)
    return BaseModel(model, LanguageModelHead(model), tokenizer, model.get_input_embeddings().num_embeddings)


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


def build_moe(config: Config, base: BaseModel, ranks: Ranks, topology: Topology | None = None) -> MoeModel:
    """Put the configured experts and adapters into the model.

    Args:
        topology: of whoever started the ranks and knows better than the configuration.
    """
    tokens = config.micro_batch_size * config.data.seq_len
    engine_config = EngineConfig(
        planner=POLICIES[config.fssdp.policy],
        topology=topology or build_topology(config, ranks),
        load_window=config.fssdp.load_window,
        memory_slots=config.fssdp.memory_slots,
        max_imbalance=config.fssdp.max_imbalance,
        top_k=config.moe.top_k,
        non_moe_flops=non_moe_flops_per_token(base.model) * tokens,
        plan=config.fssdp.plan,
        rematerialize=config.fssdp.rematerialize,
        prefetch=config.fssdp.prefetch,
    )
    plan = surgery_plan(config, len(decoder_layers(base.model)[1]))
    return insert_experts(base.model, plan, engine_config, ranks.groups)


def surgery_plan(config: Config, num_layers: int) -> SurgeryPlan:
    scale = config.lora.alpha / (config.lora.r**0.5 if config.lora.use_rslora else config.lora.r)
    return SurgeryPlan(
        experts_per_layer=config.moe.experts_per_layer(num_layers),
        top_k=config.moe.top_k,
        lora=LoraShape(config.lora.r, scale, config.lora.dropout),
        target_modules=config.lora.target_modules,
        seed=config.seed,
    )


def encode_sources(sources: tuple[DataSource, ...], config: Config, base: BaseModel, ranks: Ranks) -> list[EncodedSource]:
    """Tokenize data sources; rank 0 writes what was left out beside the run."""
    return [
        encode_source(
            source,
            base.tokenizer,
            seq_len=config.data.seq_len,
            vocab_size=base.vocab_size,
            on_bad_sample=config.data.on_bad_sample,
            quarantine=Path(config.output_dir) / f"quarantine-{source.name}.jsonl" if ranks.is_first else None,
        )
        for source in sources
    ]
