"""Compare the predicted layer time of every policy with a lower bound, for 13 workloads on 4 clusters and 3 kinds of experts.

Planners are given the exact loads, so this measures the planners and not the prediction of loads. `hecate_over_auto` and
`auto_over_best_policy` compare the plans by the cost model; `over_bound` compares them with the linear-programming bound of
`hecate.parallel.lower_bound`. `grouped_ep` is static expert parallelism in groups, which is what people run; the bound, which is of one
group, does not hold for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.report import arguments, finish
from hecate.forecast.sharding_groups import grouped_ep_seconds
from hecate.parallel.lower_bound import lower_bound
from hecate.parallel.planners import POLICIES
from hecate.parallel.workloads import WORKLOADS
from testing.plan_cases import EXPERTS, TOKENS, TOP_K, kinds, plan_input, topologies


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--slots", type=int, default=EXPERTS, help="the most replicas on a device (default: as many as fit into memory)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for place, topology in topologies().items():
        for kind in kinds():
            for workload, make in list(WORKLOADS.items())[:: 4 if options.quick else 1]:
                loads = make(3, 1, topology.world_size, EXPERTS, TOKENS, TOP_K, 0)[2, 0]
                given = plan_input(topology, kind.cost, loads, options.slots)
                row: dict[str, Any] = {"topology": place, "experts": kind.name, "workload": workload}
                for policy, planner in POLICIES.items():
                    plan = planner(given)
                    replicas_D = (plan.where_LED[0] & ~given.owned_LED[0]).sum(0)
                    # `full` and some others may need more replicas than a device has room for; such a plan does not count.
                    fits = bool((replicas_D <= given.slots_D).all())
                    row[policy] = 1e3 * float(plan.seconds(given).total[0]) if fits else math.inf
                row["grouped_ep"] = 1e3 * grouped_ep_seconds(given, 0)
                row["bound_ms"] = 1e3 * lower_bound(given, 0, plan_seconds=min(row[policy] for policy in POLICIES) / 1e3)
                rows.append(row)
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    bound = np.array([row["bound_ms"] for row in rows])
    seconds = {policy: np.array([row[policy] for row in rows]) for policy in POLICIES}
    best = np.min([seconds[policy] for policy in POLICIES if policy != "auto"], axis=0)
    auto = seconds["auto"]
    grouped = np.array([row["grouped_ep"] for row in rows])
    for policy in POLICIES:
        assert (seconds[policy] >= bound * (1 - 1e-6)).all(), f"{policy} beats the lower bound"
    hecate = np.isfinite(seconds["hecate_paper"])
    counted = {policy: np.isfinite(seconds[policy]) for policy in POLICIES}
    summary = {
        **{
            f"{policy}_over_bound_geomean": float(np.exp(np.log(seconds[policy][counted[policy]] / bound[counted[policy]]).mean()))
            for policy in POLICIES
            if policy != "auto" and counted[policy].any()
        },
        "auto_over_bound_geomean": float(np.exp(np.log(auto / bound).mean())),
        "auto_over_bound_worst": float((auto / bound).max()),
        "hecate_paper_over_auto_geomean": float(np.exp(np.log(seconds["hecate_paper"][hecate] / auto[hecate]).mean())),
        "grouped_ep_over_auto_geomean": float(np.exp(np.log(grouped / auto)[np.isfinite(grouped)].mean())),
        "auto_over_best_policy_worst": float((auto / best).max()),
    }
    finish("plan_quality", rows, summary, options.json)


if __name__ == "__main__":
    main()
