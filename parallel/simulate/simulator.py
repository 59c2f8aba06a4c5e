"""Simulates training steps under placement policies, without a GPU: their seconds, bytes and memory by the cost model.

A policy plans each step, and the step's true loads are then served by that plan. In `history` mode a policy plans from what the last steps'
loads predict, as in training (`hecate.parallel.values.predictors`). In `exact` mode it plans from the true loads, which are known after the
routers; attention has ended by then and hides no gather. This holds for `full`, too, which needs no loads: in exact mode the engine plans
and gathers a layer after its router. In `replay` mode it plans from the true loads, too, but they are known before the step, so that
attention hides the gather. In `calibrated` mode a plan from history is replaced, layer by layer, by one from the true loads where that pays
after the router. Layers may also go by different modes, each by the one that has been fastest (`hecate.parallel.plan.measured_modes`), as
with `fssdp.plan: auto` and `exact`.

Shapes: L layers, E experts, S = D ranks as sources and as destinations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import HISTORY, ExecutionMode, LayerCost, PlanMode
from hecate.parallel.plan.measured_modes import MODES, MeasuredModes
from hecate.parallel.plan.sharding import better_owners, owned_bytes
from hecate.parallel.planners import Collective, PlanInput, Planner, plan_with
from hecate.parallel.planners.auto import plan_auto
from hecate.parallel.planners.plan import check_loads
from hecate.parallel.simulate.simulated_step import (
    Lifetime,
    Planned,
    Predictor,
    Setting,
    SimulatedStep,
    StepBytes,
    StepSeconds,
    all_layers,
    better_after_router,
    execute,
    plan_layers,
)
from hecate.parallel.transfer.residency import Residency, expected_uses
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.predictors import KEPT_WINDOWS, predicted_loads

HISTORY_STEPS = 5
"""from which the next one's loads are predicted, as by `fssdp.load_window` (Hecate §3.2)"""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One policy's mean over the counted steps."""

    policy: str
    seconds: StepSeconds
    bytes: StepBytes
    imbalance: float
    """largest expert compute time of a rank over what it would be if all shared the work by their rates; mean over layers"""
    replica_bytes_D: tuple[float, ...]
    """memory of each rank's replicas of others' experts (parameters, gradients, frozen parts, those that are kept for later steps
    included), in its fullest step"""
    replicas_D: tuple[float, ...]
    """replicas of others' experts that each rank has at once, in its fullest step: of all layers; rematerialized ones of one layer"""
    frozen_parts_D: tuple[float, ...]
    """frozen parts of others' experts that each rank has in all layers, in its fullest step, those that are kept included"""
    served_tokens_D: tuple[float, ...]
    """distinct tokens that each rank computes in a layer, in its fullest step; mean over layers"""
    most_tokens_D: tuple[float, ...]
    """the same of its fullest layer"""
    planner_ms_per_layer: float
    """measured, on this machine"""
    plan_modes: dict[str, float] | None = None
    """share of the layers and steps that went by each of `MODES`, where these are chosen; None: all went by the same"""

    @property
    def step_seconds(self) -> float:
        return self.seconds.total

    @property
    def replica_bytes(self) -> float:
        """Memory of the replicas on the fullest rank, in bytes."""
        return max(self.replica_bytes_D)

    def as_dict(self) -> dict[str, Any]:
        """The results as JSON values (docs/simulator.md)."""
        beside = ("policy", "replica_bytes_D", "replicas_D", "frozen_parts_D", "served_tokens_D", "most_tokens_D")
        whole = {"policy": self.policy, "step_seconds": self.step_seconds, "replica_bytes": self.replica_bytes}
        return whole | {name: value for name, value in asdict(self).items() if name not in beside}


