"""The engine's settings, from the configuration."""

from __future__ import annotations

from hecate.config import Config
from hecate.config.files.topology import AUTO, build_topology, whole_topology
from hecate.config.sections import OPTIMIZERS
from hecate.engine.step_plans import EngineConfig, SlotsByMemory
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_cards import SeenTopology
from hecate.parallel.planners import POLICIES
from hecate.ranks.devices import gather_devices
from hecate.ranks.ranks import Ranks


def engine_config(
    config: Config, ranks: Ranks, non_moe_flops: float, topology: Topology | None = None, slots_by_memory: SlotsByMemory | None = None
) -> EngineConfig:
    """What the configuration says about the engine.

    Args:
        non_moe_flops: FLOPs of a layer outside its experts, on one rank, in the forward pass of one micro-step.
        topology: of the ranks' devices; None: the one that the configuration names, for which every rank must call this function.
        slots_by_memory: see `EngineConfig.slots_by_memory`.
    """
    return EngineConfig(
        planner=POLICIES[config.fssdp.planner],
        topology=topology or job_topology(config, ranks).topology,
        load_window=config.fssdp.load_window,
        memory_slots=config.fssdp.memory_slots,
        slots_by_memory=slots_by_memory,
        max_imbalance=config.fssdp.max_imbalance,
        state=None if config.optim == "adamw" else OPTIMIZERS[config.optim].STATE,
        top_k=config.moe.experts_per_token,
        non_moe_flops=non_moe_flops,
        plan=config.plan_choice,
        rematerialize=config.fssdp.rematerialize,
        prefetch=config.fssdp.prefetch,
        on_every_rank=config.deterministic,
        tp_size=config.model.tensor_parallel,
        max_steps=config.max_steps or None,
    )


def job_topology(config: Config, ranks: Ranks) -> SeenTopology:
    """Return the topology that the configuration names. Every rank must call it: for `auto` the ranks exchange what their devices are.

    Raises:
        UserError: there is no such preset, or it has another number of devices than there are ranks.
    """
    if config.topology == AUTO:
        return whole_topology(config, gather_devices(ranks))
    return SeenTopology(build_topology(config, ranks.world_size))
