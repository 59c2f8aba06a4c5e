"""Simulates training steps under placement policies, without a GPU: their seconds, bytes and memory by the cost model.

A policy plans each step, and the step's true loads are then served by that plan. In `history` mode a policy plans from what the last steps'
loads predict, as in training (`hecate.parallel.predictors`). In `exact` mode it plans from the true loads, which are known after the
routers; attention has ended by then and hides no gather. This holds for `full`, too, which needs no loads: in exact mode the engine plans
and gathers a layer after its router. In `replay` mode it plans from the true loads, too, but they are known before the step, so that
attention hides the gather. In `calibrated` mode a plan from history is replaced, layer by layer, by one from the true loads where that pays
after the router.

Shapes: L layers, E experts, S = D ranks as sources and as destinations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from hecate.parallel.cost_loops import exposed_seconds
from hecate.parallel.cost_model import HISTORY, ExecutionMode, LayerCost, LayerSeconds, Priced, Rows, cost_numbers, price
from hecate.parallel.executed_flows import served
from hecate.parallel.flows import Flows, node_membership
from hecate.parallel.gather_bytes import PortBytes, gather_ports
from hecate.parallel.layer_plan import LayerPlan, best_after_router, layer_plan, price_missing
from hecate.parallel.placement import contiguous_owners
from hecate.parallel.planners import Collective, Plan, PlanInput, Planner, plan_with
from hecate.parallel.planners.auto import plan_auto
from hecate.parallel.planners.plan import check_loads
from hecate.parallel.predictors import predicted_loads
from hecate.parallel.sharded_gather import with_sharded_gather
from hecate.parallel.sharding import better_owners, owned_bytes, reshard_seconds
from hecate.parallel.source_split import stacked
from hecate.parallel.topology import Topology

HISTORY_STEPS = 5
"""from which the next one's loads are predicted, as by `fssdp.load_window` (Hecate §3.2)"""
Predictor = Callable[[np.ndarray], np.ndarray]
"""a function of the loads of all steps so far, int64 [steps, layers, experts, source ranks], that returns the next step's, float64"""


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Where the seconds of a step go, all layers together."""

    attention: float
    """forward and backward, on the slowest device"""
    compute: float
    """experts, on the slowest device of each layer"""
    dispatch: float
    gather: float
    """SparseAllGather, hidden or not"""
    reduce: float
    """SparseReduceScatter, hidden or not"""
    exposed: float
    """what gather and reduce add"""
    optimizer: float
    reshard: float
    """moving experts to new owners"""
    all_reduce: float = 0.0
    """summing the owners' gradients over sharding groups, as if nothing hid it"""

    @property
    def total(self) -> float:
        return self.attention + self.compute + self.dispatch + self.exposed + self.optimizer + self.reshard + self.all_reduce


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of a step, all layers together: parameters, gradients, tokens' rows and what re-sharding moves."""

    near: float
    """between ranks of a node, sent by all of them"""
    far: float
    """between nodes, sent by all of them"""
    busiest_port: float
    """through one rank's port inside its node, in its busier direction"""
    busiest_uplink: float
    """through one node's uplink, in its busier direction"""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One policy's mean over the counted steps."""

    policy: str
    seconds: StepSeconds
    bytes: StepBytes
    imbalance: float
    """largest expert compute time of a rank over what it would be if all shared the work by their rates; mean over layers"""
    replica_bytes_D: tuple[float, ...]
    """memory of each rank's replicas of others' experts (parameters, gradients, frozen parts), in its fullest step"""
    served_tokens_D: tuple[float, ...]
    """distinct tokens that each rank computes in a layer, in its fullest step; mean over layers"""
    most_tokens_D: tuple[float, ...]
    """the same of its fullest layer"""
    planner_ms_per_layer: float
    """measured, on this machine"""

    @property
    def step_seconds(self) -> float:
        return self.seconds.total

    @property
    def replica_bytes(self) -> float:
        """Memory of the replicas on the fullest rank, in bytes."""
        return max(self.replica_bytes_D)

    def as_dict(self) -> dict[str, Any]:
        """The results as JSON values (docs/simulator.md)."""
        beside = ("policy", "replica_bytes_D", "served_tokens_D", "most_tokens_D")
        whole = {"policy": self.policy, "step_seconds": self.step_seconds, "replica_bytes": self.replica_bytes}
        return whole | {name: value for name, value in asdict(self).items() if name not in beside}


