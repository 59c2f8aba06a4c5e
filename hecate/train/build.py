"""Builds the parts of a run from its configuration: the base model, its experts and adapters, and the tokenized data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.adapters.trained_output import TrainedOutput, begin_with_adapter, output_of
from hecate.checkpoint.train_state import TrainedParts
from hecate.config import Config, DataSource, with_experts_of_model
from hecate.data.chat.templates import choose_template
from hecate.data.content import cache_folder
from hecate.data.encode import BadSamples, EncodedSource
from hecate.data.files.indexed import IndexedSource
from hecate.data.files.plain_text import plain_text_in_words
from hecate.data.files.user_features import UserFeatures, users_of
from hecate.data.routed_experts import RoutingShape
from hecate.data.separate_streams import SeparateStreams, Stream
from hecate.data.sources import TokenSource, hold_out, read_source
from hecate.data.stream import TrainStream
from hecate.elastic.move_experts import check_room
from hecate.engine.from_config import engine_config, job_topology
from hecate.errors import UserError
from hecate.io.durable import make_folder
from hecate.model.base import BaseModel, build_base
from hecate.model.causal_head import TokenLoss
from hecate.model.files.load import resolve_model
from hecate.model.files.load_moe import load_moe_model
from hecate.model.files.model_digest import model_digest
from hecate.model.front_ends import other_front_end
from hecate.model.gated_ffn import decoder_layers
from hecate.model.insert import InsertionPlan, insert_experts, non_moe_flops_per_token
from hecate.model.layers.attention import AttentionChoice
from hecate.model.layers.checkpointing import checkpoint_activations
from hecate.model.moe_model import MoeModel
from hecate.model.sharded_layers import shard_frozen_layers
from hecate.model.sizes.replica_slots import slots_of_config
from hecate.optim.from_config import gradient_rule, learning_rate
from hecate.optim.optimizer import ExpertOptimizer, Trainables
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import Topology
from hecate.ranks.ranks import Ranks

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """What a run is made of on one rank, built once from its configuration."""

    config: Config
    """The configuration, with the numbers that the model brings."""
    base: BaseModel
    moe: MoeModel
    optimizer: ExpertOptimizer
    stream: Stream
    eval_sources: list[TokenSource]
    """Those of `DataConfig.evaluated`, in that order."""
    output: TrainedOutput
    """What the run leaves at its end."""
    dense_flops: float
    """The FLOPs that hide a unit's gather, for each sequence."""
    drawn_digest: str
    """The digest of what was drawn when the model was built: see `MoeModel.drawn_digest`."""
    features_UF: Tensor | None = None
    """The vectors of all users, by which routers decide, on the model's device; None: no router decides by users."""
    loss: TokenLoss | None = None
    """The loss of the calling program that is trained for; None: cross-entropy."""

    @property
    def trained(self) -> TrainedParts:
        """The parts whose contents make up the run's state."""
        loss = "" if self.loss is None else getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        base = self.base
        return TrainedParts(self.moe.engine, self.optimizer, self.stream, base.digest, self.drawn_digest, base.chat_template, loss)


def build_parts(config: Config, ranks: Ranks, topology: Topology | None = None) -> RunParts:
    """Build the parts of a run. Every rank must call it.

    Args:
        topology: of the ranks' devices, in place of the configuration's.

    Raises:
        UserError: whatever of the configuration, the data or the model is wrong.
    """
    mesh = make_mesh(ranks.world_size, config.fssdp.shard_size)
    assert dist.get_world_size(ranks.groups.experts) == mesh.shard_size, "the ranks were joined for another fssdp.shard_size"
    if 1 < mesh.num_sharding_groups <= config.fssdp.redundancy:
        raise UserError(
            f"fssdp.redundancy: {config.fssdp.redundancy} needs more sharding groups than that, which hold each other's experts, "
            f"got {mesh.num_sharding_groups}\n  set it to 1, or fssdp.shard_size to less, or to null"
        )
    if ranks.tp_size > 1 and ranks.dp_size <= config.fssdp.redundancy:
        raise UserError(
            f"fssdp.redundancy: {config.fssdp.redundancy} needs more tensor groups (model.tensor_parallel) than that, got {ranks.dp_size}\n"
            "  leave it at 0, or take more ranks"
        )
    make_folder(Path(config.output_dir))
    topology = topology or _seen_topology(config, ranks)
    _say(ranks, f"loading {config.model.name_or_path}")
    base = in_chosen_template(config, front_end(config, ranks, topology), ranks)
    config = config_of_model(config, base)
    output = output_of(config, base)
    users = users_of(config)
    _say(ranks, "reading the data")
    # Held-out data are routed by the router, whether they bring a routing or not.
    whole = encode_sources(config.data.train, config, base, ranks, users, routing_shape(config, base), quarantine="quarantine")
    eval_sources = encode_sources(config.data.eval, config, base, ranks, users, quarantine="quarantine-eval")
    train_sources, held_out = hold_out(config.data, whole)
    for part in held_out:
        _say(ranks, f"data.eval_share: {len(part):,} of {len(part.whole):,} samples of {part.name} are evaluated, and not trained on")
    stream = _stream_of(config, train_sources, ranks)
    if not config.resume:
        for _ in range(config.data.skip_steps):
            stream.next_step()
    if ranks.is_first and (few := stream.few_samples()):
        _say(ranks, few)
    moe = build_moe(config, base, ranks, topology, None if users is None else users.width)
    if config.lora.init_from and not config.resume:
        begin_with_adapter(config, base, moe)
    if config.gradient_checkpointing:
        checkpoint_activations(moe)
    if config.fssdp.reshard_interval:
        check_room(moe.engine)
    optimizer = ExpertOptimizer(Trainables.of(moe), gradient_rule(config), learning_rate(config), ranks.device)
    dense_flops = moe.engine.shards.config.non_moe_flops / config.micro_batch_size
    features_UF = None if users is None else on_device(users, ranks)
    sources = [*eval_sources, *held_out]
    return RunParts(config, base, moe, optimizer, stream, sources, output, dense_flops, moe.drawn_digest, features_UF)


