"""The cases of a simulation: a model on a cluster under some loads, simulated under each policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hecate.apps.foresee.fsdp_ep import FSDP_EP, fsdp_ep_bytes, fsdp_ep_sizes, with_fsdp
from hecate.apps.foresee.sharding_groups import ep_group_sizes, simulate_groups, sum_over_groups, with_sum
from hecate.config.files.presets import base_named, find_preset, preset_names
from hecate.errors import UserError
from hecate.parallel.cluster.mesh import Mesh, make_mesh
from hecate.parallel.cluster.step_spread import step_spread
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.cost_model import HISTORY, ExecutionMode, LayerCost, PlanChoice, PlanMode, RouteChoice
from hecate.parallel.cost.model_shapes import ModelShape, load_model_shape
from hecate.parallel.plan.measured_modes import execution_of
from hecate.parallel.planners import COLLECTIVES, POLICIES, ROWS, WITH_OURS
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.simulator import USUAL_RUN_STEPS, Simulated, fullest_owner_bytes, simulate, slots_in_memory
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.megatron_traces import load_megatron_trace
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.policy_names import FORMER_NAMES, current_name, renamed
from hecate.parallel.values.traces import Trace, load_trace

_log = logging.getLogger(__name__)

BASELINE = "static_ep"
"""the policy that speed-ups compare with, in groups of the size that suits it best (`ep_group_sizes`)"""
SIMULATED = (*POLICIES, FSDP_EP)
"""what `all` compares: the policies that a run can have, and a baseline that is none"""
SAMPLED_LAYERS = 4
"""the number of layers that are simulated under a synthetic workload; results are scaled to the whole model, whose layers are equal"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a simulation, which are the same for all cases.

    Raises:
        UserError: several micro-steps that each gather and reduce for themselves.
    """

    policies: tuple[str, ...] = SIMULATED
    steps: int = 12
    """the number of steps that are simulated, of which all but the first stand for the later steps of the run"""
    run_steps: int = USUAL_RUN_STEPS
    """the steps of the run over which means are taken; at least those that are simulated"""
    seed: int = 0
    execution: ExecutionMode = HISTORY
    """how plans are executed, in all that their seconds depend on"""
    choose_modes: tuple[PlanMode, ...] = ()
    """in each step each layer goes by whichever of these has been fastest, in place of `execution.plan`; empty: all go by that"""
    max_imbalance: float | None = None
    shard_size: int | None = None
    """the number of ranks that share one copy of all experts (`fssdp.shard_size`); None: all"""

    def __post_init__(self) -> None:
        if self.execution.micro_steps > 1 and (self.execution.per_micro_step or self.choose_modes):
            raise UserError(
                f"micro_steps: {self.execution.micro_steps} micro-steps share no plan if each has its own, or replicas are rematerialized\n"
                "  simulate one of them, with its own tokens"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One model on one cluster under one kind of loads."""

    topology_name: str
    topology: Topology
    model: ModelShape
    workload: str
    """the name of one of `WORKLOADS`, or of a trace"""
    tokens_per_rank: int
    recorded: np.ndarray | None = None
    """the loads of a trace, int64 [steps, layers, experts, source ranks]; None: the workload makes the loads"""

    def run(self, options: Options, begins: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """Simulate the case and return a row of JSON values for each policy; see docs/use/simulator.md.

        Args:
            begins: a function that is called with the name of each policy before it is simulated.
        """
        model, topology = self.model, self.topology
        known = replace(self, recorded=self._loads(options))  # loads are drawn once for all policies
        found = []
        for name in options.policies:
            if begins is not None:
                begins(name)
            found.append(known._fsdp_ep(options) if name == FSDP_EP else known._simulate(name, options, options.shard_size))
        baseline = known.baseline(options) if BASELINE in options.policies else None
        facts = {
            "topology": self.topology_name,
            "ranks": topology.world_size,
            "model": model.name,
            "experts": model.experts,
            "kind": model.kind,
            "workload": self.workload,
            "tokens_per_rank": self.tokens_per_rank,
            "run_steps": max(options.run_steps, len(known._loads(options))),
            "spread": asdict(step_spread(topology)),
        }
        tokens = self.tokens_per_rank * topology.world_size
        per_second = sum(topology.price_per_hour) / 3600
        return [
            facts
            | one.as_dict()
            | {
                "shard_size": run.shard_size,
                f"speedup_over_{BASELINE}": None if baseline is None else baseline.step_seconds / one.step_seconds,
                "baseline_shard_size": None if baseline is None else baseline.shard_size,
                "tokens_per_second": tokens / one.step_seconds,
                "cost_per_million_tokens": per_second * one.step_seconds / tokens * 1e6 if topology.price_per_hour else None,
                "memory_bytes": run.held_bytes + one.replica_bytes,
                "fits_memory": run.fits(topology),
            }
            for run in found
            for one in [run.simulated]
        ]

    def baseline(self, options: Options) -> PolicyRun:
        """Return expert parallelism as people run it: in groups of the size with the fastest step, of those that fit if there are any."""
        runs = [self._simulate(BASELINE, options, size) for size in ep_group_sizes(self.topology, self.model.experts)]
        return min([run for run in runs if run.fits(self.topology)] or runs, key=lambda run: run.step_seconds)

    def _fsdp_ep(self, options: Options) -> PolicyRun:
        """Return FSDP over experts beside expert parallelism, in groups of the size with the fastest step, of those that fit; parameters
        are freed between the passes, or kept if there is room. If nothing fits it is what takes the least memory."""
        model, topology, runs = self.model, self.topology, []
        cost, sizes = self._layer_cost(options), {"num_layers": model.layers, "num_experts": model.experts}
        for size in fsdp_ep_sizes(topology.world_size, model.experts):
            mesh = make_mesh(topology.world_size, size)
            static = self._in_groups(BASELINE, options, mesh)
            for resharded in {options.execution.rematerialize, True}:
                one = with_fsdp(static, topology, cost, mesh, replace(options.execution, rematerialize=resharded), **sizes)
                held_bytes = model.replicated_bytes() + fsdp_ep_bytes(cost, mesh, **sizes, resharded=resharded)
                runs.append(PolicyRun(one, held_bytes, size))
        fitting = [run for run in runs if run.fits(topology)]
        return min(fitting, key=lambda run: run.step_seconds) if fitting else min(runs, key=lambda run: run.held_bytes)

    def _simulate(self, name: str, options: Options, shard_size: int | None) -> PolicyRun:
        """Simulate one policy in sharding groups of a size; None: all ranks are one."""
        model, topology, mesh = self.model, self.topology, make_mesh(self.topology.world_size, shard_size)
        cost, sizes = self._layer_cost(options), {"num_layers": model.layers, "num_experts": model.experts}
        experts_D = np.bincount(contiguous_owners(model.experts, mesh.shard_size), minlength=mesh.shard_size)
        owned_D = np.tile(experts_D * cost.reduced_bytes * model.layers, mesh.num_sharding_groups)
        messages = model.layers if cost.reduced_bytes else 0
        summed = sum_over_groups(owned_D, messages, topology, mesh)
        held_bytes = model.replicated_bytes() + fullest_owner_bytes(topology.take(range(mesh.shard_size)), cost, **sizes)
        return PolicyRun(with_sum(self._in_groups(name, options, mesh), *summed), held_bytes, mesh.shard_size)

    def _layer_cost(self, options: Options) -> LayerCost:
        """The cost of a layer, of which a gather hides behind one micro-step's attention."""
        return self.model.layer_cost(self.tokens_per_rank / options.execution.micro_steps)

    def _in_groups(self, name: str, options: Options, mesh: Mesh) -> Simulated:
        """Simulate one policy in sharding groups, without the sum over these."""
        model, loads, num_layers = self.model, self._loads(options), self.model.layers
        sizes, other_bytes = {"num_layers": num_layers, "num_experts": model.experts}, model.replicated_bytes()

        def of_group(loads: np.ndarray, part: Topology, cost: LayerCost) -> list[Simulated]:
            slots_D = slots_in_memory(part, cost, **sizes, other_bytes=other_bytes, rematerialize=options.execution.rematerialize)
            return simulate(
                loads,
                {name: ROWS[name]},
                Setting(
                    topology=part,
                    cost=cost,
                    slots_D=slots_D,
                    run_steps=max(options.run_steps, len(loads)),
                    execution=options.execution,
                    max_imbalance=options.max_imbalance,
                    num_layers=num_layers,
                    choose_modes=options.choose_modes,
                ),
                COLLECTIVES,
            )

        return simulate_groups(loads, self.topology, self._layer_cost(options), mesh, of_group)[0]

    def _loads(self, options: Options) -> np.ndarray:
        """Return the loads of all layers, or of a sample of them."""
        if self.recorded is not None:
            return self.recorded
        make, size = WORKLOADS[self.workload], (self.topology.world_size, self.model.experts, self.tokens_per_rank, self.model.top_k)
        return make(options.steps, min(self.model.layers, SAMPLED_LAYERS), *size, options.seed)


@dataclass(frozen=True)
class PolicyRun:
    """One policy's simulated step in sharding groups of one size."""

    simulated: Simulated
    held_bytes: float
    """the bytes on the fullest rank, without replicas and activations"""
    shard_size: int

    @property
    def step_seconds(self) -> float:
        return self.simulated.step_seconds

    def fits(self, topology: Topology) -> bool:
        return all(
            self.held_bytes + replicas <= memory for replicas, memory in zip(self.simulated.replica_bytes_D, topology.memory, strict=True)
        )


def topology_named(name: str, price_per_hour: float | None = None) -> Topology:
    """Return the topology of a preset or a file.

    Args:
        price_per_hour: of each device, in place of the file's; None: the file's, if it has any.

    Raises:
        UserError: the name or the file is wrong.
    """
    found = load_topology(find_preset("topologies", "topology", name))
    return found if price_per_hour is None else replace(found, price_per_hour=(price_per_hour,) * found.world_size)


def synthetic_cases(
    topology: str,
    model: str,
    workloads: Sequence[str],
    tokens_per_rank: int,
    experts: int | None = None,
    *,
    price_per_hour: float | None = None,
) -> list[Case]:
    """Return a case for each workload. Names are those of presets, or paths of files.

    Args:
        experts: replaces the model's own number of experts, unless None.
        price_per_hour: see `topology_named`.

    Raises:
        UserError: a name or a file is wrong, or a number out of range.
    """
    machines = topology_named(topology, price_per_hour)
    if model not in preset_names("models") and base_named(model):
        raise UserError(
            f"--model {model}: is a base without experts, which a configuration gives it\n"
            f"  hecate plan mixlora model.name_or_path={model} --topology {topology}"
        )
    shape = load_model_shape(find_preset("models", "model", model))
    if experts is not None:
        shape = replace(shape, experts=experts)
    return [
        Case(
            topology_name=Path(topology).stem,
            topology=machines,
            model=shape,
            workload=workload,
            tokens_per_rank=tokens_per_rank,
        )
        for workload in workloads
    ]


def trace_case(topology: str, model: str, trace_path: Path, *, price_per_hour: float | None = None) -> Case:
    """Return a case of recorded loads, which determine the numbers of layers, experts and tokens.

    Args:
        price_per_hour: see `topology_named`.

    Raises:
        UserError: a name or a file is wrong, or the trace has another number of ranks.
    """
    machines = topology_named(topology, price_per_hour)
    shape = load_model_shape(find_preset("models", "model", model))
    trace = _recorded(trace_path, shape)
    sources = trace.loads.shape[3]
    if sources != machines.world_size:
        raise UserError(f"{trace_path}: recorded on {sources} ranks, but topology {topology} has {machines.world_size} devices")
    if len(set(trace.num_experts)) > 1:
        raise UserError(
            f"{trace_path}: its layers have {', '.join(map(str, sorted(set(trace.num_experts))))} experts; "
            "the simulator needs the same number in every layer"
        )
    return Case(
        topology_name=Path(topology).stem,
        topology=machines,
        model=replace(shape, experts=trace.num_experts[0], top_k=trace.top_k, layers=len(trace.units)),
        workload=trace_path.stem,
        tokens_per_rank=trace.tokens_per_rank,
        recorded=trace.loads.astype(np.int64),
    )


def _recorded(path: Path, shape: ModelShape) -> Trace:
    """A trace of a run of hecate's, or of Megatron's, which says nothing of the number of experts."""
    is_megatron = path.suffix == ".jsonl" or (path.is_dir() and any(path.glob("*.jsonl")))
    return load_megatron_trace(path, shape.experts, model=shape.name) if is_megatron else load_trace(path)


def chosen_names(names: str | Sequence[str], known: Sequence[str], what: str, *, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Return names out of `known` and `more`, given as a list or as text: `all`, which is those of `known`, or names separated by commas.

    Raises:
        UserError: a name is unknown, or there is none; the text lists the known ones.
    """
    listed = _listed(names)
    if listed == ["all"]:
        return tuple(known)
    unknown = [str(name) for name in listed if name not in (*known, *more)]
    if unknown or not listed:
        found = f"unknown: {', '.join(unknown)[:300]}" if unknown else "none given"
        raise UserError(f"{what}: {found}\n  there are all, {', '.join((*known, *more))}")
    return tuple(dict.fromkeys(listed))


def chosen_policies(names: str | Sequence[str], what: str) -> tuple[str, ...]:
    """Return the names of policies, as `chosen`; rows such as `laer+ours` only if they are named. A former name is taken for the present
    one, and a line on stderr says so.

    Raises:
        UserError: a name is unknown, or there is none; the text lists the known ones.
    """
    listed = _listed(names)
    for name in dict.fromkeys(listed):
        if name in FORMER_NAMES:
            _log.warning(f"hecate: {renamed(what, name)}")
    return chosen_names([current_name(name) for name in listed], SIMULATED, what, more=tuple(WITH_OURS))


def _listed(names: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)


def known_plan(name: object, prefetch: int, what: str) -> tuple[PlanMode, tuple[PlanMode, ...]]:
    """Return how layers are planned with `fssdp.plan` of a name: `ExecutionMode.plan` and `Options.choose_modes`.

    Raises:
        UserError: there is none that can be simulated.
    """
    known: tuple[PlanChoice, ...] = (*get_args(PlanMode), "auto")
    for choice in known:
        if choice == name:
            return execution_of(choice, prefetch)
    raise UserError(f"{what} must be one of {', '.join(known)}, got {name!r}")


def known_route(name: object, what: str) -> RouteChoice:
    """Return the name of a route of experts.

    Raises:
        UserError: there is no such route.
    """
    for route in get_args(RouteChoice):
        if route == name:
            return route
    raise UserError(f"{what} must be one of {', '.join(get_args(RouteChoice))}, got {name!r}")