def simulate(
    loads: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    policies: Mapping[str, Planner],
    *,
    slots_D: np.ndarray,
    execution: ExecutionMode = HISTORY,
    history_steps: int = HISTORY_STEPS,
    predict: Predictor | None = None,
    max_imbalance: float | None = None,
    reshard_interval: int | None = None,
    num_layers: int | None = None,
    collectives: Mapping[str, Collective] | None = None,
) -> list[Simulated]:
    """Put loads through each policy, all layers alike.

    The first step, which `history` plans without loads, is counted only if it is the only one.

    Args:
        loads: int64 [steps, layers, experts, source ranks]: assignments (see `hecate.parallel.loads`).
        policies: name -> planner, such as `hecate.parallel.planners.POLICIES`.
        slots_D: int64 [ranks]: see `PlanInput.slots_D`.
        execution: how plans are executed; see `ExecutionMode`.
        history_steps: the most steps from which the next one's loads are predicted.
        predict: predicts in place of `predicted_loads`.
        max_imbalance: see `PlanInput.max_imbalance`.
        reshard_interval: every so many steps `hecate_paper` and `auto` move experts to better owners where that pays; None: never.
        num_layers: of the model, of which the loads' layers are a sample; seconds, bytes and memory are scaled to them. None: no sample.
        collectives: of policies by name, where they are not those of `execution`, such as `hecate.parallel.planners.COLLECTIVES`.

    Raises:
        UserError: a load is negative or not finite.
    """
    assert loads.ndim == 4, loads.shape
    assert loads.shape[3] == topology.world_size, (loads.shape, topology.world_size)
    check_loads(loads, loads.shape)
    if predict is None:
        predict = partial(predicted_loads, window=history_steps, lasting=cost.frozen_bytes > 0)
    setting = _Setting(topology, cost, slots_D, execution, predict, max_imbalance, reshard_interval, num_layers or loads.shape[1])
    return [
        _simulate_policy(name, planner, loads, setting.of_collective((collectives or {}).get(name))) for name, planner in policies.items()
    ]


@dataclass(frozen=True, eq=False)
class _Setting:
    """What all policies have in common: the arguments of `simulate`."""

    topology: Topology
    cost: LayerCost
    slots_D: np.ndarray
    execution: ExecutionMode
    predict: Predictor
    max_imbalance: float | None
    reshard_interval: int | None
    num_layers: int
    sharded: bool = False
    """experts travel as parts (`sharded_gather`)"""

    def of_collective(self, collective: Collective | None) -> _Setting:
        if collective is None or self.execution.route != "fastest":  # a route that is given holds for all policies
            return self
        return replace(self, sharded=True) if collective == "sharded" else replace(self, execution=replace(self.execution, route="flat"))


_RESHARDING = ("hecate_paper", "auto")
_REPLANS = {"smartmoe": (10, 2)}
"""policy -> it plans every so many steps only, from the mean loads of the last so many"""


def replica_slots(
    topology: Topology, cost: LayerCost, *, num_layers: int, num_experts: int, other_bytes: float = 0.0, rematerialize: bool = False
) -> np.ndarray:
    """int64 [ranks]: replicas of others' experts for which each device has room, in each layer: half of what is left, the other half being
    for activations.

    Args:
        other_bytes: what every rank holds beside its experts.
        rematerialize: replicas of one layer are there at a time, but for their frozen parts.
    """
    owned = fullest_owner_bytes(topology, cost, num_layers=num_layers, num_experts=num_experts)
    room_D = (np.asarray(topology.memory) - other_bytes - owned).clip(0) / 2
    one_layer = cost.replica_bytes - cost.frozen_bytes
    each = cost.frozen_bytes * num_layers + one_layer * (1 if rematerialize else num_layers)
    if each == 0:
        return np.full(topology.world_size, num_experts)
    return np.minimum(room_D / each, num_experts).astype(np.int64)


