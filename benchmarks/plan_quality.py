"""Compare the predicted layer time of every policy with a lower bound, and `auto` with the best of the others.

For 16 workloads, 4 clusters, 3 kinds of experts, and the slots that memory gives, or at most 1, 2, 4 or 8 on each device. Planners are
given the exact loads, so this measures the planners and not the prediction of loads. Policies are compared by the cost model; `over_bound`
compares them with the linear-programming bound of `testing.bound.lower_bound`. `grouped_ep` is static expert parallelism in groups,
which is what people run; the bound, which is of one group, does not hold for it. Policies named after other systems have the split and the
collectives of these, for which the bound does not hold either; `laer+ours` is the placement of `laer` with this project's. `history` is
what `auto` makes of the loads of the step before, and `exact` what becomes of that plan after the routers (`fssdp.plan: exact`), when no
step has been measured yet; `late` is a plan that begins after the routers with nothing gathered, which `exact` goes over to where that has
been faster. All are priced on the true loads. What ranks wait for the plan (`hecate.parallel.cost.planning_seconds`) is in the seconds of
`exact` and `late`, and in rows of its own as a share of them. Imbalance is the busiest device's expert compute over the mean.

    python -m benchmarks.plan_quality [--quick] [--no-bound] [--resume] [--slots N ...] [--json FILE]

A call with `--resume` goes on with the cases that an earlier one lacks. The file has, of each cluster, kind of experts and number of slots,
how all workloads come out: ratios as `benchmarks.report.spread` has them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.grouped_ep import grouped_ep_seconds
from benchmarks.report import finish, kept_rows, recorded, resumable, spread
from hecate.parallel.cost.cost_model import ExecutionMode, PlanMode
from hecate.parallel.plan.measured_modes import modes_of
from hecate.parallel.planners import POLICIES, ROWS, WITH_OURS, PlanInput
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.simulator import simulate
from hecate.parallel.simulate.workloads import WORKLOADS
from testing.bound.lower_bound import lower_bound
from testing.plan_cases import EXPERTS, TOKENS, TOP_K, Kind, kinds, plan_input, price_row, topologies

SLOTS = (EXPERTS, 1, 2, 4, 8)
"""the most replicas on a device; the first: as many as fit into memory"""
TRAINED_TOP_K = 8
"""of the workloads like trained routers', whose statistics are of such models"""
STEPS = 3
MODES: dict[str, PlanMode] = {"history": "history", "exact": modes_of("exact")[0], "late": "exact"}
"""how layers go by a plan of `auto`, by the name of the column"""
BOUNDED = tuple(policy for policy in ROWS if f"{policy}+ours" not in ROWS)
"""those with this project's split and collectives, for which the bound holds"""


def main() -> None:
    parser = resumable(__doc__ or "")
    parser.add_argument("--slots", type=int, nargs="*", default=SLOTS, help="the most replicas on a device")
    parser.add_argument("--no-bound", action="store_true", help="leave out the bound, which takes most of the time")
    options = parser.parse_args()
    rows = [row for row in kept_rows(options) if options.no_bound or "bound_ms" in row]
    wanted: list[dict[str, Any]] = []
    for place, topology in topologies().items():
        for workload, make in list(WORKLOADS.items())[:: 4 if options.quick else 1]:
            top_k = TRAINED_TOP_K if workload.startswith("trained") else TOP_K
            loads = make(STEPS, 1, topology.world_size, EXPERTS, TOKENS, top_k, 0)
            for kind in kinds(top_k):
                for slots in options.slots[:: 3 if options.quick else 1]:
                    case = {"topology": place, "experts": kind.name, "workload": workload, "slots": slots}
                    given = plan_input(topology, kind.cost, loads[-1, 0], slots)
                    compared = partial(compare, kind, given, loads, bound=not options.no_bound)
                    wanted += recorded(rows, case, compared, options.json)
                    print(shown(wanted[-1]), flush=True)
    finish("plan_quality", wanted, summary(wanted), options.json, kept=compact(wanted))


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for people, in which a policy with this project's split and collectives is left out where these make no difference."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    return {key: value for key, value in rounded.items() if key not in WITH_OURS or value != rounded[key.removesuffix("+ours")]}


def compare(kind: Kind, given: PlanInput, loads: np.ndarray, *, bound: bool) -> list[dict[str, float]]:
    """One row: milliseconds of every policy in one case, and what else the program reports.

    Args:
        given: the last step.
        loads: int64 [steps, 1, experts, ranks].
    """
    row: dict[str, float] = {}
    for policy, planner in ROWS.items():
        plan = planner(given)
        replicas_D = (plan.where_LED[0] & ~given.owned_LED[0]).sum(0)
        # `full` and some others may need more replicas than a device has room for; such a plan does not count.
        fits = bool((replicas_D <= given.slots_D).all())
        row[policy] = 1e3 * float(price_row(policy, plan, given).seconds.total[0]) if fits else math.inf
    row["grouped_ep"] = 1e3 * grouped_ep_seconds(given, 0)
    if bound:
        row["bound_ms"] = 1e3 * lower_bound(given, 0, plan_seconds=min(row[policy] for policy in BOUNDED) / 1e3)
    for name, mode in MODES.items():
        step = simulated(given, loads, ExecutionMode(plan=mode))
        row[f"{name}_ms"], row[f"{name}_imbalance"] = 1e3 * (step.step_seconds - step.seconds.attention), step.imbalance
        row[f"{name}_planning_ms"] = 1e3 * step.seconds.planning
    return [row]


