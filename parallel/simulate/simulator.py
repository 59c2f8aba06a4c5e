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
from hecate.parallel.cost.cost_model import LayerCost, PlanMode
from hecate.parallel.plan.measured_modes import MODES, MeasuredModes
from hecate.parallel.plan.sharding import better_owners, owned_bytes
from hecate.parallel.planners import Collective, PlanInput, Planner, plan_with
from hecate.parallel.planners.plan import check_loads
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.simulate.simulated_step import (
    Planned,
    Setting,
    SimulatedStep,
    StepBytes,
    StepSeconds,
    all_layers,
    better_after_router,
    execute,
    plan_layers,
)
from hecate.parallel.transfer.residency import Residency
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.policy_names import SAME_PLANS
from hecate.parallel.values.predictors import KEPT_WINDOWS, predicted_loads


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One policy's mean over the steps of a run (`Setting.run_steps`), and its first steps alone."""

    policy: str
    seconds: StepSeconds
    bytes: StepBytes
    first_steps: int
    """the steps that no later step is like (`Setting.first_steps`), as far as they were simulated"""
    first_seconds: float
    """what these take together"""
    first_bytes: float
    """what all ranks send in these together"""
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
    """distinct tokens that each rank computes in its fullest layer, in its fullest step"""
    planner_ms_per_layer: float
    """the planner's time, measured on this machine"""
    plan_modes: dict[str, float] | None = None
    """the share of the layers and steps that went by each of `MODES`, where these are chosen; None: all went by the same"""

    @property
    def step_seconds(self) -> float:
        return self.seconds.total

    @property
    def replica_bytes(self) -> float:
        """Memory of the replicas on the fullest rank, in bytes."""
        return max(self.replica_bytes_D)

    def as_dict(self) -> dict[str, Any]:
        """The results as JSON values (docs/use/simulator.md)."""
        beside = ("policy", "replica_bytes_D", "replicas_D", "frozen_parts_D", "served_tokens_D", "most_tokens_D")
        whole = {"policy": self.policy, "step_seconds": self.step_seconds, "replica_bytes": self.replica_bytes}
        return whole | {name: value for name, value in asdict(self).items() if name not in beside}


def mean_modes(shares: Sequence[dict[str, float] | None], weights: Sequence[float] | None = None) -> dict[str, float] | None:
    """Return the mean of several `Simulated.plan_modes`, such as those of sharding groups or of layers of several shapes."""
    known = [share for share in shares if share is not None]
    if not known:
        return None
    return {mode: float(np.average([share[mode] for share in known], weights=weights)) for mode in MODES}


def simulate(
    loads: np.ndarray, policies: Mapping[str, Planner], setting: Setting, collectives: Mapping[str, Collective] | None = None
) -> list[Simulated]:
    """Put loads through each policy, all layers alike.

    In the means over a run the first steps (`Setting.first_steps`) count once each, and the others that were simulated stand for all that
    follow. Without a run's length the first are not counted, unless there are no others; then the last one is.

    Args:
        loads: int64 [steps, layers, experts, source ranks]: assignments (see `hecate.parallel.values.loads`).
        policies: name -> planner, such as `hecate.parallel.planners.ROWS`.
        collectives: of policies by name, where they are not those of `setting.execution`, such as `hecate.parallel.planners.COLLECTIVES`.

    Raises:
        UserError: a load is negative or not finite.
    """
    assert loads.ndim == 4, loads.shape
    assert loads.shape[3] == setting.topology.world_size, (loads.shape, setting.topology.world_size)
    check_loads(loads, loads.shape)
    assert not setting.choose_modes or setting.execution.plan == "history", setting.execution
    runs = [_PolicyRun(name, planner, loads, setting.of_collective((collectives or {}).get(name))) for name, planner in policies.items()]
    return [run.result() for run in runs]


_RESHARDING = ("hecate_paper", "auto")
_REPLANS = {"smartmoe": (10, 2)}
"""policy -> the steps from one of its plans to the next, and the last steps whose mean loads it plans from"""
_PLANNED_SHARE = 0.9
USUAL_RUN_STEPS = 1000
"""steps of a run of which nobody says how long it is"""
_OF_FULLEST_STEP = ("replica_bytes_D", "replicas_D", "frozen_parts_D", "served_tokens_D", "most_tokens_D")
"""the figures of `Simulated` that are those of the fullest step, rank by rank"""


