"""Compare predictors of loads by the seconds of the steps that are planned from them, for 16 workloads, 4 clusters and 3 kinds of experts.

The simulator plans each step by policy auto from the loads that a predictor expects, and prices it on the true ones. Rows hold seconds over
those with hindsight: planned from the true loads, but executed as a plan that was there before. `chosen` is what training and the simulator
go by: each layer's best predictor so far, and for frozen parts, which stay, the mean of two windows. Hindsight is no bound for these: a
plan that follows every step's loads moves frozen parts in every step. `judged` is `chosen`, but of several plans of auto, which differ in
the slots that they use, the one that would have been fastest over the last five steps (`benchmarks.recent_steps`).

`plan=history`, `plan=calibrated` and `plan=late` are the seconds of the experts of all steps but the first one in each mode, over those of
the fastest of the three; `plan=auto` and `plan=exact` are those of what these choose from the steps before, among all three or the last two
(`hecate.parallel.plan.measured_modes`). `plan=late` is what the code calls the mode exact: nothing is gathered before the router.

    python -m benchmarks.prediction [--quick] [--seed N] [--resume] [--json FILE]

A call with `--resume` goes on with the rows that an earlier one lacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.recent_steps import cheapest_over
from benchmarks.report import finish, kept_rows, recorded, resumable
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import PlanChoice
from hecate.parallel.plan.measured_modes import MODES, MeasuredModes, judge_step, modes_of
from hecate.parallel.planners import Plan, PlanInput, Planner
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.simulate.simulated_step import HISTORY_STEPS, Predictor, Setting
from hecate.parallel.simulate.simulator import simulate
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.predictors import DECAYS, KEPT_WINDOWS, predicted_loads, weights
from testing.plan_cases import EXPERTS, TOKENS, TOP_K, Kind, kinds, plan_input, topologies

STEPS, LAYERS = 24, 2
CHOICES: tuple[PlanChoice, ...] = ("auto", "exact")
PLANS = ("plan=history", "plan=calibrated", "plan=late", *(f"plan={choice}" for choice in CHOICES))
TRAINED_TOP_K = 8
"""of the workloads like trained routers'"""
FEWER_SLOTS = (0, 2, 8)


def main() -> None:
    parser = resumable(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0, help="of the workloads (default: 0)")
    options = parser.parse_args()
    rows = kept_rows(options)
    for place, topology in topologies().items():
        for workload, make in list(WORKLOADS.items())[:: 4 if options.quick else 1]:
            top_k = TRAINED_TOP_K if workload.startswith("trained") else TOP_K
            loads = make(8 if options.quick else STEPS, LAYERS, topology.world_size, EXPERTS, TOKENS, top_k, options.seed)
            for kind in kinds(top_k):
                case = {"topology": place, "experts": kind.name, "workload": workload}
                for row in recorded(rows, case, partial(compare, topology, kind, loads), options.json):
                    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    names = [*DECAYS, "chosen", "judged"]
    summary = {}
    for name in names:
        summary[f"{name}_over_hindsight_geomean"] = geomean(row[name] for row in rows)
        summary[f"{name}_over_hindsight_worst"] = max(row[name] for row in rows)
        for kind in kinds():
            of_kind = (row[name] for row in rows if row["experts"] == kind.name)
            summary[f"{name}_over_hindsight_geomean, {kind.name}"] = geomean(of_kind)
    for name in PLANS:
        summary[f"{name}_over_fastest_geomean"] = geomean(row[name] for row in rows)
        summary[f"{name}_over_fastest_worst"] = max(row[name] for row in rows)
    finish("prediction", rows, summary, options.json)


def compare(topology: Topology, kind: Kind, loads: np.ndarray) -> list[dict[str, float]]:
    """One row: a case by every predictor and in every mode."""
    slots_D = plan_input(topology, kind.cost, np.ones((EXPERTS, topology.world_size))).slots_D
    judged = Judged(predictors(kind, loads)["chosen"])
    planned: dict[str, tuple[Planner, Predictor]] = {
        **{name: (plan_auto, predict) for name, predict in predictors(kind, loads).items()},
        "judged": (judged.plan, judged.predict),
    }
    seconds = {
        name: simulate(loads, {"auto": planner}, Setting(topology=topology, cost=kind.cost, slots_D=slots_D, predict=predict))[
            0
        ].step_seconds
        for name, (planner, predict) in planned.items()
    }
    hindsight = seconds.pop("hindsight")
    over = {name: each / hindsight for name, each in seconds.items()}
    return [{"hindsight_ms": 1e3 * hindsight} | over | by_mode(topology, kind, loads, slots_D)]


def predictors(kind: Kind, loads: np.ndarray) -> dict[str, Predictor]:
    """Return what the simulator predicts loads by, by name.

    Args:
        loads: int64 [steps, layers, experts, source ranks], of which hindsight knows all.
    """
    return {
        "hindsight": lambda past: loads[len(past)].astype(np.float64),
        **{name: partial(by_one, index=index) for index, name in enumerate(DECAYS)},
        "chosen": partial(predicted_loads, window=HISTORY_STEPS, lasting=kind.cost.frozen_bytes > 0),
    }


def by_one(past: np.ndarray, index: int) -> np.ndarray:
    """Return what one predictor says, in every layer."""
    last = past[-HISTORY_STEPS:]
    return np.tensordot(weights(len(last))[index], last, axes=1)


def by_mode(topology: Topology, kind: Kind, loads: np.ndarray, slots_D: np.ndarray) -> dict[str, float]:
    """Return the seconds of all steps but the first in each mode, over those of the fastest, by name."""
    owner_LE = np.tile(contiguous_owners(EXPERTS, topology.world_size), (LAYERS, 1))
    given, before, ids = PlanInput(owner_LE, None, topology, kind.cost, slots_D), None, [object() for _ in loads]
    choosing = [MeasuredModes(HISTORY_STEPS, splits=True, modes=modes_of(choice)) for choice in CHOICES]
    seconds = np.zeros(len(PLANS))
    for step in range(1, len(loads)):
        kept = range(max(0, step - KEPT_WINDOWS * HISTORY_STEPS), step)
        chosen = [one.choose(plan_auto, given, ids[kept.start : step], loads[kept.start : step]) for one in choosing]
        predicted_LED = predicted_loads(loads[:step], HISTORY_STEPS, lasting=kind.cost.frozen_bytes > 0)
        before = judge_step(plan_auto, replace(given, loads_LED=predicted_LED), loads[step].astype(np.float64), before, splits=True)
        by_choice = [sum(before.seconds_ML[MODES.index(mode), layer] for layer, mode in enumerate(modes)) for modes in chosen]
        seconds += [*before.seconds_ML.sum(1), *by_choice]
    return dict(zip(PLANS, (seconds / seconds[: len(MODES)].min()).tolist(), strict=True))


class Judged:
    """A planner that remembers the last steps' loads, and judges plans by them."""

    def __init__(self, predict: Predictor) -> None:
        self._predict = predict
        self._past = np.empty(0)

    def predict(self, past: np.ndarray) -> np.ndarray:
        self._past = past[-HISTORY_STEPS:]
        return self._predict(past)

    def plan(self, given: PlanInput) -> Plan:
        plans = [plan_auto(replace(given, slots_D=np.minimum(given.slots_D, slots))) for slots in (EXPERTS, *FEWER_SLOTS)]
        return cheapest_over(plans, given, self._past) if len(self._past) else plans[0]


def geomean(values: Iterable[float]) -> float:
    return float(np.exp(np.log(list(values)).mean()))


if __name__ == "__main__":
    main()