def fullest_owner_bytes(topology: Topology, cost: LayerCost, *, num_layers: int, num_experts: int) -> float:
    """What a rank's own experts take, on the rank with the most: state, gradients, frozen parts, and the parameters computed with."""
    each_layer = -(-num_experts // topology.world_size)
    return num_layers * each_layer * (cost.trainable_bytes + owned_bytes(cost))


def _simulate_policy(name: str, planner: Planner, loads: np.ndarray, setting: _Setting) -> Simulated:
    num_steps, num_layers, num_experts, world_size = loads.shape
    knows = setting.execution.knows_loads
    first_known = 0 if knows else 1
    interval, averaged = (1, None) if knows else _REPLANS.get(name, (1, None))
    reshard_interval = setting.reshard_interval if name in _RESHARDING else None
    owner_LE = np.tile(contiguous_owners(num_experts, world_size), (num_layers, 1))
    placed_LED: np.ndarray | None = None
    steps: list[_Step] = []
    planner_seconds: list[float] = []
    given: PlanInput | None = None
    plan: Plan | None = None
    for step in range(num_steps):
        owner_before_LE = owner_LE
        if given is None or plan is None or (step - first_known) % interval == 0:
            if knows:
                known_LED = loads[step].astype(np.float64)
            elif step == 0:
                known_LED = None
            else:
                known_LED = setting.predict(loads[:step]) if averaged is None else loads[max(step - averaged, 0) : step].mean(0)
            given = PlanInput(
                owner_LE,
                known_LED,
                setting.topology,
                setting.cost,
                setting.slots_D,
                resident_LED=placed_LED,
                max_imbalance=setting.max_imbalance,
                execution=setting.execution,
                present_LED=placed_LED,
            )
            if reshard_interval and (step - first_known) % reshard_interval == 0:
                found = better_owners(planner, [given], reshard_interval)
                given = given if found is None else replace(given, owner_LE=found[0][0])
            started = time.perf_counter()
            plan = plan_with(planner, given)
            planner_seconds.append(time.perf_counter() - started)
        better = None
        if setting.execution.plan == "calibrated":
            better = _better(planner, plan, given, loads[step])
        steps.append(_execute(plan, given.expected_LED, loads[step], owner_before_LE, placed_LED, setting, better))
        owner_LE, placed_LED = plan.owner_LE, plan.where_LED
    counted = steps[1:] or steps
    scale = setting.num_layers / num_layers
    return Simulated(
        policy=name,
        seconds=StepSeconds(**_mean([one.seconds for one in counted], scale)),
        bytes=StepBytes(**_mean([one.bytes for one in counted], scale)),
        imbalance=float(np.mean([one.imbalance for one in counted])),
        replica_bytes_D=tuple(np.max([one.replica_bytes_D for one in counted], axis=0).tolist()),
        served_tokens_D=tuple(np.max([one.served_tokens_D for one in counted], axis=0).tolist()),
        most_tokens_D=tuple(np.max([one.most_tokens_D for one in counted], axis=0).tolist()),
        planner_ms_per_layer=1e3 * float(np.median(planner_seconds)) / num_layers,
    )


@dataclass(frozen=True)
class _Step:
    seconds: StepSeconds
    bytes: StepBytes
    imbalance: float
    replica_bytes_D: np.ndarray
    served_tokens_D: np.ndarray
    most_tokens_D: np.ndarray


def _execute(
    plan: Plan,
    planned_LED: np.ndarray,
    true_LED: np.ndarray,
    owner_before_LE: np.ndarray,
    resident_LED: np.ndarray | None,
    setting: _Setting,
    better: _Better | None,
) -> _Step:
    """What the step's true loads come to under a plan made for `planned_LED`, and in some layers, after the router, a better one."""
    topology = setting.topology
    # Planners pay a frozen part over its lifetime; the simulator pays it in the step in which it travels.
    cost = replace(setting.cost, frozen_lifetime=1.0)
    loads_LED = true_LED.astype(np.float64)
    flow = plan.flow(planned_LED, loads_LED, topology)
    priced = price(plan.owner_LE, plan.where_LED, flow, loads_LED, topology, cost, execution=setting.execution, resident_ED=resident_LED)
    if setting.sharded and plan.quota_LED is not None:
        priced = with_sharded_gather(priced, plan.quota_LED > 0, topology, cost, setting.execution)
    seconds, brought = priced.seconds, None
    where_LED, before = plan.where_LED, priced
    if better is not None:
        where_LED, flow = better.where_LED, better.flow(loads_LED, topology)
        priced = price(plan.owner_LE, where_LED, flow, loads_LED, topology, replace(cost, frozen_bytes=0.0), execution=setting.execution)
        brought = price_missing(plan.owner_LE, plan.where_LED, where_LED, topology, cost, resident_LED)
        seconds = _after_calibration(before.seconds, priced.seconds, brought.seconds.gather, setting)
    moved = (plan.owner_LE != owner_before_LE).any()
    step_seconds = StepSeconds(
        attention=3 * cost.non_moe_flops / min(topology.flops) * len(loads_LED),
        reshard=reshard_seconds(owner_before_LE, plan.owner_LE, topology, cost) if moved else 0.0,
        **{field.name: float(getattr(seconds, field.name).sum()) for field in fields(seconds)},
    )
    return _Step(
        step_seconds,
        _bytes(plan, before, priced, brought, owner_before_LE, topology, cost, setting.execution.rematerialize),
        _imbalance(priced.rows, served(flow), topology, cost),
        _replica_bytes(plan.owner_LE, plan.where_LED | where_LED, setting),
        priced.rows.computed_D.mean(0),
        priced.rows.computed_D.max(0),
    )


@dataclass(frozen=True, eq=False)
class _Better:
    """The plan of every layer after its router, which in some layers is the one of before."""

    layers: list[LayerPlan]

    @property
    def where_LED(self) -> np.ndarray:
        """bool [layers, experts, ranks]"""
        return np.stack([layer.placement.where_ED for layer in self.layers])

    def flow(self, loads_LED: np.ndarray, topology: Topology) -> Flows:
        return stacked([layer.flow(loads_ED, topology) for layer, loads_ED in zip(self.layers, loads_LED, strict=True)])


def _better(planner: Planner, plan: Plan, given: PlanInput, true_LED: np.ndarray) -> _Better:
    """The plans that training would make after the routers."""
    known = replace(given, owner_LE=plan.owner_LE, loads_LED=true_LED.astype(np.float64))
    present = [layer_plan(plan, given, layer) for layer in range(len(true_LED))]
    found = best_after_router(partial(plan_with, planner), known, present, splits=planner is plan_auto)
    return _Better([better if gain > 0 else now for now, (gain, better) in zip(present, found, strict=True)])


def _after_calibration(before: LayerSeconds, after: LayerSeconds, brought_L: np.ndarray, setting: _Setting) -> LayerSeconds:
    """The gather is that of the plan before, hidden as it is, and what the plan after needs besides, which nothing hides."""
    hides = cost_numbers(setting.cost, setting.topology, setting.execution).hides_gather
    slowdown = setting.topology.overlap_slowdown
    exposed = [
        total + exposed_seconds(hides, first, slowdown) - exposed_seconds(hides, own, slowdown)
        for total, first, own in zip(after.exposed, before.gather, after.gather, strict=True)
    ]
    return replace(after, gather=before.gather + brought_L, exposed=np.array(exposed) + brought_L)


def _bytes(
    plan: Plan,
    before: Priced,
    priced: Priced,
    brought: Priced | None,
    owner_before_LE: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    rematerialize: bool,
) -> StepBytes:
    """Bytes of the gather `before` the router, what is `brought` after it, and all that follows with the plan that is priced."""
    gather, row_ports = priced.gathered, PortBytes(*priced.rows.near, *priced.rows.far)
    parts = [
        (before.gathered, cost.trainable_bytes),
        (gather, cost.trainable_bytes if rematerialize else 0.0),
        (gather.reversed(), cost.reduced_bytes),
        # Rows go out and their gradients back, results come back and theirs go out.
        (row_ports, 2 * cost.row_bytes),
        (row_ports.reversed(), 2 * cost.row_bytes),
        (before.gathered_frozen, cost.frozen_bytes),
    ]
    if brought is not None:
        parts += [(brought.gathered, cost.trainable_bytes), (brought.gathered_frozen, cost.frozen_bytes)]
    if (plan.owner_LE != owner_before_LE).any():
        owned_LED = _at(plan.owner_LE, topology)
        moved = gather_ports(owner_before_LE, owned_LED | _at(owner_before_LE, topology), topology)
        parts.append((moved, cost.state_bytes + cost.frozen_bytes))
    near_out, near_in, far_out, far_in = (
        sum(size * getattr(ports, name).sum(0) for ports, size in parts) for name in ("near_out_D", "near_in_D", "far_out_D", "far_in_D")
    )
    member_DN = node_membership(topology)
    return StepBytes(
        near=float(near_out.sum()),
        far=float(far_out.sum()),
        busiest_port=float(np.maximum(near_out, near_in).max()),
        busiest_uplink=float(np.maximum(far_out @ member_DN, far_in @ member_DN).max()),
    )


def _imbalance(rows: Rows, quota_LED: np.ndarray, topology: Topology, cost: LayerCost) -> float:
    rate_D = np.asarray(topology.flops)
    work_LD = rows.computed_D * cost.row_flops * (1 + cost.row_backward)
    work_LD = work_LD + quota_LED.sum(1) * cost.assignment_flops * (1 + cost.assignment_backward)
    even_L = work_LD.sum(1) / rate_D.sum()
    busiest_L = (work_LD / rate_D).max(1)
    return float(np.divide(busiest_L, even_L, out=np.ones_like(even_L), where=even_L > 0).mean())


def _replica_bytes(owner_LE: np.ndarray, where_LED: np.ndarray, setting: _Setting) -> np.ndarray:
    replicas_LD = (where_LED & ~_at(owner_LE, setting.topology)).sum(1)
    every_D = replicas_LD.sum(0) * setting.num_layers / len(replicas_LD)
    at_once_D = replicas_LD.max(0) if setting.execution.rematerialize else every_D
    frozen, moving = setting.cost.frozen_bytes, setting.cost.replica_bytes - setting.cost.frozen_bytes
    return np.asarray(at_once_D * moving + every_D * frozen)


def _mean(records: list[Any], scale: float) -> dict[str, float]:
    return {field.name: scale * float(np.mean([getattr(one, field.name) for one in records])) for field in fields(records[0])}


def _at(owner_LE: np.ndarray, topology: Topology) -> np.ndarray:
    """bool [layers, experts, ranks]"""
    return np.asarray(owner_LE[..., None] == np.arange(topology.world_size))