def slots_in_memory(
    topology: Topology, cost: LayerCost, *, num_layers: int, num_experts: int, other_bytes: float = 0.0, rematerialize: bool = False
) -> np.ndarray:
    """int64 [ranks]: replicas of others' experts for which each device has room, in each layer: half of what is left, the other half being
    for activations; where experts have frozen parts, which stay, and `_PLANNED_SHARE` of every device holds all of them, as many slots as
    experts (as in `hecate.model.sizes.replica_slots`).

    Args:
        other_bytes: what every rank holds beside its experts.
        rematerialize: a rank holds the replicas of one layer at a time, but for their frozen parts.
    """
    owned = fullest_owner_bytes(topology, cost, num_layers=num_layers, num_experts=num_experts)
    room_D = (np.asarray(topology.memory) - other_bytes - owned).clip(0) / 2
    one_layer = cost.replica_bytes - cost.frozen_bytes
    each = cost.frozen_bytes * num_layers + one_layer * (1 if rematerialize else num_layers)
    others = num_experts - num_experts // topology.world_size
    holds_all = (other_bytes + owned + each * others <= _PLANNED_SHARE * np.asarray(topology.memory)).all()
    if each == 0 or (cost.frozen_bytes and holds_all):
        return np.full(topology.world_size, num_experts)
    return np.minimum(room_D / each, num_experts).astype(np.int64)


