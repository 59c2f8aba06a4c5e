"""Which loads each layer is planned from under `fssdp.plan: auto` and `exact`: measured on the last steps, whose true loads are known.

After a step, its plan is made again three times for each layer: from the loads that were predicted (history), the same with a better plan
after the router where that pays (calibrated), and from the true loads, with a gather that nothing hides (exact). All three are priced on
the true loads, as they are executed. So history pays for the error of its prediction, and the others for planning late. A layer goes by
whichever would have been fastest over the last steps. Under `exact` it is one of the two that plan from the true loads: calibrated, which
is never slower than history in a step of one micro-step, unless its early gather has been in vain; with frozen parts always calibrated.
There a better plan after the router is made only where calibrated would not be chosen without it. What ranks wait for plans of `auto` is
counted (`hecate.parallel.cost.planning_seconds`).
No message is needed: all of it is computed from values that the ranks of a sharding group share.

Shapes: S steps, M modes, L layers, E experts, D ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hecate.parallel.cost.cost_model import PlanChoice, PlanMode, price_traffic
from hecate.parallel.cost.planning_seconds import judging_seconds, planning_seconds
from hecate.parallel.plan.after_router import best_after_router, some_layers
from hecate.parallel.planners import Plan, PlanInput
from hecate.parallel.planners.policies.static_ep import plan_static_ep
from hecate.parallel.values.predictors import predicted_loads

MODES: tuple[PlanMode, ...] = ("history", "calibrated", "exact")
_MOST_JUDGING = 2 / 3
"""of a layer's seconds under expert parallelism: the share of a step's backward pass, in which the next step is planned"""


def modes_of(choice: PlanChoice, prefetch: int = 1) -> tuple[PlanMode, ...]:
    """The modes among which each layer's is chosen in each step; before a step has been measured, it is the first.

    Args:
        prefetch: see `ExecutionMode.prefetch`; with 0 nothing is gathered before the router, so that `exact` has nothing to choose.
    """
    if choice == "auto":
        return ("calibrated", "history", "exact")
    return ("calibrated", "exact") if choice == "exact" and prefetch > 0 else (choice,)


def execution_of(choice: PlanChoice, prefetch: int) -> tuple[PlanMode, tuple[PlanMode, ...]]:
    """For the simulator: `ExecutionMode.plan`, and the modes to choose among; none: all layers go by the former."""
    modes = modes_of(choice, prefetch)
    return (modes[0], ()) if len(modes) == 1 else ("history", modes)


@dataclass(frozen=True, eq=False)
class JudgedStep:
    """What a step would have cost the layers of one shape."""

    seconds_ML: np.ndarray
    """float64 [modes, layers]: in each of `MODES`, without the optimizer"""
    replanned_L: np.ndarray
    """bool [layers]: which layers were planned again after the router; of others `calibrated` is at least as fast as its seconds say"""
    from_history_LED: np.ndarray
    """bool [layers, experts, ranks]: the replicas of history's plan"""
    from_own_LED: np.ndarray
    """bool [layers, experts, ranks]: the replicas of the plan from the step's own loads"""

    def of(self, some_L: np.ndarray) -> JudgedStep:
        """Some of the layers."""
        return JudgedStep(self.seconds_ML[:, some_L], self.replanned_L[some_L], self.from_history_LED[some_L], self.from_own_LED[some_L])

    def with_layers(self, some_L: np.ndarray, judged: JudgedStep) -> JudgedStep:
        """The same, but of some of the layers what else was judged."""
        seconds_ML, replanned_L = self.seconds_ML.copy(), self.replanned_L.copy()
        seconds_ML[:, some_L], replanned_L[some_L] = judged.seconds_ML, judged.replanned_L
        return JudgedStep(seconds_ML, replanned_L, self.from_history_LED, self.from_own_LED)


