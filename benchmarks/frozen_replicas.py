"""For how many steps should planners expect a replica of a frozen expert to be used? Compare what is measured with fixed numbers.

The simulator trains LoRA over a frozen MoE base by policy auto, on 16 workloads and 4 clusters, with memory's slots and with 4. A planner
pays a frozen part over so many steps (`frozen_lifetime`): `measured` is what training goes by
(`hecate.parallel.transfer.residency.expected_uses`), the others are fixed. Rows are seconds of a step without attention, the first ones
included, over those of 20 steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.report import arguments, finish
from hecate.parallel.planners import POLICIES
from hecate.parallel.simulate.simulated_step import Lifetime, Setting
from hecate.parallel.simulate.simulator import simulate
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.transfer.residency import expected_uses
from testing.plan_cases import EXPERTS, TOKENS, TOP_K, kinds, plan_input, topologies

STEPS, QUICK_STEPS = 60, 8
SLOTS = (EXPERTS, 4)
FIXED = (1.0, 2.0, 5.0, 20.0, 100.0)
USUAL = "20"
LIKE_TRAINED_ROUTERS = "trained"


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    lifetimes: dict[str, Lifetime] = {"measured": expected_uses} | {f"{steps:g}": always(steps) for steps in FIXED}
    rows: list[dict[str, Any]] = []
    for place, topology in topologies().items():
        for workload, make in list(WORKLOADS.items())[:: 4 if options.quick else 1]:
            top_k = 8 if workload.startswith(LIKE_TRAINED_ROUTERS) else TOP_K
            frozen = next(kind for kind in kinds(top_k) if kind.cost.frozen_bytes)
            loads = make(QUICK_STEPS if options.quick else STEPS, 1, topology.world_size, EXPERTS, TOKENS, top_k, 0)
            for slots in SLOTS:
                slots_D = plan_input(topology, frozen.cost, loads[0, 0], slots).slots_D
                seconds = {}
                for name, lifetime in lifetimes.items():
                    step = simulate(
                        loads,
                        {"auto": POLICIES["auto"]},
                        Setting(topology=topology, cost=frozen.cost, slots_D=slots_D, lifetime=lifetime, run_steps=len(loads)),
                    )[0]
                    seconds[name] = step.step_seconds - step.seconds.attention
                row = {"topology": place, "workload": workload, "slots": slots, "ms": 1e3 * seconds[USUAL]}
                rows.append(row | {name: each / seconds[USUAL] for name, each in seconds.items()})
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
    summary = {}
    for name in lifetimes:
        ratios = np.array([row[name] for row in rows])
        trained = np.array([row["workload"].startswith(LIKE_TRAINED_ROUTERS) for row in rows])
        summary |= {f"{name}_geomean": geomean(ratios), f"{name}_worst": float(ratios.max())}
        if trained.any():
            summary[f"{name}_trained_geomean"] = geomean(ratios[trained])
    finish("frozen_replicas", rows, summary, options.json)


def always(steps: float) -> Lifetime:
    return lambda layers, steps_left: steps


def geomean(ratios: np.ndarray) -> float:
    return float(np.exp(np.log(ratios).mean()))


if __name__ == "__main__":
    main()
