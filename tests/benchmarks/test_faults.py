"""What `benchmarks.faults` makes of seconds that were measured."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.faults import Cost, added, copies, digests, kills, saves_added
from benchmarks.paired_steps import Taken
from benchmarks.ratios import LEAST_PAIRS, Budget, of_times
from hecate.apps.check.drill.outcome import DrillOutcome

ROUNDS = 2 * LEAST_PAIRS
BUDGET = Budget(half_width=0.01, rounds=ROUNDS)


def test_a_save_beside_the_steps_is_set_against_one_step() -> None:
    """Stretches are of four steps: one more second over four is one step more."""
    found = {"none": Taken([4.0] * ROUNDS, [4.0] * ROUNDS), "beside": Taken([5.0] * ROUNDS, [4.5] * ROUNDS)}
    cost = saves_added("save", "beside", found, BUDGET)
    assert (cost.value, cost.processor) == (pytest.approx(1.0), pytest.approx(0.5))
    assert cost.verdict == "missed"


def test_the_rank_whose_digests_take_most_counts() -> None:
    few, many = {"digests": [0.1] * ROUNDS, "saves": [10.0] * ROUNDS}, {"digests": [0.6] * ROUNDS, "saves": [10.0] * ROUNDS}
    assert digests([few, few], BUDGET).verdict == "met"
    assert digests([few, many], BUDGET).value == pytest.approx(0.06)


@pytest.mark.parametrize(("goal", "verdict"), [(0.001, "missed"), (0.08, "not decided"), (0.3, "met")])
def test_a_goal_inside_the_interval_is_not_decided(goal: float, verdict: str) -> None:
    """Pairs add 1 to 15 %."""
    ratios = np.repeat(np.random.default_rng(0).permutation(np.linspace(1.01, 1.15, 2 * LEAST_PAIRS)), 2).tolist()
    clock = of_times(ratios, [1.0] * len(ratios), BUDGET)
    assert added("cost", clock, goal, clock).verdict == verdict


def test_copies_must_be_exactly_one_more() -> None:
    assert copies([{"owned": 3, "backups": 1}, {"owned": 1, "backups": 3}]).verdict == "met"
    assert copies([{"owned": 3, "backups": 1}, {"owned": 1, "backups": 2}]).verdict == "missed"


def test_goals_of_kills() -> None:
    counts = {"noticed_ms": 240.0, "noticed_worst_ms": 900.0, "recovered_ms": 1001.0, "recovered_worst_ms": 1500.0}
    noticed, recovered = kills(DrillOutcome("", 1, 1, counts))
    assert noticed.verdict == "met"
    assert noticed.row()["high"] == 900
    assert recovered.verdict == "missed"
    assert Cost("zero", 0.0, 0, 0, None, 0.05).verdict == "met"
