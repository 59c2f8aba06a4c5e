"""Compute how large a rank's buffer would have to be if dispatch did not read row counts: rows received, over the tokens of a rank.

Without the counts on the host a rank computes on a buffer of fixed size, filled or not, so each extra row costs what a real one does. For
the 13 workloads, 4 clusters and 3 kinds of experts of `benchmarks.plan_quality`, policies plan from three steps of loads, and the next
step's tokens are served by that plan. What counts is the fullest rank, since buffers must not overflow and have one size on all ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.report import arguments, finish
from hecate.parallel.cost.cost_model import price_traffic
from hecate.parallel.planners import POLICIES
from hecate.parallel.simulate.workloads import WORKLOADS
from testing.plan_cases import EXPERTS, TOKENS, TOP_K, kinds, plan_input, topologies

SEEN = 3
"""steps from whose mean loads a plan is made"""
JUDGED = ("auto", "hecate_paper", "static_ep")


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rows: list[dict[str, Any]] = []
    for place, topology in topologies().items():
        for kind in kinds():
            for workload, make in list(WORKLOADS.items())[:: 4 if options.quick else 1]:
                loads = make(SEEN + 1, 1, topology.world_size, EXPERTS, TOKENS, TOP_K, 0)[:, 0].astype(np.float64)
                given = plan_input(topology, kind.cost, loads[:SEEN].mean(0))
                row: dict[str, Any] = {"topology": place, "experts": kind.name, "workload": workload}
                for policy in JUDGED:
                    plan = POLICIES[policy](given).layer(given, 0)
                    traffic_XD = plan.traffic(loads[SEEN], topology)
                    rows_D = price_traffic(given.owner_LE[0], plan.placement.where_ED, traffic_XD, topology, kind.cost).rows.computed_D
                    # Where no token may travel no counts are read, whatever dispatch does.
                    row[policy] = float(rows_D.max()) / TOKENS if plan.dispatches(topology) else 0.0
                rows.append(row)
    summary: dict[str, float] = {}
    for policy in JUDGED:
        travels = np.array([row[policy] for row in rows if row[policy]])
        summary[f"{policy}_share_that_dispatches"] = len(travels) / len(rows)
        for name, percent in (("median", 50), ("95th_percentile", 95), ("worst", 100)):
            summary[f"{policy}_capacity_{name}"] = float(np.percentile(travels, percent))
    finish("dispatch_capacity", rows, summary, options.json)


if __name__ == "__main__":
    main()
