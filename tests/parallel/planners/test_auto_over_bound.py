"""`auto` is close to the lower bound, on small cases like those of `benchmarks.plan_quality`."""

from __future__ import annotations

from itertools import cycle, product

import numpy as np
import pytest

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.planners import ROWS, PlanInput
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.placement import contiguous_owners
from testing.bound.lower_bound import lower_bound
from testing.plan_cases import MEMORY_SHARE, Kind, kinds, price_row, topologies

pytest.importorskip("scipy.optimize")

EXPERTS, TOKENS, TOP_K = 16, 4096, 2
WORKLOADS_EACH = 3
"""of each cluster and kind of experts: the next ones in turn, so that all 16 occur"""
MEAN, WORST, OVER_BEST = 1.09, 1.32, 1.005
"""over the bound, and over the best other policy: what is reached and a hair. Few experts are harder to share evenly and to bound than the
benchmark's 64, to which the goals of 1.05 and 1.25 apply. The bound takes the two exchanges of a gather over leaders side by side, the
price one after the other, as they are executed."""


def small(topology: Topology, devices: int) -> Topology:
    """The first `devices` of each node."""
    kept = sorted(rank for node in range(topology.num_nodes) for rank in topology.ranks_of_node(node)[:devices])
    return topology.take(kept)


def cases() -> list[tuple[str, Kind, str, PlanInput]]:
    """Cluster, kind of experts, workload, and one layer."""
    found, names = [], cycle(WORKLOADS)
    for (place, whole), kind in product(topologies().items(), kinds()):
        topology = small(whole, 8 if place == "8x1" else 2)
        slots = np.minimum((MEMORY_SHARE * np.asarray(topology.memory) / kind.cost.replica_bytes).astype(np.int64), EXPERTS)
        owners = contiguous_owners(EXPERTS, topology.world_size)[None]
        for name in (next(names) for _ in range(WORKLOADS_EACH)):
            loads = WORKLOADS[name](3, 1, topology.world_size, EXPERTS, TOKENS, TOP_K, 0)[2].astype(np.float64)
            found.append((place, kind, name, PlanInput(owners, loads, topology, kind.cost, slots)))
    return found


def test_auto_is_near_what_no_plan_can_beat() -> None:
    over, over_best = {}, {}
    for place, kind, name, given in cases():
        seconds = {}
        for policy, planner in ROWS.items():
            plan = planner(given)
            if ((plan.where_LED & ~given.owned_LED).sum(1) <= given.slots_D).all():
                seconds[policy] = float(price_row(policy, plan, given).seconds.total[0])
        mine = seconds.pop("auto")
        case = (place, kind.name, name)
        over[case] = mine / lower_bound(given, 0, plan_seconds=mine)
        over_best[case] = mine / min(seconds.values())
    assert {name for _, _, name in over} == set(WORKLOADS)
    assert min(over.values()) >= 1 - 1e-6
    assert max(over.values()) <= WORST, sorted(over.items(), key=lambda item: item[1])[-3:]
    assert np.exp(np.mean(np.log(list(over.values())))) <= MEAN
    assert max(over_best.values()) <= OVER_BEST, sorted(over_best.items(), key=lambda item: item[1])[-3:]
