"""What `benchmarks.moe_layer` compares, and its ceilings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.moe_layer_ceiling import Rates, ceiling, expert_parallel_seconds, least_seconds, served
from benchmarks.moe_layer_parts import ROUTINGS, Shape, route
from benchmarks.moe_layer_ratios import COMPARISONS, PER_CHOICE, compared, side_by_side, summary_of
from benchmarks.ratios import Budget
from hecate.parallel.cost.cost_model import LayerCost

FREE_BYTES = Rates(flops=50e9, bytes_per_s=math.inf)
THREE_TOKENS = [np.array([[0, 1], [0, 2], [1, 0]]), np.array([[2, 3], [1, 3], [0, 1]])]
"""of two ranks that own two experts each"""


def cost_of(shape: Shape) -> LayerCost:
    """By hand: a gated FFN has three products, an expert three pairs; all are frozen but the pairs."""
    row, pairs = 2.0 * 3 * shape.hidden * shape.ffn, 3 * shape.rank * (shape.hidden + shape.ffn)
    return LayerCost(
        trainable_bytes=4.0 * pairs,
        top_k=shape.top_k,
        row_bytes=4.0 * shape.hidden,
        row_flops=row,
        assignment_flops=2.0 * pairs,
        assignment_backward=2.0,
        non_moe_flops=shape.attention_flops,
        non_moe_backward=1.0,
    )


def test_tokens_travel_once_a_rank_or_once_a_choice() -> None:
    once, each = (served(THREE_TOKENS, 4, per_choice=per_choice) for per_choice in (False, True))
    assert (once.rows_W.tolist(), once.sent_WW.tolist()) == ([5, 3], [[0, 1], [2, 0]])
    assert (each.rows_W.tolist(), each.sent_WW.tolist()) == ([8, 4], [[0, 1], [3, 0]])
    assert once.assignments_W.tolist() == each.assignments_W.tolist() == [8, 4]


def test_expert_parallelism_waits_for_the_busiest_rank_and_its_port() -> None:
    cost = LayerCost(trainable_bytes=0.0, top_k=2, row_bytes=10.0, row_flops=100.0, assignment_flops=10.0, non_moe_flops=7.0)
    seconds = expert_parallel_seconds(served(THREE_TOKENS, 4, per_choice=False), cost, Rates(flops=1.0, bytes_per_s=1.0))
    assert seconds == 5 * 100 * 2 + 8 * 10 * 3 + 7 * 3 + 4 * 2 * 10


def test_a_plan_computes_each_token_once() -> None:
    cost = LayerCost(trainable_bytes=2.0, top_k=2, row_flops=100.0, assignment_flops=10.0, non_moe_flops=30.0)
    assert least_seconds(3, cost, Rates(flops=1.0, bytes_per_s=1.0)) == 3 * 100 * 2 + 6 * 10 * 3 + 30 * 3


@pytest.mark.parametrize(
    ("routing", "per_choice", "rows", "assignments"),
    [
        ("zipf(1.2)", False, 1.94, 3.15),
        ("balanced", False, 2 * (1 - 4 * 3 / (8 * 7)), 2.0),
        ("zipf(1.2)", True, 3.15, 3.15),
        ("balanced", True, 2.0, 2.0),
    ],
)
def test_ceilings_where_bytes_cost_nothing(routing: str, per_choice: bool, rows: float, assignments: float) -> None:
    """By hand, for the sizes of the benchmark: 12.8 MFLOP of attention and base for each token, and 1.1 for its two experts' pairs.

    Rows are of the busier rank, over a rank's tokens: two of eight experts are both elsewhere with odds of (4 * 3) / (8 * 7) if all are
    equally likely. Those of Zipf's odds were counted.
    """
    shape = Shape()
    routed = [route(routing, shape, seed=rank)[0].numpy() for rank in range(2)]
    attention, row, pairs = 2 * 8 * 512**2, 2 * 6 * 512 * 1408, 3 * 2 * 3 * 16 * (512 + 1408)
    hand = (attention + rows * row + assignments * pairs) / (attention + row + 2 * pairs)
    assert ceiling(routed, shape.experts, cost_of(shape), FREE_BYTES, per_choice=per_choice) == pytest.approx(hand, rel=0.02)


def test_a_slower_link_raises_the_ceiling() -> None:
    shape = Shape(tokens=256)
    routed = [route("balanced", shape, seed=rank)[0].numpy() for rank in range(2)]
    free, slow = (
        ceiling(routed, shape.experts, cost_of(shape), dataclasses.replace(FREE_BYTES, bytes_per_s=rate), per_choice=False)
        for rate in (math.inf, 1e9)
    )
    assert slow > free > 1


def test_compared_sides_are_neighbours() -> None:
    order = side_by_side(compared("mixlora", "zipf(1.2)"))
    assert set(order) == {side for pair in compared("mixlora", "zipf(1.2)") for side in pair}
    assert order[:4] == [PER_CHOICE, "hecate_paper", "static_ep", "auto"]
    assert compared("mixlora", "hot") == []


def test_the_summary_has_a_ratio_of_each_comparison() -> None:
    """Ours takes 2 s, all others 3 s; the worst of four routings is the one where ours takes 6 s."""
    budget = Budget(half_width=0.02, rounds=16)
    rows = [
        {"kind": kind, "policy": side, "routing": routing, "ms_all": [ms] * 16, "cpu_ms_all": [ms] * 16}
        for kind in ("mixlora", "full")
        for routing in ROUTINGS
        for side in {side for one in COMPARISONS[kind] for side in (one.ours, one.theirs)}
        for ms in [6.0 if (kind, side, routing) == ("full", "auto", "hot") else 2.0 if side in ("hecate_paper", "auto") else 3.0]
    ]
    found = summary_of(rows, budget)
    assert found["zipf_speedup_over_static_ep"].value == pytest.approx(1.5)
    assert found["zipf_speedup_over_static_ep"].verdict == 1
    assert found["full_experts_worst_over_balanced_ep"].value == pytest.approx(2.0)
    assert found["full_experts_worst_over_balanced_ep"].verdict == -1
    assert found["rematerialize_slowdown_cpu"].verdict == 0
    assert "frozen_moe_worst_over_balanced_ep" not in found
