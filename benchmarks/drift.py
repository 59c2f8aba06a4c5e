"""Compare ways to plan (`fssdp.plan`) where loads drift: seconds of a step under `auto` in each way, over the best of all other policies.

For six drifting workloads and a steady one, 4 clusters and 3 kinds of experts, by the simulator: what ranks wait for plans of `auto` is
counted, those of other policies count as ready at once, and a run has as many steps as are simulated. The others plan from history or from
the step's own loads (exact), whichever is faster in the case, with their authors' split of tokens and collectives; those that need more
replicas than memory has room for do not count.

    python -m benchmarks.drift [--quick] [--resume] [--json FILE]

A call with `--resume` goes on with the cases that an earlier one lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.report import finish, kept_rows, recorded, resumable
from hecate.parallel.cost.cost_model import ExecutionMode, PlanChoice
from hecate.parallel.plan.measured_modes import execution_of
from hecate.parallel.planners import COLLECTIVES, POLICIES, ROWS, WITH_OURS
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.simulator import simulate
from hecate.parallel.simulate.workloads import DRIFTING, WORKLOADS
from testing.plan_cases import EXPERTS, TOKENS, kinds, plan_input, topologies

TOP_K, QUICK_STEPS = 4, 12
STEPS = {"router_collapse": 105, "topic_every_50": 105}
"""of workloads that take so long to change; of the others `FEW_STEPS`"""
FEW_STEPS = 35
CHOICES: tuple[PlanChoice, ...] = ("history", "calibrated", "exact", "auto")
STEADY = "trained_steady"
OTHERS = {name: planner for name, planner in ROWS.items() if name != "auto" and name not in WITH_OURS}


def main() -> None:
    options = resumable(__doc__ or "").parse_args()
    rows, wanted = kept_rows(options), []
    for place, topology in topologies().items():
        for workload, make in {**DRIFTING, STEADY: WORKLOADS[STEADY]}.items():
            steps = QUICK_STEPS if options.quick else STEPS.get(workload, FEW_STEPS)
            loads = make(steps, 1, topology.world_size, EXPERTS, TOKENS, TOP_K, 0)
            for kind in kinds(TOP_K):
                slots_D = plan_input(topology, kind.cost, loads[0, 0]).slots_D
                setting = Setting(topology=topology, cost=kind.cost, slots_D=slots_D, run_steps=len(loads))
                case = {"topology": place, "experts": kind.name, "workload": workload}
                wanted += recorded(rows, case, partial(compare, setting, loads), options.json)
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in wanted[-1].items()}, flush=True)
    finish("drift", wanted, summary(wanted), options.json)


def compare(setting: Setting, loads: np.ndarray) -> list[dict[str, Any]]:
    """One row: `auto` in each way, and the fastest other policy, in milliseconds a step."""
    row: dict[str, Any] = {}
    for choice in CHOICES:
        plan, modes = execution_of(choice, 1)
        (found,) = simulate(loads, {"auto": POLICIES["auto"]}, replace(setting, execution=ExecutionMode(plan=plan), choose_modes=modes))
        row[choice] = 1e3 * found.step_seconds
    others = {}
    for plan in ("history", "exact"):
        for found in simulate(loads, OTHERS, replace(setting, execution=ExecutionMode(plan=plan)), COLLECTIVES):
            if (np.array(found.replicas_D) <= setting.slots_D).all():
                others[f"{found.policy} ({plan})"] = 1e3 * found.step_seconds
    best = min(others, key=lambda name: others[name])
    return [row | {"best_other": others[best], "which": best}]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For each way, over the best other policy where loads drift, and over the fastest way where they are steady."""
    found: dict[str, float] = {}
    drifting, steady = ([row for row in rows if (row["workload"] == STEADY) == is_steady] for is_steady in (False, True))
    for choice in CHOICES:
        over = np.array([row[choice] / row["best_other"] for row in drifting])
        found[f"{choice}_over_best_other_geomean"] = float(np.exp(np.log(over).mean()))
        found[f"{choice}_over_best_other_worst"] = float(over.max())
        found[f"{choice}_over_best_other_more_than_2_percent"] = float((over > 1.02).mean())
        found[f"{choice}_steady_over_fastest_way_worst"] = max(row[choice] / min(row[way] for way in CHOICES) for row in steady)
        found[f"{choice}_over_fastest_way_worst"] = max(row[choice] / min(row[way] for way in CHOICES) for row in rows)
    return found


if __name__ == "__main__":
    main()