def simulated(given: PlanInput, loads: np.ndarray, execution: ExecutionMode) -> Any:
    """`auto` in the last of the steps."""
    only_auto = {"auto": POLICIES["auto"]}
    cost = replace(given.cost, frozen_bytes=0.0)  # frozen parts stay for many steps, and this is one
    return simulate(loads[-2:], only_auto, Setting(topology=given.topology, cost=cost, slots_D=given.slots_D, execution=execution))[0]


def compact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cluster, kind of experts and number of slots: the spreads of ratios over all workloads."""
    found = []
    for place, experts, slots in dict.fromkeys((row["topology"], row["experts"], row["slots"]) for row in rows):
        of_case = [row for row in rows if (row["topology"], row["experts"], row["slots"]) == (place, experts, slots)]
        over = {f"{name} / auto": (name, "auto") for name in (*POLICIES, "grouped_ep") if name != "auto"}
        over |= {f"{policy.removesuffix('+ours')} / {policy}": (policy.removesuffix("+ours"), policy) for policy in WITH_OURS}
        over |= {f"{mode} / history": (f"{mode}_ms", "history_ms") for mode in ("exact", "late")}
        over |= {f"planning / {mode}": (f"{mode}_planning_ms", f"{mode}_ms") for mode in ("exact", "late")}
        over |= {"auto / bound": ("auto", "bound_ms")} if "bound_ms" in rows[0] else {}
        ratios = {
            name: spread(row[one] / row[other] for row in of_case if math.isfinite(row[one]) and math.isfinite(row[other]))
            for name, (one, other) in over.items()
        }
        others = [policy for policy in ROWS if policy != "auto"]
        ratios["auto / best other"] = spread(row["auto"] / min(row[policy] for policy in others) for row in of_case)
        skews = {f"{mode} imbalance": spread(row[f"{mode}_imbalance"] for row in of_case) for mode in MODES}
        found.append({"topology": place, "experts": experts, "slots": slots, **ratios, **skews})
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric means and worst cases over all rows."""
    seconds = {policy: np.array([row[policy] for row in rows]) for policy in (*ROWS, "grouped_ep")}
    auto = seconds["auto"]
    others = np.min([seconds[policy] for policy in ROWS if policy != "auto"], axis=0)
    found = {"auto_over_best_policy_geomean": geomean(auto / others), "auto_over_best_policy_worst": float((auto / others).max())}
    found["auto_over_best_policy_lost_share"] = float((auto > 1.005 * others).mean())
    for slots in dict.fromkeys(row["slots"] for row in rows):
        of_slots = np.array([row["slots"] == slots for row in rows])
        name = "memory" if slots == EXPERTS else slots
        found[f"auto_over_best_policy_slots_{name}_geomean"] = geomean((auto / others)[of_slots])
        found[f"auto_over_best_policy_slots_{name}_worst"] = float((auto / others)[of_slots].max())
    for policy in ("hecate_paper", "grouped_ep"):
        found[f"{policy}_over_auto_geomean"] = geomean((seconds[policy] / auto)[np.isfinite(seconds[policy])])
    for policy in WITH_OURS:
        original = policy.removesuffix("+ours")
        counted = np.isfinite(seconds[policy])
        found[f"{original}_over_{policy}_geomean"] = geomean((seconds[original] / seconds[policy])[counted])
    for mode in ("exact", "late"):
        ratio = np.array([row[f"{mode}_ms"] / row["history_ms"] for row in rows])
        found |= {f"{mode}_over_history_geomean": geomean(ratio), f"{mode}_over_history_worst": float(ratio.max())}
        share = np.array([row[f"{mode}_planning_ms"] / row[f"{mode}_ms"] for row in rows])
        found |= {f"{mode}_planning_share_mean": float(share.mean()), f"{mode}_planning_share_most": float(share.max())}
    for place in dict.fromkeys(row["topology"] for row in rows):
        for what, full in (("light", False), ("full", True)):
            skews = [
                row["exact_imbalance"]
                for row in rows
                if row["topology"] == place and row["slots"] >= 2 and row["experts"].startswith("full") == full
            ]
            found[f"exact_imbalance_{what}_experts_{place}_mean"] = float(np.mean(skews)) if skews else math.nan
    if "bound_ms" in rows[0]:
        bound = np.array([row["bound_ms"] for row in rows])
        for policy in BOUNDED:
            assert (seconds[policy] >= bound * (1 - 1e-6)).all(), f"{policy} beats the lower bound"
            counted = np.isfinite(seconds[policy])
            if counted.any():
                found[f"{policy}_over_bound_geomean"] = geomean((seconds[policy] / bound)[counted])
        found["auto_over_bound_worst"] = float((auto / bound).max())
    return found


def geomean(ratios: np.ndarray) -> float:
    return float(np.exp(np.log(ratios).mean()))


if __name__ == "__main__":
    main()
