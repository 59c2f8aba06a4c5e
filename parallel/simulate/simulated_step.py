"""One step of a simulation: layers are planned, and the step's true loads are served by their plans (`hecate.parallel.simulate.simulator`).

Shapes: L layers, M some of them, E experts, S = D ranks as sources and as destinations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import SERVED, exposed_seconds
from hecate.parallel.cost.cost_model import (
    HISTORY,
    ExecutionMode,
    LayerCost,
    LayerSeconds,
    PlanMode,
    Priced,
    Rows,
    cost_numbers,
    price_missing,
    price_traffic,
)
from hecate.parallel.cost.flows import node_membership
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.cost.planning_seconds import planning_seconds
from hecate.parallel.plan.after_router import best_after_router
from hecate.parallel.plan.sharding import reshard_ports, reshard_seconds
from hecate.parallel.planners import Collective, LayerPlan, Plan, PlanInput, Planner, plan_with
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.planners.rivals.sharded_gather import with_sharded_gather
from hecate.parallel.transfer.residency import Residency, expected_uses

HISTORY_STEPS = 5
"""the most steps from which the next one's loads are predicted, as by `fssdp.load_window` (Hecate §3.2)"""
Predictor = Callable[[np.ndarray], np.ndarray]
"""a function of the loads of all steps so far, int64 [steps, layers, experts, source ranks], that returns the next step's, float64"""
Lifetime = Callable[[Sequence[Residency], int | None], float]
"""a function of the layers' residency and of the steps that are left of the run (None: not known) that returns a number of steps"""


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Where the seconds of a step go, summed over all layers."""

    attention: float
    """the attention's forward and backward pass, on the slowest device"""
    compute: float
    """the experts' computation, on the slowest device of each layer"""
    dispatch: float
    gather: float
    """the SparseAllGather, hidden or not"""
    reduce: float
    """the SparseReduceScatter, hidden or not"""
    exposed: float
    """what gather and reduce add to the step"""
    optimizer: float
    reshard: float
    """the moves of experts to new owners"""
    all_reduce: float = 0.0
    """the sums of the owners' gradients over sharding groups, as if nothing hid them"""

    planning: float = 0.0
    """what ranks wait for plans of `auto`; other policies' plans count as ready at once"""

    @property
    def total(self) -> float:
        travels = self.dispatch + self.exposed + self.reshard + self.all_reduce
        return self.attention + self.compute + travels + self.optimizer + self.planning


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of a step, summed over all layers: parameters, gradients, tokens' rows and what re-sharding moves."""

    near: float
    """the bytes that all ranks send inside their nodes"""
    far: float
    """the bytes that all ranks send to other nodes"""
    busiest_port: float
    """the bytes through the busiest rank's port inside its node, in its busier direction"""
    busiest_uplink: float
    """the bytes through the busiest node's uplink, in its busier direction"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What all policies of a simulation have in common."""

    topology: Topology
    cost: LayerCost
    slots_D: np.ndarray
    """int64 [ranks]: see `PlanInput.slots_D`"""
    execution: ExecutionMode = HISTORY
    """how plans are executed"""
    window: int = HISTORY_STEPS
    """the most steps from which the next one's loads are predicted"""
    predict: Predictor | None = None
    """predicts in place of `predicted_loads`"""
    lifetime: Lifetime = expected_uses
    """over how many steps planners pay a replica's frozen part"""
    run_steps: int | None = None
    """the steps of the run over which means are taken, of which the simulated ones are the first; None: so many that the first ones do not
    count"""
    max_imbalance: float | None = None
    """see `PlanInput.max_imbalance`"""
    reshard_interval: int | None = None
    """every so many steps `hecate_paper` and `auto` move experts to better owners where that pays; None: never"""
    num_layers: int | None = None
    """the model's layers, of which the loads' are a sample; seconds, bytes and memory are scaled to them. None: no sample"""
    choose_modes: tuple[PlanMode, ...] = ()
    """in each step each layer goes by whichever of these modes would have been fastest over the last steps (`modes_of`);
    `execution.plan` is history. Loads are those of all micro-steps, each of which gathers the layers of the modes calibrated and exact
    for itself. Empty: all layers go by `execution.plan`"""
    sharded: bool = False
    """whether experts travel as parts (`sharded_gather`)"""
    owner_E: np.ndarray | None = None
    """int64 [experts]: the owner of each layer's experts at the beginning; None: runs of equal length (`contiguous_owners`)"""

    @property
    def first_steps(self) -> int:
        """The number of steps that no later step is like: the one that `history` plans without loads, and the next one, in which most
        frozen parts arrive, or, in a run of known length, no mode has been measured yet."""
        return 2 if self.cost.frozen_bytes or (self.choose_modes and self.run_steps is not None) else 1

    def of_collective(self, collective: Collective | None) -> Setting:
        """The same for a policy whose experts travel in this way."""
        if collective is None or self.execution.route != "fastest":  # a route that is given holds for all policies
            return self
        return replace(self, sharded=True) if collective == "sharded" else replace(self, execution=replace(self.execution, route="flat"))