def judge_step(
    planner: Callable[[PlanInput], Plan],
    given: PlanInput,
    true_LED: np.ndarray,
    before: JudgedStep | None,
    *,
    splits: bool = False,
    replanned_L: np.ndarray | None = None,
) -> JudgedStep:
    """Plan a step in every mode, and price the plans on its true loads.

    Args:
        given: of a whole step, with the loads that were predicted; `PlanInput.execution` says how many micro-steps it had.
        true_LED: of the whole step.
        splits: see `best_after_router`.
        before: the step before, whose replicas of frozen parts ranks still hold; None: they hold those that a plan needs.
        replanned_L: see `JudgedStep`; None: all.
    """
    history, calibrated, exact = (_in_mode(given, mode) for mode in ("history", "calibrated", "exact"))
    held_LED, held_by_own_LED = (None, None) if before is None else (before.from_history_LED, before.from_own_LED)
    history, calibrated = (replace(mode, resident_LED=held_LED, present_LED=held_LED) for mode in (history, calibrated))
    first = planner(history)
    # Micro-steps that share a gather may get another plan than those that gather for themselves.
    first_alone = first if calibrated.execution.micro_steps == 1 else planner(calibrated)
    true_calibrated = replace(calibrated, loads_LED=true_LED / calibrated.execution.micro_steps)
    exact = replace(exact, loads_LED=true_LED / exact.execution.micro_steps, resident_LED=held_by_own_LED, present_LED=held_by_own_LED)
    own = planner(exact)
    replanned_L = np.ones(given.num_layers, dtype=bool) if replanned_L is None else replanned_L
    gain_L = np.zeros(given.num_layers)
    if replanned_L.any():
        present = [first_alone.layer(calibrated, int(at)) for at in np.flatnonzero(replanned_L)]
        found = best_after_router(planner, some_layers(true_calibrated, replanned_L), present, splits=splits)
        gain_L[replanned_L] = [gain for gain, _ in found]
    seconds_ML = np.stack(
        [
            _seconds(first, history, true_LED),
            _seconds(first_alone, calibrated, true_LED) - calibrated.execution.micro_steps * gain_L.clip(0),
            _seconds(own, exact, true_LED),
        ]
    )
    # The ranks tell each other their counts, and wait for the plan. How long other policies take to plan is not counted.
    late_M = given.execution.micro_steps * np.array(
        [
            (mode != "history") * given.topology.latency_to_all
            + (planning_seconds(mode, given.num_experts, given.topology) if splits else 0.0)
            for mode in MODES
        ]
    )
    return JudgedStep(seconds_ML + late_M[:, None], replanned_L, first.where_LED, own.where_LED)


