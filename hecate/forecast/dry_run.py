"""`hecate plan`: what a configuration would take on a topology, before anything is loaded or started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hecate.forecast.memory import PHASES, MemoryPart, memory_parts, owned_experts
from hecate.forecast.run_shape import ExpertLayers, RunShape, adapter_parameters
from hecate.forecast.sharding_groups import simulate_groups, sum_over_groups
from hecate.parallel.cost_model import ExecutionMode, LayerCost
from hecate.parallel.planners import POLICIES
from hecate.parallel.simulator import Simulated, StepBytes, simulate
from hecate.parallel.topology import Topology
from hecate.parallel.workloads import WORKLOADS

STEPS, SAMPLED_LAYERS = 6, 2
"""simulated: enough for a history of five steps, few enough for an answer in seconds"""


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyForecast:
    """One policy's step."""

    policy: str
    parts: dict[str, float]
    """seconds, which add up to the step"""
    bytes: StepBytes
    imbalance: float
    memory: list[MemoryPart]

    @property
    def step_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def memory_PD(self) -> np.ndarray:
        """float64 [phases, ranks]: bytes"""
        return np.asarray(sum(part.bytes_PD for part in self.memory))


@dataclass(frozen=True, eq=False)
class Forecast:
    """A dry run."""

    run: RunShape
    workload: str
    policies: list[PolicyForecast]
    """the configured one first"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; see docs/simulator.md."""
        run = self.run
        return {
            "model": run.config.model.name_or_path,
            "topology": run.topology_name,
            "ranks": run.topology.world_size,
            "shard_size": run.mesh.shard_size,
            "workload": self.workload,
            "policy": run.config.fssdp.planner,
            "device_memory_bytes": list(run.topology.memory),
            "policies": [
                {
                    "policy": one.policy,
                    "step_seconds": one.step_seconds,
                    "seconds": one.parts,
                    "bytes": asdict(one.bytes),
                    "imbalance": one.imbalance,
                    "memory": {
                        phase: {part.name: part.bytes_PD[index].tolist() for part in one.memory} for index, phase in enumerate(PHASES)
                    },
                    "fits_memory": fits(one, run),
                }
                for one in self.policies
            ],
        }


def forecast(run: RunShape, workload: str) -> Forecast:
    """Every policy under synthetic loads; an optimizer step of all its micro-steps. `fssdp.plan: calibrated` counts as history."""
    chosen = run.config.fssdp.planner
    names = [chosen, *(name for name in POLICIES if name != chosen)]
    by_group = [_simulate_group(run, group, workload, names) for group in run.groups]
    return Forecast(run, workload, [_policy_forecast(run, name, [rows[index] for rows in by_group]) for index, name in enumerate(names)])


def fits(one: PolicyForecast, run: RunShape) -> bool:
    return bool((one.memory_PD.max(0) <= np.asarray(run.topology.memory)).all())


def _simulate_group(run: RunShape, group: ExpertLayers, workload: str, names: list[str]) -> list[Simulated]:
    config, world = run.config, run.topology.world_size
    tokens = run.tokens * _micro_steps_together(run)
    sampled = min(group.number, SAMPLED_LAYERS)
    loads = WORKLOADS[workload](STEPS, sampled, world, group.experts, tokens, config.moe.experts_per_token, config.seed)
    slots = group.experts if config.fssdp.memory_slots is None else config.fssdp.memory_slots

    def of_one_group(loads: np.ndarray, topology: Topology, cost: LayerCost) -> list[Simulated]:
        return simulate(
            loads,
            topology,
            cost,
            {name: POLICIES[name] for name in names},
            slots_D=np.full(topology.world_size, slots),
            execution=ExecutionMode(
                plan=config.fssdp.plan,
                rematerialize=config.fssdp.rematerialize,
                prefetch=config.fssdp.prefetch,
                micro_steps=config.gradient_accumulation_steps,
            ),
            max_imbalance=config.fssdp.max_imbalance,
            history_steps=config.fssdp.load_window,
            num_layers=group.number,
        )

    return simulate_groups(loads, run.topology, group.cost, run.mesh, of_one_group)


def _micro_steps_together(run: RunShape) -> int:
    """Micro-steps that share one gather and one reduction."""
    return 1 if run.config.fssdp.per_micro_step else run.config.gradient_accumulation_steps


