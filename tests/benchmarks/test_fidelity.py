"""Test the parts of `benchmarks.fidelity` on which its results rest, without timing anything."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.fidelity import Measured, loads_of, planned_steps, routing_of, shared_cores_seconds
from benchmarks.gloo_steps import Shape, Stack, Wire, draw_routing
from benchmarks.step_probes import parts, plain_cost
from hecate.parallel.cluster.topology import Link, Topology, local_topology
from hecate.parallel.planners import POLICIES
from hecate.ranks.groups import ExpertGroups
from testing.ranks import run_ranks
from testing.unit_cases import unit_topology

SMALL = Shape(layers=2, hidden=8, ffn=12, rank=2, experts=6, top_k=2, tokens=20)


@pytest.mark.parametrize("load", [[20, 20, 0, 0], [20, 5, 15, 0], [10, 10, 10, 10], [0, 0, 0, 0], [20, 0, 19, 1]])
def test_a_drawn_routing_has_the_load_exactly(load: list[int]) -> None:
    expert_TK = draw_routing(np.array(load), 2, np.random.default_rng(0))
    assert np.bincount(expert_TK.flatten(), minlength=4).tolist() == load
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()


def test_a_drawn_routing_pairs_experts_by_chance() -> None:
    """Four experts with half of the tokens each: each of the six pairs has a sixth of the tokens. Dealt round, two would have all."""
    expert_TK = np.sort(draw_routing(np.full(4, 6000), 2, np.random.default_rng(0)), axis=1)
    for pair in combinations(range(4), 2):
        assert (expert_TK == pair).all(1).mean() == pytest.approx(1 / 6, abs=0.015)


@pytest.mark.parametrize(
    ("work", "cores", "seconds"),
    [
        # A core each: the slowest decides.
        ([1.0, 5.0], 2, 5.0),
        ([1.0, 5.0], 4, 5.0),
        # Four on two cores, all alike: as measured.
        ([3.0, 3.0, 3.0, 3.0], 2, 3.0),
        # One works alone, at twice the rate it has beside three others.
        ([0.0, 0.0, 0.0, 6.0], 2, 3.0),
        # Two have a core each.
        ([0.0, 0.0, 6.0, 6.0], 2, 3.0),
        # 4 s of all; then three on two cores, 4/3 times as fast, for 6 s of work; then one twice as fast for 2 s.
        ([4.0, 10.0, 10.0, 12.0], 2, 4 + 6 * 3 / 4 + 2 / 2),
        ([1.0, 3.0], 1, 1 + 2 / 2),
    ],
)
def test_shared_cores_by_hand(work: list[float], cores: int, seconds: float) -> None:
    assert shared_cores_seconds(np.array(work), cores) == pytest.approx(seconds)
    assert shared_cores_seconds(np.array(work[::-1]), cores) == pytest.approx(seconds)


def test_parts_are_those_that_the_probes_are_made_of() -> None:
    """64 tokens, 8 experts: an expert 1 s, a row 2 s, an assignment 3 s; 8 exchanges of 5 s, 7 s of copies a row; 4 s a byte; 11 s of
    a step's own.
    """
    shape = Shape(layers=2, experts=8, top_k=2, tokens=64)
    found = parts(
        {
            "attention": 13.0,
            "experts": 8 + 64 * 2 + 128 * 3,
            "experts_half_assignments": 8 + 64 * 2 + 64 * 3,
            "experts_quarter": 8 + 16 * 2 + 32 * 3,
            "dispatch_nothing": 40.0,
            "dispatch": 40.0 + 64 * 7,
            "megabyte": 5.0 + 4 * 2**20,
            "empty_step": 11.0 + 2 * 40.0,
        },
        shape,
    )
    assert (found.attention, found.row, found.assignment, found.slot) == pytest.approx((13, 2, 3, 1))
    assert (found.exchange, found.passed_row, found.byte, found.rest) == pytest.approx((5, 7, 4, 11))


CASES = (("static_ep", "zipf"), ("auto", "ragged_sources"), ("full", "empty_rank"), ("full over leaders", "zipf"))
LEADERS = unit_topology((0, 1, 1), near=Link(1e9, 0.0), far=Link(1e3, 0.0))
"""copies of rank 0's experts come in halves to the two ranks of the other node"""
FIRST = slice(3)
"""steps; from the second on, plans follow loads"""


def machines(policy: str, world: int) -> Topology:
    return LEADERS if "leaders" in policy else local_topology(world, cuda=False)


def counted_rank(rank: int, world: int) -> list[list[list[int]]]:
    """[cases][steps][ranks]: the bytes on the wire to each rank."""
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    counted = []
    for policy, workload in CASES:
        stack = Stack(SMALL, POLICIES[policy.split()[0]], machines(policy, world), plain_cost(SMALL), groups)
        steps = []
        for number, loads_LED in enumerate(loads_of(workload, world, SMALL)[FIRST]):
            drawn = [
                torch.from_numpy(routing_of(loads_ED[:, rank], SMALL, number, layer, rank)) for layer, loads_ED in enumerate(loads_LED)
            ]
            routing = [(expert_TK, torch.ones(expert_TK.shape, requires_grad=True)) for expert_TK in drawn]
            wire, before = Wire(world, rank), stack.engine.shards.bytes_sent
            with wire.counting():
                stack.step(number, torch.ones(SMALL.tokens, SMALL.hidden, requires_grad=True), routing)
            assert stack.engine.shards.bytes_sent - before == sum(wire.bytes_to)
            steps.append(wire.bytes_to)
        counted.append(steps)
    return counted


def test_the_wire_carries_what_the_plan_says() -> None:
    by_rank = run_ranks(3, counted_rank)
    for case, (policy, workload) in enumerate(CASES):
        measured = Measured([machines(policy, 3)], plain_cost(SMALL), [], [])
        for number, planned in enumerate(planned_steps(loads_of(workload, 3, SMALL)[FIRST], policy.split()[0], SMALL, measured)):
            assert planned.sent_WW.any() or policy == "static_ep"
            assert [counted[case][number] for counted in by_rank] == planned.sent_WW.tolist(), (policy, workload, number)
