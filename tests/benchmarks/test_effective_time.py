"""The simulation of failures agrees with Daly's closed form where that holds, and counts what a lost rank costs."""

from __future__ import annotations

import pytest

from benchmarks.effective_time import BETWEEN_FAILURES, Assumptions, Case, Costs, daly_interval, daly_share, simulated

FREE = Costs(redundancy_of_a_step=0.0, save_beside_of_a_step=0.0, noticed_s=0.0, recovered_s=0.0)


@pytest.mark.parametrize("interval", [3, 40])
def test_restarts_are_as_daly_says(interval: int) -> None:
    """Saves of 20 s and restarts of 130 s, in which failures strike, too."""
    assumed = Assumptions(
        step_s=4.0, state_bytes=160.0, base_bytes=0.0, write_bytes_per_s=1.0, read_bytes_per_s=1.0, commit_s=0, start_s=80
    )
    case = Case("restart", 8, 30.0, "log", FREE, assumed, interval)
    assert (case.save_s, case.restart_s) == (20, 130)
    expected = daly_share(4.0 * interval, 20.0, 130.0, BETWEEN_FAILURES)
    assert simulated(case, 1500).work(case) == pytest.approx(expected, rel=0.03)


def test_copies_are_a_restart_after_each_step() -> None:
    """Until one failure, or those that come while the others go on: steps of 20 s to which copies add 1 s, and 30 s to go on."""
    costs = Costs(redundancy_of_a_step=0.05, save_beside_of_a_step=0.0, noticed_s=0.0, recovered_s=30.0 / 11)
    case = Case("copies", 4096, 1e9, "log", costs, Assumptions(step_s=20.0))
    found = [simulated(case, 1, seed) for seed in range(1000)]
    assert sum(one.lost for one in found) == 0
    share = sum(one.steps for one in found) * 20 / sum(one.seconds for one in found)
    assert share == pytest.approx(daly_share(20.0, 1.0, 30.0, BETWEEN_FAILURES), rel=0.01)


def test_dalys_interval_is_the_best_one() -> None:
    best = daly_interval(20.0, BETWEEN_FAILURES)
    shares = [daly_share(best * factor, 20.0, 130.0, BETWEEN_FAILURES) for factor in (0.8, 1.0, 1.25)]
    assert max(shares) == shares[1]


def test_a_missing_rank_slows_each_step_until_its_replacement_joins() -> None:
    """Six sequences on each of 8 ranks are seven on each of 7."""
    case = Case("copies", 8, 300.0, "log", FREE)
    assert case.step_s(1) == pytest.approx(5.0 * 7 / 6)
    found = simulated(case, 1000)
    assert found.work(case) < 0.96 < found.trains
    at_once = Case("copies", 8, 0.0, "log", FREE)
    assert simulated(at_once, 1000).work(at_once) > 0.99