def _policy_forecast(run: RunShape, policy: str, groups: list[Simulated]) -> PolicyForecast:
    """The groups' layers and everything outside them."""
    topology, micro_steps = run.topology, run.config.gradient_accumulation_steps
    together = _micro_steps_together(run)
    times = micro_steps // together
    # A checkpointed layer runs forward twice: half as much computing and sending again, with a frozen base.
    again = 1.5 if run.config.gradient_checkpointing else 1.0
    reduced_bytes = _all_reduced_bytes(run)
    owned_bytes_D = sum((owned_experts(group, run) * group.cost.reduced_bytes for group in run.groups), np.zeros(topology.world_size))
    sum_seconds, summed = sum_over_groups(owned_bytes_D, sum(group.number for group in run.groups), topology, run.mesh)
    tensor = _tensor_traffic(run)
    parts = {
        "attention": _attention_seconds(run),
        "experts": again * times * sum(one.seconds.compute for one in groups) + _plain_ffn_seconds(run),
        "tokens": again * times * sum(one.seconds.dispatch for one in groups),
        "exposed": times * sum(one.seconds.exposed for one in groups),
        **({"tensor": tensor.seconds} if run.tensor_parallel > 1 else {}),
        "head": _head_seconds(run),
        "all-reduce": sum_seconds
        + (reduced_bytes / topology.slowest_link.bandwidth + topology.slowest_link.latency if reduced_bytes else 0.0),
        "optimizer": sum(one.seconds.optimizer for one in groups)
        + 7.0 * (run.replicated_parameters + run.parts_parameters) * run.master_bytes / min(topology.memory_bandwidth),
    }
    nodes = topology.num_nodes if topology.num_nodes > 1 else 0  # a ring over the ranks leaves each node once
    rows_D = np.max([one.rows_D for one in groups], axis=0) / together
    return PolicyForecast(
        policy=policy,
        parts=parts,
        bytes=StepBytes(
            near=times * sum(one.bytes.near for one in groups) + (topology.world_size - nodes) * reduced_bytes + tensor.near + summed.near,
            far=times * sum(one.bytes.far for one in groups) + nodes * reduced_bytes + tensor.far + summed.far,
            busiest_port=times * sum(one.bytes.busiest_port for one in groups) + reduced_bytes + tensor.port + summed.busiest_port,
            busiest_uplink=times * sum(one.bytes.busiest_uplink for one in groups)
            + (reduced_bytes + tensor.uplink if nodes else 0.0)
            + summed.busiest_uplink,
        ),
        imbalance=float(np.average([one.imbalance for one in groups], weights=[group.number for group in run.groups])),
        memory=memory_parts(
            run,
            [_others(one, group, run) for one, group in zip(groups, run.groups, strict=True)],
            rows_D,
            [_others_frozen(one, group, run) for one, group in zip(groups, run.groups, strict=True)],
        ),
    )


def _others(simulated: Simulated, group: ExpertLayers, run: RunShape) -> np.ndarray:
    """float64 [ranks]: replicas of others' experts that are there at once, in all layers of the group or in one (`memory_parts`)."""
    return _others_frozen(simulated, group, run) / (group.number if run.config.fssdp.rematerialize and group.cost.frozen_bytes else 1)


def _others_frozen(simulated: Simulated, group: ExpertLayers, run: RunShape) -> np.ndarray:
    """float64 [ranks]: others' frozen parts that are there, in all layers of the group: of rematerialized layers all, though of what trains
    one layer's at a time, which is taken to be like the others.
    """
    frozen, moving = group.cost.frozen_bytes, group.cost.replica_bytes - group.cost.frozen_bytes
    layers = group.number if run.config.fssdp.rematerialize and frozen else 1
    return np.asarray(simulated.replica_bytes_D) / (frozen + moving / layers)


def _all_reduced_bytes(run: RunShape) -> float:
    """What each rank sends in the all-reduce of the replicated gradients, in a ring."""
    world, copies = run.topology.world_size, run.topology.world_size // run.tensor_parallel
    parts = (copies - 1) / copies * run.parts_parameters
    return 2.0 * ((world - 1) / world * run.replicated_parameters + parts) * run.master_bytes


@dataclass(frozen=True)
class _Traffic:
    """What tensor parallelism sends in a step: seconds, and bytes over all ranks or through one port."""

    seconds: float
    near: float
    far: float
    port: float
    uplink: float


def _tensor_traffic(run: RunShape) -> _Traffic:
    """Hidden states are gathered before a layer's first projection and scattered behind its last one; backward the same, and once more
    gathered for the first one's gradient. Embedding and head scatter and gather once a direction."""
    config, topology, size = run.config, run.topology, run.tensor_parallel
    forwards = 2 if config.gradient_checkpointing else 1
    collectives = config.gradient_accumulation_steps * (len(run.base.layers) * (2 * forwards + 3) + 4)
    port = collectives * (size - 1) * run.tokens * run.base.layers[0].hidden * run.dtype_bytes
    groups = run.mesh.tensor_groups()
    crossing = sum(len({topology.node_of_rank[rank] for rank in group}) > 1 for group in groups)
    link = topology.inter_node if crossing else topology.intra_node
    all_bytes = float(port * topology.world_size)
    far = all_bytes * crossing / len(groups)
    seconds = port / link.bandwidth + collectives * link.latency if size > 1 else 0.0
    return _Traffic(seconds, all_bytes - far, far, float(port), float(port) if crossing else 0.0)


def _attention_seconds(run: RunShape) -> float:
    """On the slowest device. Frozen projections run once forward and once backward, their adapters and the scores twice backward."""
    config = run.config
    forwards = 2 if config.gradient_checkpointing else 1
    flops = 0.0
    for layer in run.base.layers:
        trained = 2.0 * adapter_parameters(layer, config) + 2.0 * config.data.seq_len * layer.query_width
        flops += (forwards + (2 if run.trains_non_experts else 1)) * 2.0 * layer.linear_parameters + (forwards + 2) * trained
    return flops * run.tokens * config.gradient_accumulation_steps / min(run.topology.flops)


def _head_seconds(run: RunShape) -> float:
    """Logits, the gradient of what they are made from, and that of the head where it trains."""
    gemms = 3 if run.trains_non_experts else 2
    flops = gemms * 2.0 * run.base.layers[0].hidden * run.base.vocabulary
    return flops * run.tokens * run.config.gradient_accumulation_steps / min(run.topology.flops)


def _plain_ffn_seconds(run: RunShape) -> float:
    """Of layers without experts."""
    plain = len(run.base.layers) - sum(group.number for group in run.groups)
    forwards = 2 if run.config.gradient_checkpointing else 1
    layer = run.base.layers[0]
    flops = plain * (forwards + 1) * 6.0 * layer.hidden * layer.ffn
    return flops * run.tokens * run.config.gradient_accumulation_steps / min(run.topology.flops)
