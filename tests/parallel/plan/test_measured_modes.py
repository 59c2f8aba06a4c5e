"""What each way of planning would have cost in past steps, and which one each layer goes by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, PlanChoice
from hecate.parallel.plan.measured_modes import MODES, MeasuredModes, judge_step, modes_of
from hecate.parallel.planners import POLICIES, Plan, PlanInput
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.predictors import KEPT_WINDOWS, predicted_loads
from testing.plan_cases import EXPERTS, TOKENS, TOP_K, kinds, plan_input, topologies
from testing.unit_cases import unit_topology

NODE = unit_topology((0, 0))
COST = LayerCost(trainable_bytes=4.0, assignment_flops=1.0, non_moe_flops=5.0)
"""an assignment takes one second forward and two backward; an expert travels in four seconds, which five of attention hide"""
WINDOW = 5


def hottest_everywhere(given: PlanInput) -> Plan:
    """The expert with the most assignments on both ranks, each of which serves its own."""
    hottest_LE = given.expected_LED.sum(-1)
    copied_LE = hottest_LE == hottest_LE.max(-1, keepdims=True)
    where_LED = given.owned_LED | copied_LE[..., None]
    quota_LED = np.where(copied_LE[..., None], given.expected_LED, given.expected_LED.sum(-1, keepdims=True) * given.owned_LED)
    return Plan(given.owner_LE, where_LED, quota_LED)


@pytest.mark.parametrize(
    ("micro_steps", "frozen_bytes", "seconds"),
    [
        # Rank 1 serves all 16 assignments of expert 1, as expert 0 was expected to be hot: 48 s. After the router it is brought to rank 0,
        # 4 s, and each rank serves 8. The gradients' way back is hidden.
        (1, 0.0, [48, 24 + 4, 24 + 4]),
        # Two micro-steps bring it twice.
        (2, 0.0, [48, 24 + 8, 24 + 8]),
        # Its frozen part travels once, if it was not there. What calibration takes for it, it takes in each micro-step.
        (1, 10.0, [48, 24 + 14, 24 + 14]),
    ],
)
def test_seconds_by_hand(micro_steps: int, frozen_bytes: float, seconds: list[float]) -> None:
    execution, cost = ExecutionMode(micro_steps=micro_steps), replace(COST, frozen_bytes=frozen_bytes, non_moe_flops=5.0)
    predicted_LED, true_LED = np.array([[[8.0, 8.0], [0.0, 0.0]]]), np.array([[[0.0, 0.0], [8.0, 8.0]]])
    given = PlanInput(np.array([[0, 1]]), predicted_LED, NODE, cost, np.full(2, 2), execution=execution)
    before = judge_step(hottest_everywhere, given, predicted_LED, None)
    assert before.seconds_ML[[0, 2], 0].tolist() == pytest.approx([24, 24 + 4 * micro_steps]), "history has foreseen it"
    judged = judge_step(hottest_everywhere, given, true_LED, before)
    assert judged.seconds_ML[:, 0].tolist() == pytest.approx(seconds)
    assert judged.from_history_LED[0].tolist() == [[True, True], [False, True]]
    assert judged.from_own_LED[0].tolist() == [[True, False], [True, True]]


def jumping_beside_steady(steps: int) -> tuple[PlanInput, np.ndarray]:
    """Loads [steps, 2, experts, ranks] on a node of eight GPUs, and all else that plans are made from.

    Layer 0 always has the same loads. In layer 1 another expert is hot in each step.
    """
    topology, kind = topologies()["8x1"], kinds()[0]
    size = (topology.world_size, EXPERTS, TOKENS, TOP_K, 0)
    steady, jumping = WORKLOADS["lognormal"](1, 1, *size), WORKLOADS["rotating"](steps, 1, *size)
    loads_SLED = np.concatenate([np.repeat(steady, steps, axis=0), jumping], axis=1)
    owner_LE = np.tile(contiguous_owners(EXPERTS, topology.world_size), (2, 1))
    return PlanInput(owner_LE, None, topology, kind.cost, plan_input(topology, kind.cost, steady[0, 0]).slots_D), loads_SLED


def test_a_layer_whose_loads_jump_plans_late_and_a_steady_one_from_history() -> None:
    given, loads_SLED = jumping_beside_steady(6)
    steps = [object() for _ in loads_SLED]
    modes = MeasuredModes(WINDOW, modes=modes_of("auto"))
    assert modes.choose(POLICIES["auto"], given, steps[:1], loads_SLED[:1]) == ["calibrated"] * 2, "nothing is measured yet"
    steady, jumping = modes.choose(POLICIES["auto"], given, steps, loads_SLED)
    assert steady == "history"
    assert jumping in ("calibrated", "exact")


def test_a_rank_that_begins_with_the_recorded_loads_chooses_alike() -> None:
    """And a step is judged once: the second time nothing is planned."""
    given, loads_SLED = jumping_beside_steady(4)
    steps = [object() for _ in loads_SLED]
    asked: list[PlanInput] = []

    def planner(given: PlanInput) -> Plan:
        asked.append(given)
        return hottest_everywhere(given)

    grown, fresh = MeasuredModes(WINDOW), MeasuredModes(WINDOW)
    for known in range(1, len(steps) + 1):
        found = grown.choose(planner, given, steps[:known], loads_SLED[:known])
    assert {one.execution.plan for one in asked} == set(MODES)
    once = len(asked)
    assert grown.choose(planner, given, steps, loads_SLED) == found
    assert len(asked) == once
    assert fresh.choose(planner, given, steps, loads_SLED) == found
    assert len(asked) == 2 * once


@pytest.mark.parametrize("choice", ["auto", "exact"])
def test_a_run_that_is_resumed_chooses_as_one_that_is_not(choice: PlanChoice) -> None:
    """Of a long run the newest steps are left; and all are judged by the owners that experts have now."""
    given, loads_SLED = jumping_beside_steady(6 * WINDOW)
    steps, kept = [object() for _ in loads_SLED], KEPT_WINDOWS * WINDOW
    moved = replace(given, owner_LE=np.roll(given.owner_LE, 1, axis=1))
    grown = MeasuredModes(WINDOW, modes=modes_of(choice))
    for known in range(1, len(steps) + 1):
        first, now = max(0, known - kept), moved if known > 4 * WINDOW else given
        found = grown.choose(hottest_everywhere, now, steps[first:known], loads_SLED[first:known])
        fresh = MeasuredModes(WINDOW, modes=modes_of(choice))
        assert fresh.choose(hottest_everywhere, now, steps[first:known], loads_SLED[first:known]) == found
        if choice == "auto":  # under exact, what was judged more closely than this choice needs stays so
            of_grown, of_fresh = ([one.seconds_ML for _, one in measured._judged] for measured in (grown, fresh))
            np.testing.assert_array_equal(of_grown, of_fresh)


def test_only_layers_whose_choice_is_close_are_planned_after_the_router_again() -> None:
    """Under `exact`: the choice is that of steps judged in full, and where an early gather is clearly faster nothing more is planned."""
    given, loads_SLED = jumping_beside_steady(6)
    steps, asked = [object() for _ in loads_SLED], []
    modes = modes_of("exact")

    def planner(given: PlanInput) -> Plan:
        asked.extend([given.execution.plan] * given.num_layers)
        return POLICIES["auto"](given)

    measured = MeasuredModes(WINDOW, splits=True, modes=modes)
    for known in range(1, len(steps) + 1):
        chosen = measured.choose(planner, given, steps[:known], loads_SLED[:known])
    assert asked.count("calibrated") < len(steps[1:]) * 2, "the steady layer begins with history's plan, whatever it becomes"
    judged = [
        judge_step(
            POLICIES["auto"], replace(given, loads_LED=predicted_loads(loads_SLED[:at], WINDOW)), 1.0 * loads_SLED[at], None, splits=True
        )
        for at in range(1, len(steps))
    ]
    in_full_ML = np.sum([one.seconds_ML for one in judged], axis=0)[1:]
    assert chosen == [modes[index] for index in in_full_ML.argmin(0)]
    assert set(chosen) == set(modes)


def test_what_is_gained_after_the_router_decides_where_history_was_wrong() -> None:
    """As above, 48 s become 28 after the router, and as many without an early gather; of equal modes the first."""
    loads_SLED = np.array([[[[8, 8], [0, 0]]], [[[0, 0], [8, 8]]]])
    given = PlanInput(np.array([[0, 1]]), None, NODE, COST, np.full(2, 2))
    measured = MeasuredModes(WINDOW, modes=modes_of("exact"))
    assert measured.choose(hottest_everywhere, given, [object(), object()], loads_SLED) == ["calibrated"]


@pytest.mark.parametrize(("slowdown", "late"), [(0.0, True), (1e4, False)])
def test_layers_that_take_longer_to_judge_than_to_run_go_by_history(slowdown: float, late: bool) -> None:
    """Of `auto`, whose planning is counted; how slow a machine plans decides about the same loads. Then nothing is planned again."""
    asked: list[PlanInput] = []

    def planner(given: PlanInput) -> Plan:
        asked.append(given)
        return POLICIES["auto"](given)

    given, loads_SLED = jumping_beside_steady(6)
    topology = replace(given.topology, planning_slowdown=slowdown)
    given = replace(given, topology=topology, loads_LED=predicted_loads(loads_SLED, WINDOW))
    steps = [object() for _ in loads_SLED]
    for splits in (True, False):
        measured = MeasuredModes(WINDOW, splits=splits, modes=modes_of("auto"))
        asked.clear()
        jumping = measured.choose(planner, given, steps, loads_SLED)[1]
        assert bool(asked) == (jumping != "history") == (late or not splits)
    among_late = MeasuredModes(WINDOW, splits=True, modes=modes_of("exact")).choose(POLICIES["auto"], given, steps, loads_SLED)
    assert "history" not in among_late, "who asks for late plans gets them"


def test_one_rank_goes_by_history_from_the_first_step() -> None:
    given = PlanInput(np.array([[0, 0]]), None, unit_topology((0,)), COST, np.full(1, 2))
    measured = MeasuredModes(WINDOW, splits=True, modes=modes_of("auto"))
    assert measured.choose(POLICIES["auto"], given, [], np.empty((0, 1, 2, 1), dtype=np.int64)) == ["history"]
