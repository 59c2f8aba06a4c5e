"""What `benchmarks.faults` makes of seconds that were measured."""

from __future__ import annotations

import pytest

from benchmarks.faults import Cost, copies, digests, kills, saves_beside
from benchmarks.paired_steps import ratios
from hecate.drill.outcome import DrillOutcome


def test_ratios_are_of_pairs_and_not_of_medians() -> None:
    """The machine was three times as slow at the second pair."""
    found = ratios([2.0, 6.0, 1.0], [1.0, 3.0, 1.0])
    assert (found.median, found.low, found.high) == (2.0, 1.5, 2.0)


def test_a_save_beside_the_steps_is_set_against_one_step() -> None:
    """Stretches are of four steps: one more second over four is one step more. The processor time is that of both ranks."""
    first = {"none": [(4.0, 3.0)], "beside": [(5.0, 3.5)], "at_once": [(9.0, 9.0)]}
    second = {"none": [(4.0, 1.0)], "beside": [(5.0, 1.0)], "at_once": [(9.0, 9.0)]}
    cost = saves_beside([first, second])
    assert (cost.value, cost.processor) == (pytest.approx(1.0), pytest.approx(0.5))
    assert not cost.met


def test_the_rank_whose_digests_take_most_counts() -> None:
    few, many = {"digests": [0.1], "saves": [10.0]}, {"digests": [0.6], "saves": [10.0]}
    assert digests([few, few]).met
    assert digests([few, many]).value == pytest.approx(0.06)


def test_copies_must_be_exactly_one_more() -> None:
    assert copies([{"owned": 3, "backups": 1}, {"owned": 1, "backups": 3}]).met
    assert not copies([{"owned": 3, "backups": 1}, {"owned": 1, "backups": 2}]).met


def test_goals_of_kills() -> None:
    counts = {"noticed_ms": 240.0, "noticed_worst_ms": 900.0, "recovered_ms": 1001.0, "recovered_worst_ms": 1500.0}
    noticed, recovered = kills(DrillOutcome("", 1, 1, counts))
    assert noticed.met
    assert noticed.row()["high"] == 900
    assert not recovered.met
    assert Cost("zero", 0.0, 0, 0, None, 0.05).met
