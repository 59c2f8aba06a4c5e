"""The sizes of a run, from its configuration, the base model's headers and the topology. No weights are loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hecate.config import Config, find_model, with_experts_of_model
from hecate.config.files.presets import base_named, find_preset
from hecate.config.files.topology import AUTO
from hecate.config.rules.of_apps import single_sequences
from hecate.config.sections import OPTIMIZERS
from hecate.data.files.user_features import users_of
from hecate.errors import UserError
from hecate.experts.pairs.source_table import PAIR_SOURCES, trains_a
from hecate.model.sizes.base_shape import BaseShape, LayerShape, read_base_shape
from hecate.parallel.cluster.mesh import Mesh, make_mesh
from hecate.parallel.cluster.step_spread import GPU_FLOPS
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_cards import RankDevice, SeenTopology, topology_of_devices
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.cost.expert_cost import STATE_NUMBERS, UnitPlace, expert_layer_cost, ffn_place, number_bytes
from hecate.parallel.values.expert_kinds import (
    MIXES_ON_EVERY_RANK,
    PROJECTIONS,
    FfnSizes,
    LinearSizes,
    PairSizes,
    UnitSizes,
    gate_parameters,
)
from hecate.parallel.values.layout import TensorSpec
from hecate.parallel.values.optimizer_state import expert_spec, kept_tensors, owner_bytes
from hecate.parallel.values.sequence_shares import sequences_by_speed, slowest_of_each
from hecate.parallel.values.units import FFN
from hecate.ranks.processor import computes_bfloat16

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class ExpertLayers:
    """The units of a run that have the same number and cost of experts."""

    experts: int
    number: int
    """The number of units in all layers."""
    cost: LayerCost
    inputs: int
    """The size of the rows that the units' routers read."""
    per_layer: int = 1
    """The number of these units in each decoder layer that has any."""
    stack: int = 0
    """The number of the decoder layers' kind: groups of the same layers have the same number."""
    computed_numel: int = 0
    """The numbers of pairs that are computed for each replica (`PairSizes.computed_numel`)."""
    kept_tensors: int = STATE_NUMBERS - 1
    """The number of tensors that the optimizer keeps of an expert."""


@dataclass(frozen=True)
class PoolShape:
    """A pool that the experts of several units train in (`PairSizes.pooled`)."""

    blocks: int
    specs: tuple[TensorSpec, ...]
    """The tensors of a block."""

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.specs)