class MeasuredModes:
    """The judged steps of the layers of one shape.

    Args:
        window: the most steps from which each of them is predicted.
        splits: see `best_after_router`.
        modes: among which is chosen, of `MODES`.
    """

    def __init__(self, window: int, *, splits: bool = False, modes: Sequence[PlanMode] = MODES) -> None:
        self._window, self._splits, self._modes = window, splits, modes
        self._judged: list[tuple[object, JudgedStep]] = []
        self._judged_for: tuple[bytes, bytes] | None = None
        """the owners and slots that the judged steps were planned with"""
        self._late_L: np.ndarray | None = None
        """bool [layers]: which of them went by another mode than the first of all"""

    def choose(
        self, planner: Callable[[PlanInput], Plan], given: PlanInput, steps: Sequence[object], loads_SLED: np.ndarray
    ) -> list[PlanMode]:
        """Return the mode of each layer in the next step: the fastest over the steps that are given, of equal ones the first. History where
        history is among them, and judging would take longer than the backward pass or there is one rank.

        The last `window` steps are judged, each predicted from as many before it, so that a run that was resumed with the steps of a
        `LoadHistory` chooses as one that was not. (Of frozen parts it may find others in their places.) Those that were judged in the last
        call are not judged again; the first step of a run has no prediction. If experts have changed their owners, or
        ranks have room for other numbers of replicas, all steps are judged again, as by a rank that has just come.

        Args:
            given: as for a plan of the next step from history.
            steps: what each step is known by; the same object, the same step.
            loads_SLED: of these steps, oldest first; may be none.
        """
        if "history" in self._modes and (given.topology.world_size == 1 or self._takes_long_to_judge(given)):
            return ["history"] * given.num_layers
        # Frozen parts stay where a plan brings them, so a layer that came back from late plans would not find what the judged steps found.
        modes = [mode for mode in MODES if mode in self._modes and (mode != "exact" or given.cost.frozen_bytes == 0)]
        if len(steps) < 2 or len(modes) == 1:
            return [self._modes[0]] * given.num_layers
        judged_for = (given.owner_LE.tobytes(), given.slots_D.tobytes())
        if judged_for != self._judged_for:
            self._judged, self._late_L, self._judged_for = [], None, judged_for
        # History's plan, gathered early, is nearly always faster than one that begins with nothing. Then nobody has to know how much
        # faster it becomes after the router.
        close_L = np.ones(given.num_layers, dtype=bool)
        if "history" not in self._modes:
            close_L = np.zeros_like(close_L) if self._late_L is None else self._late_L
            self._judge(planner, given, steps, loads_SLED, close_L)
            close_L = close_L | (self._fastest(modes) > 0)
        self._judge(planner, given, steps, loads_SLED, close_L)
        fastest_L = self._fastest(modes)
        self._late_L = fastest_L > 0
        return [modes[mode] for mode in fastest_L]

    def _takes_long_to_judge(self, given: PlanInput) -> bool:
        """Whether the next step would wait for it: not known of policies other than `auto`, nor before there are any loads."""
        if not self._splits or given.loads_LED is None:
            return False
        by_owners_L = _seconds(plan_static_ep(given), _in_mode(given, "history"), given.loads_LED)
        return bool(judging_seconds(given.num_experts, given.topology) > _MOST_JUDGING * by_owners_L.mean())

    def _fastest(self, modes: Sequence[PlanMode]) -> np.ndarray:
        """int64 [layers]: which of these modes was the fastest over the judged steps."""
        seconds_ML = np.sum([judged.seconds_ML for _, judged in self._judged], axis=0)[[MODES.index(mode) for mode in modes]]
        return np.asarray(seconds_ML.argmin(0))

    def _judge(
        self,
        planner: Callable[[PlanInput], Plan],
        given: PlanInput,
        steps: Sequence[object],
        loads_SLED: np.ndarray,
        close_L: np.ndarray,
    ) -> None:
        """Judge the steps that are not judged yet, the layers of `close_L` with what a plan after the router gains."""
        judged: list[tuple[object, JudgedStep]] = []
        for at in range(max(1, len(steps) - self._window), len(steps)):
            known = next((judged_before for step, judged_before in self._judged if step is steps[at]), None)
            unknown_L = np.ones(given.num_layers, dtype=bool) if known is None else close_L & ~known.replanned_L
            if unknown_L.any():
                past_SLED = loads_SLED[max(0, at - self._window) : at, unknown_L]
                predicted_LED = predicted_loads(past_SLED, self._window, lasting=given.cost.frozen_bytes > 0)
                found = judge_step(
                    planner,
                    replace(some_layers(given, unknown_L), loads_LED=predicted_LED),
                    loads_SLED[at, unknown_L].astype(np.float64),
                    judged[-1][1].of(unknown_L) if judged else None,
                    splits=self._splits,
                    replanned_L=close_L[unknown_L],
                )
                known = found if known is None else known.with_layers(unknown_L, found)
            assert known is not None
            judged.append((steps[at], known))
        self._judged = judged


def _in_mode(given: PlanInput, mode: PlanMode) -> PlanInput:
    """What a plan in this mode is made from: the loads of a whole step, or of a micro-step."""
    execution = replace(given.execution, plan=mode)
    return replace(given, loads_LED=given.expected_LED / (execution.micro_steps if execution.per_micro_step else 1), execution=execution)


def _seconds(plan: Plan, given: PlanInput, true_LED: np.ndarray) -> np.ndarray:
    """float64 [layers]: a whole step by this plan of `given`, without the optimizer."""
    execution = given.execution
    times = execution.micro_steps if execution.per_micro_step else 1
    loads_LED = true_LED / times
    seconds = price_traffic(
        plan.owner_LE,
        plan.where_LED,
        plan.traffic(given.expected_LED, loads_LED, given.topology),
        given.topology,
        # A frozen part is paid in the step in which it travels, which is in one of the micro-steps.
        replace(given.cost, frozen_lifetime=float(times)),
        execution=execution,
        resident_ED=plan.where_LED if given.resident_LED is None else given.resident_LED,
    ).seconds
    return np.asarray(times * (seconds.total - seconds.optimizer))