@dataclass(frozen=True, eq=False)
class Planned:
    """The plan of some layers, which are planned from the same loads."""

    layer_M: np.ndarray
    """int64 [these layers]: their numbers"""
    plan: Plan
    given: PlanInput
    times: int
    """micro-steps that gather for themselves, each of which such a plan serves"""
    planning: float
    """seconds that ranks wait for plans in the whole step"""


def plan_layers(planner: Planner, given: PlanInput, layer_M: np.ndarray, true_LED: np.ndarray, mode: PlanMode, setting: Setting) -> Planned:
    """Plan some layers in one mode: a step, or one of the micro-steps that gather for themselves.

    Args:
        given: for all layers, a plan from history.
        layer_M: int64 [some layers]: which are planned now.
        true_LED: int64 [layers, experts, source ranks], of all layers.
        mode: of these layers.
    """
    execution = replace(given.execution, plan=mode)
    times = execution.micro_steps if setting.choose_modes and execution.per_micro_step else 1
    whole_LED = true_LED.astype(np.float64) if execution.knows_loads else given.loads_LED
    part = replace(
        given,
        owner_LE=given.owner_LE[layer_M],
        loads_LED=None if whole_LED is None else whole_LED[layer_M] / times,
        resident_LED=None if given.resident_LED is None else given.resident_LED[layer_M],
        present_LED=None if given.present_LED is None else given.present_LED[layer_M],
        cost=replace(given.cost, frozen_lifetime=given.cost.frozen_lifetime * times),
        execution=execution,
    )
    waits = planning_seconds(mode, part.num_experts, part.topology) if planner is plan_auto else 0.0
    return Planned(layer_M, plan_with(planner, part), part, times, execution.micro_steps * len(layer_M) * waits)


@dataclass(frozen=True, eq=False)
class Executed:
    """What a step's true loads have come to in some layers."""

    seconds: StepSeconds
    ports: PortBytes
    """bytes through each rank's ports, float64 [ranks] each"""
    imbalance_L: np.ndarray
    replicas_LD: np.ndarray
    """the replicas of other ranks' experts that each rank has"""
    frozen_LD: np.ndarray
    """the frozen parts of other ranks' experts that each rank has, those that are kept for later steps included"""
    computed_LD: np.ndarray
    """the distinct tokens that each rank computes"""


@dataclass(frozen=True)
class SimulatedStep:
    seconds: StepSeconds
    bytes: StepBytes
    imbalance: float
    replica_bytes_D: np.ndarray
    replicas_D: np.ndarray
    """see `Simulated.replicas_D`, and so on"""
    frozen_parts_D: np.ndarray
    served_tokens_D: np.ndarray
    most_tokens_D: np.ndarray