@dataclass(frozen=True)
class RunShape:
    """The sizes of a configuration's run on a topology."""

    config: Config
    topology: Topology
    topology_name: str
    base: BaseShape
    dtype_bytes: int
    """The bytes of a weight that the model computes with, outside the experts."""
    master_bytes: int
    """The bytes of a trained parameter and of a moment."""
    groups: tuple[ExpertLayers, ...]
    pools: tuple[PoolShape, ...] = ()
    user_width: int | None = None
    """The size of the vectors of users by which routers decide; None: they decide by something else."""
    notes: tuple[str, ...] = ()
    """What a user should know about the topology (`hecate.parallel.cluster.topology_cards.SeenTopology`)."""

    @property
    def mesh(self) -> Mesh:
        return make_mesh(self.topology.world_size, self.config.fssdp.shard_size, self.tensor_parallel)

    @property
    def is_gpu_D(self) -> np.ndarray:
        """Whether each rank's device is a GPU, bool [ranks]."""
        return _is_gpu(self.topology)

    @property
    def sequences_D(self) -> np.ndarray:
        """The sequences that each rank has in one micro-step, int64 [ranks]; the ranks of a tensor group have the same ones."""
        return np.repeat(_sequences(self.config, self.topology), self.tensor_parallel)

    @property
    def tokens_D(self) -> np.ndarray:
        """The tokens of each rank in one micro-step, int64 [ranks]; with tensor parallelism those that it routes."""
        return np.asarray(self.sequences_D * self.config.data.seq_len // self.tensor_parallel)

    @property
    def slowest_token_seconds(self) -> float:
        """The seconds of a FLOP for each token of a micro-step, on the rank that takes longest."""
        return float((self.tokens_D / np.asarray(self.topology.flops)).max())

    @property
    def tensor_parallel(self) -> int:
        """The number of ranks that split one copy of the weights outside the experts."""
        return self.config.model.tensor_parallel

    @property
    def parts_parameters(self) -> int:
        """The parameters of the projections and the embedding that each of these ranks holds."""
        if self.tensor_parallel == 1:
            return 0
        projections = sum(layer.linear_parameters for layer in self.base.layers)
        return (projections + self.base.vocabulary * self.base.layers[0].hidden) // self.tensor_parallel

    @property
    def replicated_parameters(self) -> int:
        """The trained parameters that every rank holds: routers, attention adapters, and the model's own if they are trained."""
        routers = self._routers if self.config.moe.trains_routers else 0
        if self.config.moe.router.bias == "learned":
            routers += sum(group.experts * group.number for group in self.groups)
        if self.trains_non_experts:
            return routers + self._outside_experts - self.tensor_parallel * self.parts_parameters
        return routers + sum(b + (a if trains_a(self.config.lora.shape) else 0) for a, b in self.adapters)

    @property
    def seeded_parameters(self) -> int:
        """The numbers of low-rank pairs that every rank draws from names and keeps as they are."""
        config = self.config
        if not config.moe.kind.has_pairs:
            return 0
        layers = zip(self.base.layers, config.moe.experts_per_layer(len(self.base.layers)), strict=True)
        units = [sizes for layer, number in layers if number for _, sizes in _units(layer, config)]
        found = [_pair_sizes(sizes, config) for sizes in units]
        of_model = {spec for pairs in found if pairs.seeded_of_model for spec in pairs.seeded}
        of_units = [spec for pairs in found if not pairs.seeded_of_model for spec in pairs.seeded]
        of_experts = sum(spec.numel for spec in (*of_model, *of_units))
        return of_experts + (0 if trains_a(config.lora.shape) else sum(a for a, _ in self.adapters))

    @property
    def adapters(self) -> tuple[tuple[int, int], ...]:
        """The parameters of A and of B of each layer's plain LoRA pairs; 0 for kinds of experts without pairs."""
        experts = self.config.moe.experts_per_layer(len(self.base.layers))
        return tuple(adapter_parameters(layer, self.config, number) for layer, number in zip(self.base.layers, experts, strict=True))

    @property
    def trains_non_experts(self) -> bool:
        model = self.config.model
        return not self.config.moe.kind.has_pairs and (model.train_non_experts or model.front_end == "megatron")

    @property
    def rounded_parameters(self) -> int:
        """The parameters that every rank holds a second time, in the narrower type that the model computes in."""
        if not self.trains_non_experts or self.dtype_bytes == self.master_bytes:
            return 0
        return self.replicated_parameters - self._routers + self.parts_parameters

    @property
    def frozen_parameters(self) -> int:
        """The frozen parameters that every rank holds."""
        kind = self.config.moe.kind
        if kind.keeps_base:
            return self.base.parameters
        if kind.of_moe_base and self.config.moe.trains_routers:
            return self._outside_experts - self._routers
        return 0 if self.trains_non_experts else self._outside_experts

    @property
    def sharded_parameters(self) -> tuple[int, ...]:
        """The number of frozen parameters of each decoder layer that are sharded over the ranks (`model.shard_non_experts`)."""
        if not self.config.model.shard_non_experts:
            return ()
        layers = self.base.layers
        routers = [layer.hidden * layer.experts if self.config.moe.trains_routers else 0 for layer in layers]
        experts = [3 * layer.hidden * layer.ffn * layer.experts for layer in layers]
        return tuple(layer.parameters - e - r for layer, e, r in zip(layers, experts, routers, strict=True))

    @property
    def _routers(self) -> int:
        """The parameters of all routers."""
        if self.user_width is not None:
            return sum(group.number * gate_parameters(self.user_width, group.experts) for group in self.groups)
        return sum(group.experts * group.number * group.inputs for group in self.groups)

    @property
    def _outside_experts(self) -> int:
        """The parameters of the model without its own experts, or without the FFNs that became experts."""
        experts = self.config.moe.experts_per_layer(len(self.base.layers))
        layers = [layer for layer, number in zip(self.base.layers, experts, strict=True) if number]
        return self.base.parameters - sum(3 * layer.hidden * layer.ffn * max(1, layer.experts) for layer in layers)


def run_shape(config: Config, topology: str | None, ranks: int | None) -> RunShape:
    """Read the model's headers and the topology, and return the sizes of the run.

    Args:
        topology: replaces that of the configuration, unless None.
        ranks: the number of ranks; None: the topology's, or else the configuration's nproc, or else one per GPU, or 2.

    Raises:
        UserError: a file is missing or damaged, the model is not supported, or numbers of ranks contradict each other.
    """
    name = topology or config.topology
    return shape_on(config, _topology(name, config, ranks), name)


def shape_on(config: Config, seen: SeenTopology, name: str) -> RunShape:
    """Read the model's headers, and return the sizes of the run on a topology that is called `name`. Raises UserError: as `run_shape`."""
    machines = seen.topology
    make_mesh(machines.world_size, config.fssdp.shard_size, config.model.tensor_parallel)
    base, config = base_shape_of(config)
    if single_sequences(config):
        steps = config.gradient_accumulation_steps * config.micro_batch_size
        config = replace(config, gradient_accumulation_steps=steps, micro_batch_size=1)
    dtype_bytes = _DTYPE_BYTES[_dtype(config, machines)]
    master_bytes = max(4, dtype_bytes)
    experts = config.moe.experts_per_layer(len(base.layers))
    users = users_of(config)
    return RunShape(
        config,
        machines,
        Path(name).stem,
        base,
        dtype_bytes,
        master_bytes,
        _groups(
            [
                (number, unit_costs(layer, config, dtype_bytes, master_bytes, _hiding_sequences(config, machines)))
                for layer, number in zip(base.layers, experts, strict=True)
            ]
        ),
        pool_shapes(base, config),
        None if users is None else users.width,
        (*_base_notes(config.model.name_or_path), *seen.notes),
    )


def _base_notes(name_or_path: str) -> tuple[str, ...]:
    """What a user should know where a base's sizes stand in for a folder that is not there."""
    base = None if Path(name_or_path).exists() else base_named(name_or_path)
    if base is None or base.stem == name_or_path:
        return ()
    return (f"{name_or_path} is not there: planned with the sizes of configs/bases/{base.name}",)


def _sequences(config: Config, topology: Topology) -> np.ndarray:
    """Return the sequences of a micro-step that training deals to each tensor group by its speed, int64 [groups]."""
    speeds = slowest_of_each(topology.flops, config.model.tensor_parallel)
    return np.asarray(sequences_by_speed(config.micro_batch_size * len(speeds), speeds, config.deterministic_group))


def _hiding_sequences(config: Config, topology: Topology) -> float:
    """Return how many sequences the slowest device would compute until the last device has computed its own."""
    speed = np.asarray(slowest_of_each(topology.flops, config.model.tensor_parallel))
    return float((_sequences(config, topology) * (speed.min() / speed)).max())


def has_gpus(topology: Topology) -> bool:
    return bool(_is_gpu(topology).any())


def _is_gpu(topology: Topology) -> np.ndarray:
    """bool [ranks]"""
    return np.asarray(topology.flops) >= GPU_FLOPS


def base_shape_of(config: Config) -> tuple[BaseShape, Config]:
    """Return the sizes of the configured model, and the configuration with the numbers of experts that the model has itself.

    Raises:
        UserError: a file is missing or damaged, the model is not supported, numbers contradict each other; or as `with_experts_of_model`.
    """
    base = _base_shape(config)
    if base.top_k is not None:
        config = with_experts_of_model(config, tuple(layer.experts for layer in base.layers), base.top_k)
    return base, config


def pool_shapes(base: BaseShape, config: Config) -> tuple[PoolShape, ...]:
    """Return the pools of a run, whose model's numbers of experts are in the configuration.

    Raises:
        UserError: sizes cannot be cut as the configuration says, or a pool is too small for those that draw on it.
    """
    if not config.moe.kind.has_pairs:
        return ()
    consumers: Counter[tuple[str, UnitSizes]] = Counter()
    for layer, number in zip(base.layers, config.moe.experts_per_layer(len(base.layers)), strict=True):
        consumers.update({unit: number for unit in _units(layer, config) if number})
    found, check = [], PAIR_SOURCES[config.lora.pairs].check_pool
    for (_, sizes), blocks in consumers.items():
        if pooled := _pair_sizes(sizes, config).pooled:
            assert check is not None, config.lora.pairs
            check(config.lora.shape, blocks)
            found.append(PoolShape(blocks, pooled))
    return tuple(found)


def unit_costs(
    layer: LayerShape, config: Config, dtype_bytes: int, master_bytes: int, sequences: float
) -> list[tuple[int, LayerCost, int, int]]:
    """Return the inputs of each unit of a layer, the cost with which the engine plans (`hecate.experts.family.ExpertFamily.cost`), how many
    numbers of pairs are computed for each replica (`PairSizes.computed_numel`), and how many tensors are kept of an expert.

    Args:
        sequences: whose attention hides transfers, on the slowest device.

    Raises:
        UserError: units are linears, and one of lora.target_modules is none of the layer's.
    """
    kind, all_sizes = config.moe.kind, [sizes for _, sizes in _units(layer, config)]
    hiding = layer.all_linears if kind.over_linears else layer.linears  # what is computed while experts travel
    weights = sum(outputs * inputs for _, outputs, inputs in hiding)
    costs = []
    ffn: tuple[TensorSpec, ...] = ()
    for sizes in all_sizes:
        if isinstance(sizes, LinearSizes):
            inputs, place = sizes.inputs, UnitPlace(sizes.inputs, sizes.outputs, len(all_sizes), at_beginning=True)
        else:
            inputs, ffn, place = layer.hidden, sizes.specs(), ffn_place(layer.hidden)
        pairs = _pair_sizes(sizes, config)
        cost = expert_layer_cost(
            kind.parameters(sum(spec.numel for spec in ffn), pairs.trained_numel, pairs.flops, pairs.spared_flops),
            place=place,
            top_k=config.moe.experts_per_token,
            number=number_bytes(kind, master=master_bytes, computed=dtype_bytes),
            non_moe_flops=2.0 * weights * sequences * config.data.seq_len / config.model.tensor_parallel,
            on_every_rank=config.deterministic or (kind.over_linears and config.moe.router.mixes in MIXES_ON_EVERY_RANK),
        )
        state, expert = OPTIMIZERS[config.optim].STATE, expert_spec(kind.layout(ffn, pairs).trainable)
        cost = replace(cost, state_bytes=owner_bytes(state, expert, master_bytes))
        costs.append((inputs, cost, pairs.computed_numel, kept_tensors(state, expert)))
    return costs


def _units(layer: LayerShape, config: Config) -> Sequence[tuple[str, UnitSizes]]:
    """The place and the sizes of each unit of a layer. Raises UserError as `unit_costs`."""
    if not config.moe.kind.over_linears:
        return [(FFN, FfnSizes(layer.hidden, layer.ffn))]
    targets, names = config.lora.target_modules, [name for name, _, _ in layer.all_linears]
    for target in targets:
        if target not in names:
            raise UserError(f"lora.target_modules: {target} matches no linear of the model's decoder layers; they have {', '.join(names)}")
    return [(name, LinearSizes(inputs, outputs)) for name, outputs, inputs in layer.all_linears if name in targets]


def _pair_sizes(sizes: UnitSizes, config: Config) -> PairSizes:
    """What is trained of the low-rank pairs of one of a unit's experts, and what they cost."""
    lora = config.lora.shape_of_experts(config.moe)
    return PAIR_SOURCES[config.lora.pairs].sizes(sizes, config.moe.kind.projections(config.lora.target_modules), lora)


def _groups(layers: list[tuple[int, list[tuple[int, LayerCost, int, int]]]]) -> tuple[ExpertLayers, ...]:
    """The units of layers that are alike, by their cost.

    Args:
        layers: of each decoder layer, the number of experts of each of its units, and what `unit_costs` says of these.
    """
    alike = Counter((number, tuple(units)) for number, units in layers if number)
    groups = []
    for stack, ((number, units), count) in enumerate(alike.items()):
        for (inputs, cost, computed, kept), per_layer in Counter(units).items():
            groups.append(ExpertLayers(number, count * per_layer, cost, inputs, per_layer, stack, computed, kept))
    return tuple(groups)


def adapter_parameters(layer: LayerShape, config: Config, experts: int) -> tuple[int, int]:
    """Return the parameters of A and of B of the plain LoRA pairs in a layer whose units have so many experts; 0 if a kind has none."""
    adapted = linears_with_adapters(layer, config, experts)
    return config.lora.rank * sum(inputs for inputs, _ in adapted), config.lora.rank * sum(outputs for _, outputs in adapted)


def linears_with_adapters(layer: LayerShape, config: Config, experts: int) -> list[tuple[int, int]]:
    """Return the inputs and outputs of the linears with plain LoRA pairs in a layer whose units have so many experts."""
    kind = config.moe.kind
    if not kind.has_pairs or (kind.over_linears and experts):
        return []
    targets = set(config.lora.target_modules) - (set(PROJECTIONS) if layer.experts else set())  # shared experts have none
    linears = layer.all_linears if kind.over_linears else layer.linears
    return [(inputs, outputs) for name, outputs, inputs in linears if name in targets]


def _base_shape(config: Config) -> BaseShape:
    model = config.model
    if model.front_end == "transformers":
        return read_base_shape(find_model(model.name_or_path, weights=False), config.moe.kind, model.num_hidden_layers)
    from hecate.config.gpt_shape import gpt_shape
    from hecate.model.files.tokenizer import tokenizer_of, vocabulary_of

    gpt = gpt_shape(model.name_or_path)
    queries, keys = gpt.heads * gpt.head_dim, gpt.key_value_heads * gpt.head_dim
    linears = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    outside = gpt.attention_parameters + 2 * gpt.hidden
    layer = LayerShape(
        gpt.hidden,
        gpt.ffn,
        outside + 3 * gpt.hidden * gpt.ffn,
        (*((name, width, gpt.hidden) for name, width in linears), ("o_proj", gpt.hidden, queries)),
    )
    layers = (layer,) * (model.num_hidden_layers or gpt.layers)
    vocabulary = vocabulary_of(config, tokenizer_of(config))
    return BaseShape(layers, vocabulary, (vocabulary + 1) * gpt.hidden + sum(layer.parameters for layer in layers))


def _topology(name: str, config: Config, ranks: int | None) -> SeenTopology:
    if name == AUTO:
        cards = _local_cards(_DRIVER)
        number = ranks or config.nproc or len(cards) or 2
        # A run of more ranks than there are GPUs is planned for machines like this one.
        if not cards:
            return topology_of_devices([RankDevice("here")] * number)
        return topology_of_devices([RankDevice(f"machine {rank // len(cards)}", cards[rank % len(cards)]) for rank in range(number)])
    path = find_preset("topologies", "topology", name)
    machines = load_topology(path)
    if ranks is not None and ranks != machines.world_size:
        raise UserError(
            f"--ranks {ranks}, but topology {name} has {machines.world_size} devices\n  leave --ranks out, or use another topology"
        )
    return SeenTopology(machines)


def _local_cards(driver: Path) -> list[str]:
    """Return the names of this machine's GPUs, from what their driver writes into its folder in /proc."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(driver.glob("*/information"))]
    found = [re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE) for text in texts]
    return [match[1] for match in found if match]


def _dtype(config: Config, topology: Topology) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    if min(topology.flops) >= GPU_FLOPS:
        return "bfloat16"
    if config.model.front_end == "megatron":
        return "float32"
    return "bfloat16" if computes_bfloat16() else "float32"
