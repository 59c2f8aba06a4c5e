"""Predict the memory and the step time of a configuration on a topology (`hecate plan`), without loading or starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hecate.apps.foresee.sharding_groups import simulate_groups, sum_over_groups
from hecate.config.sections import OPTIMIZERS
from hecate.errors import UserError
from hecate.model.sizes.memory import PHASES, MemoryPart, first_owners, memory_parts, owned_blocks, owned_experts
from hecate.model.sizes.replica_slots import replica_slots
from hecate.model.sizes.run_shape import ExpertLayers, PoolShape, RunShape
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost
from hecate.parallel.plan.measured_modes import execution_of
from hecate.parallel.planners import POLICIES
from hecate.parallel.simulate.simulated_step import Setting, StepBytes
from hecate.parallel.simulate.simulator import USUAL_RUN_STEPS, Simulated, mean_modes, simulate
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.transfer.residency import Residency, expected_uses, never_gives_up
from hecate.parallel.values.optimizer_state import expert_spec, owner_bytes
from hecate.parallel.values.traces import Trace

STEPS, SAMPLED_LAYERS = 6, 2
"""the number of simulated steps: enough for a history of five steps, and few enough to take only seconds"""


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyForecast:
    """The prediction of a step under one policy."""

    policy: str
    parts: dict[str, float]
    """the seconds of each part of the step, which add up to it"""
    bytes: StepBytes
    imbalance: float
    memory: list[MemoryPart]
    plan_modes: dict[str, float] | None
    """see `Simulated.plan_modes`"""

    @property
    def step_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def memory_PD(self) -> np.ndarray:
        """The bytes in each phase on each rank, float64 [phases, ranks]."""
        return np.asarray(sum(part.bytes_PD for part in self.memory))


@dataclass(frozen=True, eq=False)
class Forecast:
    """The predictions for all policies."""

    run: RunShape
    workload: str
    """the name of the synthetic loads; recorded ones are called recorded, or where they were of other numbers of tokens scaled recorded"""
    policies: list[PolicyForecast]
    """the policies, with the configured one first"""

    def as_dict(self) -> dict[str, Any]:
        """Return the predictions as JSON values; see docs/use/simulator.md."""
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
                    "plan_modes": one.plan_modes,
                    "memory": {
                        phase: {part.name: part.bytes_PD[index].tolist() for part in one.memory} for index, phase in enumerate(PHASES)
                    },
                    "fits_memory": fits(one, run),
                }
                for one in self.policies
            ],
        }


def forecast(run: RunShape, loads: str | Trace) -> Forecast:
    """Predict an optimizer step under every policy.

    Args:
        loads: the name of synthetic loads, or recorded ones, of which the last steps are taken.

    Raises:
        UserError: the loads were recorded on another number of ranks, or from other experts.
    """
    if isinstance(loads, Trace):
        _check_recorded(run, loads)
    config, chosen = run.config, run.config.fssdp.planner
    names = [chosen, *(name for name in POLICIES if name != chosen and run.groups)]
    slots_W = np.full(run.topology.world_size, config.fssdp.memory_slots) if config.fssdp.memory_slots is not None else replica_slots(run)
    # A plan's slots are the same in all sharding groups.
    slots_D = slots_W.reshape(run.mesh.num_sharding_groups, run.mesh.shard_size).min(0)
    by_group = [_simulate_group(run, group, loads, names, slots_D) for group in run.groups]
    pools = [_simulate_pool(run, pool) for pool in run.pools]
    policies = [_policy_forecast(run, name, [rows[index] for rows in by_group], pools) for index, name in enumerate(names)]
    name = loads if isinstance(loads, str) else "scaled recorded" if _is_of_other_batch(run, loads) else "recorded"
    return Forecast(run, name, policies)


def fits(one: PolicyForecast, run: RunShape) -> bool:
    return bool((one.memory_PD.max(0) <= np.asarray(run.topology.memory)).all())


def _simulate_group(run: RunShape, group: ExpertLayers, given: str | Trace, names: list[str], slots_D: np.ndarray) -> list[Simulated]:
    """Args:
    slots_D: int64 [ranks of a sharding group]: the most replicas of others' experts in each layer.
    """
    config = run.config
    loads = _recorded_loads(run, group, given) if isinstance(given, Trace) else _synthetic_loads(run, group, given)
    plan, choose_modes = execution_of(config.plan_choice, config.fssdp.prefetch)
    owner_E = first_owners(group.experts, run)

    def of_one_group(loads: np.ndarray, topology: Topology, cost: LayerCost) -> list[Simulated]:
        return simulate(
            loads,
            {name: POLICIES[name] for name in names},
            Setting(
                topology=topology,
                cost=cost,
                slots_D=np.minimum(slots_D, group.experts),
                execution=ExecutionMode(
                    plan=plan,
                    rematerialize=config.fssdp.rematerialize,
                    prefetch=config.fssdp.prefetch,
                    micro_steps=config.gradient_accumulation_steps,
                ),
                max_imbalance=config.fssdp.max_imbalance,
                window=config.fssdp.load_window,
                lifetime=_of_long_runs,
                run_steps=config.max_steps or USUAL_RUN_STEPS,
                num_layers=group.number,
                choose_modes=choose_modes,
                owner_E=owner_E,
            ),
        )

    return simulate_groups(loads, run.topology, group.cost, run.mesh, of_one_group)


def _synthetic_loads(run: RunShape, group: ExpertLayers, workload: str) -> np.ndarray:
    """Return loads for some layers that stand for the group, int [steps, layers, experts, source ranks]."""
    config, most = run.config, int(run.tokens_D.max())
    layers, world = min(group.number, SAMPLED_LAYERS), run.topology.world_size
    tokens, k = most * _micro_steps_together(run), config.moe.experts_per_token
    return _scaled(WORKLOADS[workload](STEPS, layers, world, group.experts, tokens, k, config.seed), run.tokens_D / most)


def _scaled(loads: np.ndarray, ratio_S: float | np.ndarray) -> np.ndarray:
    """Return each source's loads times its ratio, int64 [steps, layers, experts, source ranks].

    What is rounded down in one expert is carried to the next, so that each source loses less than one assignment.
    """
    through_E = np.floor(np.cumsum(loads, axis=2) * ratio_S + 1e-6).astype(np.int64)
    return np.diff(through_E, axis=2, prepend=0)


def _recorded_loads(run: RunShape, group: ExpertLayers, trace: Trace) -> np.ndarray:
    """As `_synthetic_loads`, of the last steps and of the first, middle and last of the units that have as many experts as the group's."""
    units = [unit for unit, experts in enumerate(trace.num_experts) if experts == group.experts]
    chosen = sorted({units[0], units[len(units) // 2], units[-1]})
    loads = trace.loads[-STEPS:, chosen, : group.experts].astype(np.int64)
    return _scaled(loads, _ratios(run, trace) * _micro_steps_together(run) / run.config.gradient_accumulation_steps)


def _is_of_other_batch(run: RunShape, trace: Trace) -> bool:
    """Whether the most tokens of a rank in a step were not as many as in the run that is planned."""
    planned = int(run.sequences_D.max()) * run.config.gradient_accumulation_steps * run.config.data.seq_len
    return trace.tokens_per_rank != planned


def _ratios(run: RunShape, trace: Trace) -> np.ndarray:
    """Return by what the loads of each source are multiplied to be those of as many tokens as are planned, float64 [source ranks].

    The share of tokens that is padding is taken to be the same; it is known of the source with the most tokens.
    """
    if not _is_of_other_batch(run, trace):
        return np.ones(run.topology.world_size)
    recorded_S = trace.loads[-STEPS:].sum(2).mean((0, 1)) / trace.top_k
    filled = recorded_S.max() * run.tensor_parallel / trace.tokens_per_rank
    planned_S = run.tokens_D * run.config.gradient_accumulation_steps * filled
    return np.divide(planned_S, recorded_S, out=np.zeros_like(recorded_S), where=recorded_S > 0)


def _check_recorded(run: RunShape, trace: Trace) -> None:
    """Raises UserError: loads are not of as many ranks, experts, or experts of a token as the run has."""
    sources, world, k = trace.loads.shape[3], run.topology.world_size, run.config.moe.experts_per_token
    if sources != world:
        raise UserError(
            f"the loads were recorded on {sources} ranks, but {world} are planned\n  give --ranks or --topology with {sources} devices"
        )
    if trace.top_k != k:
        raise UserError(f"the loads were recorded with moe.top_k: {trace.top_k}, but it is {k}\n  record them anew")
    if missing := {group.experts for group in run.groups} - set(trace.num_experts):
        raise UserError(
            f"no layer of the recorded loads has {', '.join(map(str, sorted(missing)))} experts, as layers of the run have; "
            f"theirs have {', '.join(map(str, sorted(set(trace.num_experts))))}\n  record them anew"
        )


def _simulate_pool(run: RunShape, pool: PoolShape) -> Simulated:
    """One gather of a whole pool to every rank, and one reduction, which nothing hides: the first layer needs it, and so does the last."""
    block, state = float(pool.numel * run.master_bytes), OPTIMIZERS[run.config.optim].STATE
    cost = LayerCost(
        trainable_bytes=block, chunk_numel=pool.numel, state_bytes=owner_bytes(state, expert_spec(pool.specs), run.master_bytes)
    )
    no_tokens = np.zeros((1, 1, pool.blocks, run.topology.world_size), dtype=np.int64)
    owner_E = first_owners(pool.blocks, run)

    def of_one_group(loads: np.ndarray, topology: Topology, cost: LayerCost) -> list[Simulated]:
        slots_D = np.full(topology.world_size, pool.blocks)
        return simulate(loads, {"full": POLICIES["full"]}, Setting(topology=topology, cost=cost, slots_D=slots_D, owner_E=owner_E))

    return simulate_groups(no_tokens, run.topology, cost, run.mesh, of_one_group)[0]


def _of_long_runs(layers: Sequence[Residency], steps_left: int | None) -> float:
    """Over how many steps a replica's frozen part is paid. Where slots run out the few steps of a forecast do not show how long replicas
    last, and a run that comes to keep more of them must still fit into memory."""
    return expected_uses(layers, steps_left) if never_gives_up(layers) else 20.0


def _micro_steps_together(run: RunShape) -> int:
    """Return the number of micro-steps that are simulated at once: those that share one gather and one reduction. Where some layers' do and
    others' do not, it is all of them, and the simulator counts the others' gathers."""
    fssdp = run.config.fssdp
    chosen = execution_of(run.config.plan_choice, fssdp.prefetch)[1]
    return 1 if fssdp.per_micro_step and not chosen else run.config.gradient_accumulation_steps


def _policy_forecast(run: RunShape, policy: str, groups: list[Simulated], pools: list[Simulated]) -> PolicyForecast:
    """Return the prediction of a policy, from its simulated MoE layers and everything outside them."""
    moving = [*groups, *pools]
    topology, micro_steps = run.topology, run.config.gradient_accumulation_steps
    together = _micro_steps_together(run)
    times = micro_steps // together
    # A checkpointed layer runs its forward pass twice, which with a frozen base adds half to computing and sending.
    again = 1.5 if run.config.gradient_checkpointing else 1.0
    trained_again = 4 / 3 if run.config.gradient_checkpointing and run.config.moe.kind.ffn == "trained" else again
    reduced_bytes = _all_reduced_bytes(run)
    owned_bytes_D = sum(
        (owned_experts(group, run) * group.cost.reduced_bytes for group in run.groups),
        owned_blocks(run, lambda pool: pool.numel) * run.master_bytes,
    )
    summed_messages = sum(group.number for group in run.groups if group.cost.reduced_bytes) + len(pools)
    sum_seconds, summed = sum_over_groups(owned_bytes_D, summed_messages, topology, run.mesh)
    tensor = _tensor_traffic(run)
    parts = {
        "attention": _attention_seconds(run),
        "experts": trained_again * times * sum(one.seconds.compute for one in groups) + _plain_ffn_seconds(run),
        "tokens": again * times * sum(one.seconds.dispatch for one in groups),
        "exposed": times * sum(one.seconds.exposed for one in moving),
        **({"tensor": tensor.seconds} if run.tensor_parallel > 1 else {}),
        "head": _head_seconds(run),
        "all-reduce": sum_seconds
        + (reduced_bytes / topology.slowest_link.bandwidth + topology.slowest_link.latency if reduced_bytes else 0.0),
        "optimizer": sum(one.seconds.optimizer for one in moving)
        + 7.0 * (run.replicated_parameters + run.parts_parameters) * run.master_bytes / min(topology.memory_bandwidth),
    }
    nodes = topology.num_nodes if topology.num_nodes > 1 else 0  # a ring over the ranks crosses from each node to another once
    none_D = np.zeros(topology.world_size)  # of a run without experts
    served_tokens_D = np.max([none_D, *(np.asarray(one.served_tokens_D) for one in groups)], axis=0) / together
    most_tokens_D = np.max([none_D, *(np.asarray(one.most_tokens_D) for one in groups)], axis=0) / together
    others_GD = [_others(one, group, run) for one, group in zip(groups, run.groups, strict=True)]
    return PolicyForecast(
        policy=policy,
        parts=parts,
        bytes=StepBytes(
            near=times * sum(one.bytes.near for one in moving) + (topology.world_size - nodes) * reduced_bytes + tensor.near + summed.near,
            far=times * sum(one.bytes.far for one in moving) + nodes * reduced_bytes + tensor.far + summed.far,
            busiest_port=times * sum(one.bytes.busiest_port for one in moving) + reduced_bytes + tensor.port + summed.busiest_port,
            busiest_uplink=times * sum(one.bytes.busiest_uplink for one in moving)
            + (reduced_bytes + tensor.uplink if nodes else 0.0)
            + summed.busiest_uplink,
        ),
        imbalance=float(np.average([one.imbalance for one in groups], weights=[group.number for group in run.groups])) if groups else 1.0,
        memory=memory_parts(
            run,
            others_GD,
            served_tokens_D,
            [
                np.asarray(one.frozen_parts_D) if group.cost.frozen_bytes else others_D
                for one, group, others_D in zip(groups, run.groups, others_GD, strict=True)
            ],
            most_tokens_D,
        ),
        plan_modes=mean_modes([one.plan_modes for one in groups], [group.number for group in run.groups]) if groups else None,
    )


def _others(simulated: Simulated, group: ExpertLayers, run: RunShape) -> np.ndarray:
    """Return the number of replicas of other ranks' experts that each rank holds at once, float64 [ranks], as `memory_parts` needs it.

    Replicas without bytes of their own are on every rank, at most.
    """
    if not group.cost.replica_bytes:
        return group.experts * group.number - owned_experts(group, run)
    return np.asarray(simulated.replicas_D)


def _all_reduced_bytes(run: RunShape) -> float:
    """Return the bytes that each rank sends in a ring all-reduce of the replicated gradients."""
    world, copies = run.topology.world_size, run.topology.world_size // run.tensor_parallel
    parts = (copies - 1) / copies * run.parts_parameters
    return 2.0 * ((world - 1) / world * run.replicated_parameters + parts) * run.master_bytes


@dataclass(frozen=True)
class _Traffic:
    """The traffic of tensor parallelism in a step: seconds, and bytes over all ranks or through one port."""

    seconds: float
    near: float
    far: float
    port: float
    uplink: float


def _tensor_traffic(run: RunShape) -> _Traffic:
    """Return the traffic of tensor parallelism in a step.

    Hidden states are gathered before a layer's first projection and scattered after its last one. The backward pass does the same, and
    gathers once more for the gradient of the first projection. Embedding and head scatter and gather once per direction.
    """
    config, topology, size = run.config, run.topology, run.tensor_parallel
    forwards = 2 if config.gradient_checkpointing else 1
    collectives = config.gradient_accumulation_steps * (len(run.base.layers) * (2 * forwards + 3) + 4)
    sent_D = collectives * (size - 1) * run.tokens_D * run.base.layers[0].hidden * run.dtype_bytes
    crossing = [group for group in run.mesh.tensor_groups() if len({topology.node_of_rank[rank] for rank in group}) > 1]
    link = topology.inter_node if crossing else topology.intra_node
    all_bytes, port, far = float(sent_D.sum()), float(sent_D.max()), float(sent_D[crossing].sum())
    seconds = port / link.bandwidth + collectives * link.latency if size > 1 else 0.0
    return _Traffic(seconds, all_bytes - far, far, port, float(sent_D[crossing].max()) if crossing else 0.0)


def _attention_seconds(run: RunShape) -> float:
    """Return the seconds of attention on the rank that takes longest.

    The backward pass of frozen projections costs as much as the forward pass; that of their adapters and of the scores costs twice as much.
    """
    config = run.config
    forwards = 2 if config.gradient_checkpointing else 1
    flops = 0.0
    for layer, (a, b) in zip(run.base.layers, run.adapters, strict=True):
        trained = 2.0 * (a + b) + 2.0 * config.data.seq_len * layer.query_width
        flops += (forwards + (2 if run.trains_non_experts else 1)) * 2.0 * layer.linear_parameters + (forwards + 2) * trained
    return flops * config.gradient_accumulation_steps * run.slowest_token_seconds


def _head_seconds(run: RunShape) -> float:
    """Return the seconds of the logits, of the gradient of their inputs, and of the head's gradient if it is trained."""
    gemms = 3 if run.trains_non_experts else 2
    flops = gemms * 2.0 * run.base.layers[0].hidden * run.base.vocabulary
    return flops * run.config.gradient_accumulation_steps * run.slowest_token_seconds


def _plain_ffn_seconds(run: RunShape) -> float:
    """Return the seconds of the FFNs that are no experts', apart from weights that are among `LayerShape.linears`."""
    forwards, backward = 2 if run.config.gradient_checkpointing else 1, 2 if run.trains_non_experts else 1
    if run.config.moe.kind.over_linears:
        weights = sum(outputs * inputs for layer in run.base.layers for _, outputs, inputs in layer.ffn_linears)
    else:
        experts = run.config.moe.experts_per_layer(len(run.base.layers))
        weights = sum(3 * layer.hidden * layer.ffn for layer, number in zip(run.base.layers, experts, strict=True) if not number)
    flops = (forwards + backward) * 2.0 * weights
    return flops * run.config.gradient_accumulation_steps * run.slowest_token_seconds