def execute(
    planned: Planned,
    true_LED: np.ndarray,
    owner_before_LE: np.ndarray,
    resident_LED: np.ndarray | None,
    kept_LED: np.ndarray | None,
    setting: Setting,
    better: Sequence[LayerPlan] | None,
) -> Executed:
    """What the true loads of all layers come to in those of `planned`, in some of which a better plan takes its place after the router.

    Args:
        resident_LED: bool [layers, experts, ranks]: frozen parts that ranks hold before the step; None: experts have none.
        kept_LED: the same once the plan's have been fetched.
        better: see `better_after_router`.
    """
    plan, times, layer_M, execution, topology = planned.plan, planned.times, planned.layer_M, planned.given.execution, setting.topology
    # Planners pay a frozen part over its lifetime; the simulator pays it in the step in which it travels, in one of its micro-steps.
    cost = replace(setting.cost, frozen_lifetime=float(times))
    loads_LED, owner_before_LE = true_LED[layer_M] / times, owner_before_LE[layer_M]
    resident_LED = None if resident_LED is None else resident_LED[layer_M]
    traffic_LXD = plan.traffic(planned.given.expected_LED, loads_LED, topology)
    priced = price_traffic(plan.owner_LE, plan.where_LED, traffic_LXD, topology, cost, execution=execution, resident_ED=resident_LED)
    if setting.sharded and plan.quota_LED is not None:
        priced = with_sharded_gather(priced, plan.quota_LED > 0, topology, cost, execution)
    seconds, brought = priced.seconds, None
    where_LED, before = plan.where_LED, priced
    if better is not None:
        where_LED = np.stack([layer.placement.where_ED for layer in better])
        traffic_LXD = np.stack([layer.traffic(loads_ED, topology) for layer, loads_ED in zip(better, loads_LED, strict=True)])
        priced = price_traffic(plan.owner_LE, where_LED, traffic_LXD, topology, replace(cost, frozen_bytes=0.0), execution=execution)
        brought = price_missing(plan.owner_LE, plan.where_LED, where_LED, topology, cost, resident_LED)
        seconds = _after_calibration(before.seconds, priced.seconds, brought.seconds.gather, setting, execution)
    moved = (plan.owner_LE != owner_before_LE).any()
    step_seconds = StepSeconds(
        attention=execution.micro_steps * (1 + cost.non_moe_backward) * cost.non_moe_flops / min(topology.flops) * len(loads_LED),
        reshard=reshard_seconds(owner_before_LE, plan.owner_LE, topology, cost) if moved else 0.0,
        optimizer=float(seconds.optimizer.sum()),
        planning=planned.planning,
        **{name: times * float(getattr(seconds, name).sum()) for name in ("compute", "dispatch", "gather", "reduce", "exposed")},
    )
    others_LED = ~planned.given.owned_LED
    used_LED = plan.where_LED | where_LED
    held_LED = used_LED if kept_LED is None else used_LED | kept_LED[layer_M]
    return Executed(
        step_seconds,
        _bytes(planned, (before, priced, brought), owner_before_LE, topology, cost),
        _imbalance(priced.rows, traffic_LXD[:, SERVED], topology, cost),
        (used_LED & others_LED).sum(1),
        (held_LED & others_LED).sum(1),
        times * priced.rows.computed_D,
    )


def all_layers(executed: list[Executed], setting: Setting) -> SimulatedStep:
    """The figures of a step, summed over its layers or taken of the worst."""
    replicas_LD, frozen_LD, computed_LD = (
        np.concatenate([getattr(part, name) for part in executed]) for name in ("replicas_LD", "frozen_LD", "computed_LD")
    )
    near_out, near_in, far_out, far_in = (sum(getattr(part.ports, field.name) for part in executed) for field in fields(PortBytes))
    member_DN = node_membership(setting.topology)
    cost, all_layers = setting.cost, (setting.num_layers or len(replicas_LD)) / len(replicas_LD)
    replicas_D = replicas_LD.max(0) if setting.execution.rematerialize else replicas_LD.sum(0) * all_layers
    frozen_D = frozen_LD.sum(0) * all_layers
    return SimulatedStep(
        StepSeconds(**{field.name: sum(getattr(part.seconds, field.name) for part in executed) for field in fields(StepSeconds)}),
        StepBytes(
            near=float(np.sum(near_out)),
            far=float(np.sum(far_out)),
            busiest_port=float(np.maximum(near_out, near_in).max()),
            busiest_uplink=float(np.maximum(far_out @ member_DN, far_in @ member_DN).max()),
        ),
        float(np.concatenate([part.imbalance_L for part in executed]).mean()),
        replicas_D * (cost.replica_bytes - cost.frozen_bytes) + frozen_D * cost.frozen_bytes,
        replicas_D,
        frozen_D,
        computed_LD.mean(0),
        computed_LD.max(0),
    )


