"""Expert parallelism in groups, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.grouped_ep import grouped_ep_seconds
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners.policies.static_ep import plan_static_ep
from testing.unit_cases import layer_input, unit_topology

COST = LayerCost(trainable_bytes=1.0, non_moe_flops=6.0)


def test_a_layer_under_expert_parallelism_in_groups_by_hand() -> None:
    """Two experts on four ranks that have one assignment of each: in groups of two each rank computes two of 3 FLOPs and the optimizer's
    step of one expert of a byte; two owners of an expert sum its byte of gradient. One group leaves two ranks idle: 4 assignments a rank.
    """
    cost = LayerCost(trainable_bytes=1.0, assignment_flops=1.0)
    given = layer_input([0, 2], [[1, 1]] * 4, 1, on=unit_topology((0,) * 4, memory_bandwidth=1.0), cost=cost)
    alone = float(plan_static_ep(given).seconds(given).total[0])
    grouped = grouped_ep_seconds(given, 0)
    assert (alone, grouped) == (4 * 3 + 1, 2 * 3 + 1 + 1)
    assert grouped_ep_seconds(replace(given, slots_D=np.zeros(4, dtype=np.int64)), 0) == grouped  # a rank owns one expert in both