def mean_modes(shares: Sequence[dict[str, float] | None], weights: Sequence[float] | None = None) -> dict[str, float] | None:
    """Return the mean of several `Simulated.plan_modes`, such as those of sharding groups or of layers of several shapes."""
    known = [one for one in shares if one is not None]
    if not known:
        return None
    return {mode: float(np.average([one[mode] for one in known], weights=weights)) for mode in MODES}


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
    lifetime: Lifetime = expected_uses,
    max_imbalance: float | None = None,
    reshard_interval: int | None = None,
    num_layers: int | None = None,
    collectives: Mapping[str, Collective] | None = None,
    choose_modes: Sequence[PlanMode] = (),
    owner_E: np.ndarray | None = None,
) -> list[Simulated]:
    """Put loads through each policy, all layers alike.

    The first step, which `history` plans without loads, is counted only if it is the only one.

    Args:
        loads: int64 [steps, layers, experts, source ranks]: assignments (see `hecate.parallel.values.loads`).
        policies: name -> planner, such as `hecate.parallel.planners.POLICIES`.
        slots_D: int64 [ranks]: see `PlanInput.slots_D`.
        execution: how plans are executed; see `ExecutionMode`.
        history_steps: the most steps from which the next one's loads are predicted.
        predict: predicts in place of `predicted_loads`.
        lifetime: over how many steps planners pay a replica's frozen part.
        max_imbalance: see `PlanInput.max_imbalance`.
        reshard_interval: every so many steps `hecate_paper` and `auto` move experts to better owners where that pays; None: never.
        num_layers: of the model, of which the loads' layers are a sample; seconds, bytes and memory are scaled to them. None: no sample.
        collectives: of policies by name, where they are not those of `execution`, such as `hecate.parallel.planners.COLLECTIVES`.
        choose_modes: in each step each layer goes by whichever of these modes would have been fastest over the last steps (`modes_of`);
            `execution.plan` is history. Loads are those of all micro-steps, each of which gathers the layers of the modes calibrated and
            exact for itself. Empty: all layers go by `execution.plan`.
        owner_E: int64 [experts]: the owner of each layer's experts at the beginning; None: runs of equal length (`contiguous_owners`).

    Raises:
        UserError: a load is negative or not finite.
    """
    assert loads.ndim == 4, loads.shape
    assert loads.shape[3] == topology.world_size, (loads.shape, topology.world_size)
    check_loads(loads, loads.shape)
    assert not choose_modes or execution.plan == "history", execution
    if predict is None:
        predict = partial(predicted_loads, window=history_steps, lasting=cost.frozen_bytes > 0)
    setting = Setting(
        topology,
        cost,
        slots_D,
        execution,
        predict,
        lifetime,
        max_imbalance,
        reshard_interval,
        num_layers or loads.shape[1],
        tuple(choose_modes),
        history_steps,
        owner_E=owner_E,
    )
    return [
        _simulate_policy(name, planner, loads, setting.of_collective((collectives or {}).get(name))) for name, planner in policies.items()
    ]


_RESHARDING = ("hecate_paper", "auto")
_REPLANS = {"smartmoe": (10, 2)}
"""policy -> it plans every so many steps only, from the mean loads of the last so many"""