def fullest_owner_bytes(topology: Topology, cost: LayerCost, *, num_layers: int, num_experts: int) -> float:
    """What a rank's own experts take, on the rank with the most: state, gradients, frozen parts, and the parameters computed with."""
    each_layer = -(-num_experts // topology.world_size)
    return num_layers * each_layer * (cost.trainable_bytes + owned_bytes(cost))


class _PolicyRun:
    """A run under one policy: what is planned, where experts are and which frozen parts ranks hold, step after step."""

    def __init__(self, name: str, planner: Planner, loads: np.ndarray, setting: Setting) -> None:
        self._name, self._planner, self._loads, self._setting = name, planner, loads, setting
        num_steps, num_layers, num_experts, world_size = loads.shape
        knows = setting.execution.knows_loads
        self._first_known = 0 if knows else 1
        self._interval: int
        self._averaged: int | None
        self._interval, self._averaged = (1, None) if knows or setting.choose_modes else _REPLANS.get(name, (1, None))
        self._reshard_interval = setting.reshard_interval if name in _RESHARDING else None
        first_E = contiguous_owners(num_experts, world_size) if setting.owner_E is None else setting.owner_E
        self._owner_LE = np.tile(first_E, (num_layers, 1))
        self._placed_LED: np.ndarray | None = None
        self._has_frozen = setting.cost.frozen_bytes > 0
        self._residency = [Residency.of_owners(owner_E, setting.slots_D) for owner_E in self._owner_LE] if self._has_frozen else []
        self._planner_seconds: list[float] = []
        self._modes: list[list[PlanMode]] = []
        self._measured = MeasuredModes(setting.window, splits=planner is plan_auto, modes=setting.choose_modes or MODES)
        self._names = [object() for _ in range(num_steps)]
        self._parts: list[Planned] = []

    def result(self) -> Simulated:
        """Run all steps."""
        steps = [self._one_step(step) for step in range(len(self._loads))]
        first = steps[: self._setting.first_steps]
        share_T = _shares_of_run(len(steps), self._setting)
        num_layers = self._loads.shape[1]
        scale = (self._setting.num_layers or num_layers) / num_layers
        return Simulated(
            policy=self._name,
            seconds=StepSeconds(**_mean([step.seconds for step in steps], share_T, scale)),
            bytes=StepBytes(**_mean([step.bytes for step in steps], share_T, scale)),
            first_steps=len(first),
            first_seconds=scale * sum(step.seconds.total for step in first),
            first_bytes=scale * sum(step.bytes.near + step.bytes.far for step in first),
            imbalance=_weighted([step.imbalance for step in steps], share_T),
            **{name: tuple(np.max([getattr(step, name) for step in steps], axis=0).tolist()) for name in _OF_FULLEST_STEP},
            planner_ms_per_layer=1e3 * float(np.median(self._planner_seconds)) / num_layers,
            plan_modes=_modes(self._modes, share_T) if self._setting.choose_modes else None,
        )

    def _one_step(self, step: int) -> SimulatedStep:
        owner_before_LE, held_LED = self._owner_LE, self._held()
        self._modes.append([self._setting.execution.plan] * len(owner_before_LE))
        if not self._parts or (step - self._first_known) % self._interval == 0:
            self._plan(step, held_LED)
        self._owner_LE, self._placed_LED = np.empty_like(owner_before_LE), np.empty(self._loads.shape[1:], dtype=bool)
        for part in self._parts:
            self._owner_LE[part.layer_M], self._placed_LED[part.layer_M] = part.plan.owner_LE, part.plan.where_LED
        if self._has_frozen:
            if (self._owner_LE != owner_before_LE).any():
                self._residency = [layer.change_owners(owner_E) for layer, owner_E in zip(self._residency, self._owner_LE, strict=True)]
            used = zip(self._residency, self._placed_LED, strict=True)
            self._residency = [layer.need(where_ED).after_step() for layer, where_ED in used]
        true_LED, kept_LED, setting = self._loads[step], self._held(), self._setting
        executed = [
            execute(part, true_LED, owner_before_LE, held_LED, kept_LED, setting, better_after_router(self._planner, part, true_LED))
            for part in self._parts
        ]
        return all_layers(executed, setting)

    def _plan(self, step: int, held_LED: np.ndarray | None) -> None:
        """Plan all layers from what is known before a step."""
        setting, loads = self._setting, self._loads
        known_LED: np.ndarray | None = None
        if setting.execution.knows_loads:
            known_LED = loads[step].astype(np.float64)
        elif step > 0:
            known_LED = self._predicted(loads[:step]) if self._averaged is None else loads[max(step - self._averaged, 0) : step].mean(0)
        steps_left = None if setting.run_steps is None else max(setting.run_steps - step, 1)
        given = PlanInput(
            self._owner_LE,
            known_LED,
            setting.topology,
            replace(setting.cost, frozen_lifetime=setting.lifetime(self._residency, steps_left)) if self._has_frozen else setting.cost,
            setting.slots_D,
            resident_LED=held_LED,
            max_imbalance=setting.max_imbalance,
            execution=setting.execution,
            present_LED=self._placed_LED,
        )
        if self._reshard_interval and (step - self._first_known) % self._reshard_interval == 0:
            found = better_owners(self._planner, [given], self._reshard_interval)
            given = given if found is None else replace(given, owner_LE=found[0][0])
        if setting.choose_modes and self._name not in SAME_PLANS:
            recent = slice(max(step - KEPT_WINDOWS * setting.window, 0), step)
            self._modes[-1] = self._measured.choose(partial(plan_with, self._planner), given, self._names[recent], loads[recent])
        started = time.perf_counter()
        by_mode = _by_mode(self._modes[-1])
        self._parts = [plan_layers(self._planner, given, layer_M, loads[step], mode, setting) for mode, layer_M in by_mode]
        self._planner_seconds.append(time.perf_counter() - started)

    def _predicted(self, past: np.ndarray) -> np.ndarray:
        """float64 [layers, experts, source ranks]: the loads that follow these."""
        if self._setting.predict is not None:
            return self._setting.predict(past)
        return predicted_loads(past, window=self._setting.window, lasting=self._has_frozen)

    def _held(self) -> np.ndarray | None:
        """bool [layers, experts, ranks]: the frozen parts that ranks hold; None: experts have none."""
        return np.stack([layer.held_ED for layer in self._residency]) if self._has_frozen else None


def _by_mode(modes: list[PlanMode]) -> list[tuple[PlanMode, np.ndarray]]:
    """The layers of each mode, int64 [layers of it]."""
    return [(mode, np.array([layer for layer, own_mode in enumerate(modes) if own_mode == mode])) for mode in dict.fromkeys(modes)]


def _shares_of_run(steps: int, setting: Setting) -> np.ndarray:
    """float64 [simulated steps]: what share of the run's steps each stands for."""
    first = min(setting.first_steps, steps - 1 if setting.run_steps is None else steps)
    weight_T = np.ones(steps)
    if setting.run_steps is None:
        weight_T[:first] = 0.0
    else:
        weight_T[first:] = max(setting.run_steps - first, 0) / max(steps - first, 1)
    return np.asarray(weight_T / weight_T.sum())


def _modes(modes: list[list[PlanMode]], share_T: np.ndarray) -> dict[str, float]:
    return {mode: _weighted([of_step.count(mode) / len(of_step) for of_step in modes], share_T) for mode in MODES}


def _mean(records: list[Any], share_T: np.ndarray, scale: float) -> dict[str, float]:
    return {field.name: scale * _weighted([getattr(record, field.name) for record in records], share_T) for field in fields(records[0])}


def _weighted(values: Sequence[float], share_T: np.ndarray) -> float:
    """The mean, which of equal values is exactly theirs."""
    return float(values[-1] + share_T @ (np.asarray(values) - values[-1]))