def on_device(users: UserFeatures, ranks: Ranks) -> Tensor:
    """[users, width]"""
    return torch.from_numpy(users.values_UF.astype(users.values_UF.dtype.newbyteorder("="), order="C")).to(ranks.device)


def _seen_topology(config: Config, ranks: Ranks) -> Topology:
    """The topology that the configuration names. Rank 0 prints what the user should know of it. Every rank must call it."""
    seen = job_topology(config, ranks)
    for note in seen.notes:
        _say(ranks, note)
    return seen.topology


def _say(ranks: Ranks, text: str) -> None:
    """Rank 0 prints a line before the run's own reports begin."""
    if ranks.is_first:
        _log.info(f"hecate: {text}")


def config_of_model(config: Config, base: BaseModel) -> Config:
    """The configuration with what it takes from an MoE base model: see `with_experts_of_model`, which says what is raised."""
    if not base.own_experts:
        return config
    blocks = {layer.block.layer: layer.block for layer in base.own_experts}
    layers = len(decoder_layers(base.model)[1])
    each = tuple(blocks[layer].num_experts if layer in blocks else 0 for layer in range(layers))
    return with_experts_of_model(config, each, base.own_experts[0].block.top_k)


def front_end(config: Config, ranks: Ranks, topology: Topology | None = None) -> BaseModel:
    """Build the model that the configuration names, with the configured front end. Every rank must call it.

    Args:
        topology: see `engine_config`.
    """
    if other := other_front_end(config.model.front_end):
        return other.build(config, ranks, topology, slots_of_config(config, partial(_say, ranks)))
    attention = AttentionChoice(config.model.attention, config.data.packing)
    return build_base(
        config.model.name_or_path, config.model.dtype, config.model.num_hidden_layers, ranks.device, config.moe.kind, attention
    )


def in_chosen_template(config: Config, base: BaseModel, ranks: Ranks) -> BaseModel:
    """The model with the chat template that the configuration chooses. Rank 0 says so if it is not the tokenizer's own.

    Raises:
        UserError: the template's file cannot be read.
    """
    chosen = choose_template(base.tokenizer.chat_template, config.data.chat_template)
    if chosen is None:
        return base
    _say(ranks, chosen.why)
    return base.with_chat_template(chosen.text)


def build_moe(config: Config, base: BaseModel, ranks: Ranks, topology: Topology | None = None, user_width: int | None = None) -> MoeModel:
    """Insert the configured experts and adapters into the model, unless its front end has done so.

    Args:
        topology: see `engine_config`.
        user_width: see `Router.user_width`.
    """
    if base.moe is not None:
        return base.moe
    flops = non_moe_flops_per_token(base.model, base.found) * config.micro_batch_size * config.data.seq_len
    plan = insertion_plan(config, len({unit.unit.layer for unit in base.found}), user_width)
    settings = engine_config(config, ranks, flops, topology, slots_of_config(config, partial(_say, ranks)))
    moe = insert_experts(base.model, base.found, plan, settings, ranks.groups)
    if config.model.shard_non_experts:
        assert ranks.layers is not None, "the ranks were joined without model.shard_non_experts"
        shard_frozen_layers(moe, ranks.layers)
    return moe