def slots_in_memory(
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


def _simulate_policy(name: str, planner: Planner, loads: np.ndarray, setting: Setting) -> Simulated:
    num_steps, num_layers, num_experts, world_size = loads.shape
    knows = setting.execution.knows_loads
    first_known = 0 if knows else 1
    interval, averaged = (1, None) if knows or setting.choose_modes else _REPLANS.get(name, (1, None))
    reshard_interval = setting.reshard_interval if name in _RESHARDING else None
    first_E = contiguous_owners(num_experts, world_size) if setting.owner_E is None else setting.owner_E
    owner_LE = np.tile(first_E, (num_layers, 1))
    placed_LED: np.ndarray | None = None
    has_frozen = setting.cost.frozen_bytes > 0
    residency = [Residency.of_owners(owner_E, setting.slots_D) for owner_E in owner_LE] if has_frozen else []
    steps: list[SimulatedStep] = []
    planner_seconds: list[float] = []
    modes: list[list[PlanMode]] = []
    measured = MeasuredModes(setting.window, splits=planner is plan_auto, modes=setting.choose_modes or MODES)
    names = [object() for _ in range(num_steps)]
    parts: list[Planned] = []
    for step in range(num_steps):
        owner_before_LE = owner_LE
        held_LED = np.stack([layer.held_ED for layer in residency]) if has_frozen else None
        modes.append([setting.execution.plan] * num_layers)
        if not parts or (step - first_known) % interval == 0:
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
                replace(setting.cost, frozen_lifetime=setting.lifetime(residency)) if has_frozen else setting.cost,
                setting.slots_D,
                resident_LED=held_LED,
                max_imbalance=setting.max_imbalance,
                execution=setting.execution,
                present_LED=placed_LED,
            )
            if reshard_interval and (step - first_known) % reshard_interval == 0:
                found = better_owners(planner, [given], reshard_interval)
                given = given if found is None else replace(given, owner_LE=found[0][0])
            if setting.choose_modes:
                recent = slice(max(step - KEPT_WINDOWS * setting.window, 0), step)
                modes[-1] = measured.choose(partial(plan_with, planner), given, names[recent], loads[recent])
            started = time.perf_counter()
            parts = [plan_layers(planner, given, layer_M, loads[step], mode, setting) for mode, layer_M in _by_mode(modes[-1])]
            planner_seconds.append(time.perf_counter() - started)
        owner_LE, placed_LED = np.empty_like(owner_LE), np.empty(loads.shape[1:], dtype=bool)
        for part in parts:
            owner_LE[part.layer_M], placed_LED[part.layer_M] = part.plan.owner_LE, part.plan.where_LED
        if has_frozen:
            if (owner_LE != owner_before_LE).any():
                residency = [layer.change_owners(owner_E) for layer, owner_E in zip(residency, owner_LE, strict=True)]
            residency = [layer.need(where_ED).after_step() for layer, where_ED in zip(residency, placed_LED, strict=True)]
        kept_LED = np.stack([layer.held_ED for layer in residency]) if has_frozen else None
        executed = [
            execute(part, loads[step], owner_before_LE, held_LED, kept_LED, setting, better_after_router(planner, part, loads[step]))
            for part in parts
        ]
        steps.append(all_layers(executed, setting))
    counted = steps[1:] or steps
    scale = setting.num_layers / num_layers
    return Simulated(
        policy=name,
        seconds=StepSeconds(**_mean([one.seconds for one in counted], scale)),
        bytes=StepBytes(**_mean([one.bytes for one in counted], scale)),
        imbalance=float(np.mean([one.imbalance for one in counted])),
        replica_bytes_D=tuple(np.max([one.replica_bytes_D for one in counted], axis=0).tolist()),
        replicas_D=tuple(np.max([one.replicas_D for one in counted], axis=0).tolist()),
        frozen_parts_D=tuple(np.max([one.frozen_parts_D for one in counted], axis=0).tolist()),
        served_tokens_D=tuple(np.max([one.served_tokens_D for one in counted], axis=0).tolist()),
        most_tokens_D=tuple(np.max([one.most_tokens_D for one in counted], axis=0).tolist()),
        planner_ms_per_layer=1e3 * float(np.median(planner_seconds)) / num_layers,
        plan_modes=_shares(modes[-len(counted) :]) if setting.choose_modes else None,
    )


def _by_mode(modes: list[PlanMode]) -> list[tuple[PlanMode, np.ndarray]]:
    """The layers of each mode, int64 [layers of it]."""
    return [(mode, np.array([layer for layer, one in enumerate(modes) if one == mode])) for mode in dict.fromkeys(modes)]


def _shares(modes: list[list[PlanMode]]) -> dict[str, float]:
    flat = [mode for of_step in modes for mode in of_step]
    return {mode: flat.count(mode) / len(flat) for mode in MODES}


def _mean(records: list[Any], scale: float) -> dict[str, float]:
    return {field.name: scale * float(np.mean([getattr(one, field.name) for one in records])) for field in fields(records[0])}