def better_after_router(planner: Planner, planned: Planned, true_LED: np.ndarray) -> list[LayerPlan] | None:
    """The plans that training would go by after the routers, in some layers the one of before; None: it would make none."""
    plan, given = planned.plan, planned.given
    if given.execution.plan != "calibrated":
        return None
    known = replace(given, owner_LE=plan.owner_LE, loads_LED=true_LED[planned.layer_M] / planned.times)
    present = [plan.layer(given, layer) for layer in range(len(planned.layer_M))]
    found = best_after_router(partial(plan_with, planner), known, present, splits=planner is plan_auto)
    return [better if gain > 0 else before for before, (gain, better) in zip(present, found, strict=True)]


def _after_calibration(
    before: LayerSeconds, after: LayerSeconds, brought_L: np.ndarray, setting: Setting, execution: ExecutionMode
) -> LayerSeconds:
    """The gather is that of the plan before, hidden as it is, and what the plan after needs besides, which nothing hides."""
    hides = cost_numbers(setting.cost, setting.topology, execution).hides_gather
    slowdown = setting.topology.overlap_slowdown
    exposed = [
        total + exposed_seconds(hides, first, slowdown) - exposed_seconds(hides, own, slowdown)
        for total, first, own in zip(after.exposed, before.gather, after.gather, strict=True)
    ]
    return replace(after, gather=before.gather + brought_L, exposed=np.array(exposed) + brought_L)


def _bytes(
    planned: Planned, priced_as: tuple[Priced, Priced, Priced | None], owner_before_LE: np.ndarray, topology: Topology, cost: LayerCost
) -> PortBytes:
    """Bytes of a step through each rank's ports, of these layers.

    Args:
        priced_as: the gather before the router; all that follows it, with the plan that the layers go by then; and the gather of what that
            plan needs besides, None: nothing.
    """
    (before, priced, brought), plan, times = priced_as, planned.plan, planned.times
    rematerialize = planned.given.execution.rematerialize
    gather, row_ports = priced.gathered, PortBytes(*priced.rows.near, *priced.rows.far)
    parts = [
        (before.gathered, times * cost.trainable_bytes),
        (gather, times * cost.trainable_bytes if rematerialize else 0.0),
        (gather.reversed(), times * cost.reduced_bytes),
        # Rows go out and their gradients back, results come back and theirs go out.
        (row_ports, 2 * times * cost.row_bytes),
        (row_ports.reversed(), 2 * times * cost.row_bytes),
        (before.gathered_frozen, cost.frozen_bytes),
    ]
    if brought is not None:
        parts += [(brought.gathered, times * cost.trainable_bytes), (brought.gathered_frozen, times * cost.frozen_bytes)]
    if (plan.owner_LE != owner_before_LE).any():
        parts.append((reshard_ports(owner_before_LE, plan.owner_LE, topology), cost.state_bytes + cost.frozen_bytes))
    return PortBytes(*(np.asarray(sum(size * getattr(ports, field.name).sum(0) for ports, size in parts)) for field in fields(PortBytes)))


def _imbalance(rows: Rows, served_LD: np.ndarray, topology: Topology, cost: LayerCost) -> np.ndarray:
    """float64 [layers]"""
    rate_D = np.asarray(topology.flops)
    work_LD = rows.computed_D * cost.row_flops * (1 + cost.row_backward)
    work_LD = work_LD + served_LD * cost.assignment_flops * (1 + cost.assignment_backward)
    even_L = work_LD.sum(1) / rate_D.sum()
    busiest_L = (work_LD / rate_D).max(1)
    return np.divide(busiest_L, even_L, out=np.ones_like(even_L), where=even_L > 0)