def shard_layers_again(config: Config, base: BaseModel, moe: MoeModel, ranks: Ranks) -> None:
    """Shard the frozen weights of decoder layers over other ranks than before (`model.shard_non_experts`). Every rank must call it.

    The weights are read again from the model's files, because what a lost rank held of them is nowhere else. No message is sent.

    Raises:
        UserError: the files cannot be read, or are not those any more that the run began with.
    """
    assert ranks.layers is not None, "the ranks were joined without model.shard_non_experts"
    source = resolve_model(config.model.name_or_path)
    if model_digest(source) != base.digest:
        raise UserError(
            f"model.name_or_path: {source.folder} is not the model any more that the run began with, and the frozen weights of lost ranks "
            "must be read from it\n  put its files back, and go on from the last checkpoint with resume=true"
        )
    dtype = next(base.model.parameters()).dtype
    # On the host, from where one layer after another is copied to a GPU: there is no room there for all of them besides a step's memory.
    whole, _ = load_moe_model(source, dtype, torch.device("cpu"), config.moe.kind, config.model.num_hidden_layers)
    shard_frozen_layers(moe, ranks.layers, whole)


def _stream_of(config: Config, sources: Sequence[TokenSource], ranks: Ranks) -> Stream:
    settings: dict[str, Any] = {
        "seq_len": config.data.seq_len,
        "packing": config.data.packing,
        "sequences_per_step": config.micro_batch_size * config.gradient_accumulation_steps * ranks.dp_size,
        "seed": config.seed,
    }
    if config.data.separate:
        return SeparateStreams(sources, numbered_alone=config.moe.router.input == "given", **settings)
    return TrainStream(sources, **settings)


def insertion_plan(config: Config, num_layers: int, user_width: int | None = None) -> InsertionPlan:
    """What the configuration inserts into a model with `num_layers` decoder layers that experts can go into."""
    kind = config.moe.kind
    return InsertionPlan(
        kind=kind,
        experts_per_layer=None if kind.of_moe_base else config.moe.experts_per_layer(num_layers),
        top_k=1 if kind.of_moe_base else config.moe.experts_per_token,
        router=config.moe.router,
        user_width=user_width,
        lora=config.lora.shape if kind.has_pairs else None,
        lora_of_experts=config.lora.shape_of_experts(config.moe) if kind.has_pairs else None,
        target_modules=config.lora.target_modules if kind.has_pairs else (),
        upcycle_noise=config.moe.upcycle_noise,
        train_router=config.moe.train_router,
        train_non_experts=config.model.train_non_experts,
        seed=config.seed,
        expert_names=tuple(source.name for source in config.data.train) if config.moe.router.input == "given" else (),
        kernels=config.kernels,
    )


def routing_shape(config: Config, base: BaseModel) -> RoutingShape | None:
    """What the routing of samples must fit; None: it is not read."""
    if config.moe.replay is None:
        return None
    numbers = [unit.unit.layer for unit in base.found]
    counts = [unit.own_experts for unit in base.found] if base.own_experts else config.moe.experts_per_layer(len(numbers))
    found = dict(zip(numbers, counts, strict=True))
    layers = range(len(decoder_layers(base.model)[1]))
    return RoutingShape(tuple(found.get(layer, 0) for layer in layers), config.moe.experts_per_token)


def encode_sources(
    sources: tuple[DataSource, ...],
    config: Config,
    base: BaseModel,
    ranks: Ranks,
    users: UserFeatures | None = None,
    routing: RoutingShape | None = None,
    *,
    quarantine: str | None = None,
) -> list[EncodedSource | IndexedSource]:
    """Tokenize data sources. Rank 0 says how many samples were left out.

    Args:
        users: features that each sample's user must have; None: samples need no users.
        routing: what the routing that each sample must bring must fit; None: it is not read.
        quarantine: how the names of files in output_dir begin to which rank 0 writes those samples, one file for each source; None: nothing
            is written.
    """
    cache, tokenizer = cache_folder(config.data.cache), base.tokenizer
    if config.data.split_special_tokens:
        tokenizer = copy(tokenizer)
        tokenizer.split_special_tokens = True
    if ranks.is_first:
        for said in filter(None, map(plain_text_in_words, sources)):
            _say(ranks, said)
    return [
        read_source(
            source,
            tokenizer,
            seq_len=config.data.seq_len,
            vocab_size=base.vocab_size,
            bad=BadSamples(
                config.data.on_bad_sample,
                Path(config.output_dir) / f"{quarantine}-{source.name}.jsonl" if quarantine and ranks.is_first else None,
                speaks=ranks.is_first,
            ),
            users=users,
            routing=routing,
            cache=cache,
        )
        for source in config.data.settled(sources)
    ]
