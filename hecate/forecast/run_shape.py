"""What a configuration trains on how many ranks, as numbers: no weights, no processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hecate.config import Config, find_model
from hecate.errors import UserError
from hecate.forecast.base_shape import BaseShape, LayerShape, read_base_shape
from hecate.parallel.cost_model import LayerCost
from hecate.parallel.topology import Topology, local_topology
from hecate.parallel.topology_file import load_topology
from hecate.presets import find_preset

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_GPU_FLOPS = 1e13
"""a device this fast computes in bfloat16"""


@dataclass(frozen=True)
class ExpertLayers:
    """Layers with the same experts."""

    experts: int
    number: int
    cost: LayerCost


@dataclass(frozen=True)
class RunShape:
    """A configuration on a topology."""

    config: Config
    topology: Topology
    topology_name: str
    base: BaseShape
    dtype_bytes: int
    """of the frozen base"""
    master_bytes: int
    """of an adapter's parameter, of a router's, of a moment's"""
    groups: tuple[ExpertLayers, ...]

    @property
    def tokens(self) -> int:
        """of one rank in one micro-step"""
        return self.config.micro_batch_size * self.config.data.seq_len

    @property
    def replicated_parameters(self) -> int:
        """Routers, attention adapters, and the model's own where it trains: which every rank has."""
        routers = sum(group.experts * group.number for group in self.groups) * self.base.layers[0].hidden
        if self.trains_non_experts:
            return routers + self._outside_experts
        return routers + sum(adapter_parameters(layer, self.config) for layer in self.base.layers)

    @property
    def trains_non_experts(self) -> bool:
        return self.config.moe.family == "full" and self.config.model.train_non_experts

    @property
    def frozen_parameters(self) -> int:
        """What every rank holds of the model without training it."""
        if self.config.moe.family != "full":
            return self.base.parameters
        return 0 if self.trains_non_experts else self._outside_experts

    @property
    def _outside_experts(self) -> int:
        """Parameters of the model but for the FFNs that have become experts."""
        experts = self.config.moe.experts_per_layer(len(self.base.layers))
        upcycled = sum(3 * layer.hidden * layer.ffn for layer, number in zip(self.base.layers, experts, strict=True) if number)
        return self.base.parameters - upcycled


def run_shape(config: Config, topology: str | None, ranks: int | None) -> RunShape:
    """Read the model's headers and the topology.

    Args:
        topology: in place of the configuration's.
        ranks: left out: the topology's, else the configuration's nproc, else one a GPU, or 2.

    Raises:
        UserError: a file is missing or damaged, the model is not supported, or two numbers of ranks differ.
    """
    name = topology or config.topology
    machines = _topology(name, config, ranks)
    base = read_base_shape(find_model(config.model.name_or_path), config.model.num_hidden_layers)
    dtype_bytes = _DTYPE_BYTES[_dtype(config, machines)]
    master_bytes = max(4, dtype_bytes)
    experts = config.moe.experts_per_layer(len(base.layers))
    groups: dict[tuple[int, LayerCost], int] = {}
    for layer, number in zip(base.layers, experts, strict=True):
        if number:
            key = (number, layer_cost(layer, config, dtype_bytes, master_bytes))
            groups[key] = groups.get(key, 0) + 1
    return RunShape(
        config,
        machines,
        Path(name).stem,
        base,
        dtype_bytes,
        master_bytes,
        tuple(ExpertLayers(number, count, cost) for (number, cost), count in groups.items()),
    )


def layer_cost(layer: LayerShape, config: Config, dtype_bytes: int, master_bytes: int) -> LayerCost:
    """What the engine plans a layer with (`MixLoraExperts.cost`, `FullExperts.cost`)."""
    if config.moe.family == "full":
        expert, row_flops, choice_backward = 3 * layer.hidden * layer.ffn, 0.0, 2.0
    else:
        trained = sum(name in config.lora.target_modules for name in PROJECTIONS)
        expert, row_flops, choice_backward = trained * config.lora.r * (layer.hidden + layer.ffn), 6.0 * layer.hidden * layer.ffn, 3.0
    return LayerCost(
        trainable_bytes=float(master_bytes * expert),
        state_bytes=3.0 * master_bytes * expert,
        top_k=config.moe.choices,
        row_bytes=float(layer.hidden * dtype_bytes),
        row_flops=row_flops,
        choice_flops=2.0 * expert,
        choice_backward=choice_backward,
        non_moe_flops=2.0 * layer.linear_parameters * config.micro_batch_size * config.data.seq_len,
    )


def adapter_parameters(layer: LayerShape, config: Config) -> int:
    """Of the LoRA pairs on a layer's attention, which full experts do without."""
    if config.moe.family == "full":
        return 0
    return sum(config.lora.r * (outputs + inputs) for name, outputs, inputs in layer.linears if name in config.lora.target_modules)


def _topology(name: str, config: Config, ranks: int | None) -> Topology:
    if name == "auto":
        gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        return local_topology(ranks or config.nproc or gpus or 2, cuda=gpus > 0)
    path = find_preset("topologies", "topology", name)
    machines = load_topology(path)
    if ranks is not None and ranks != machines.world_size:
        raise UserError(
            f"--ranks {ranks}, but topology {name} has {machines.world_size} devices\n  leave --ranks out, or use another topology"
        )
    return machines


def _dtype(config: Config, topology: Topology) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    if min(topology.flops) >= _GPU_FLOPS:
        return "bfloat16"
    # As the trainer decides on this machine, without loading torch to ask.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_tile" in flags else "float32"
