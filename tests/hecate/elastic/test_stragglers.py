"""Slow ranks are named from what all ranks report, once, and called fast again once (`hecate.elastic.stragglers`)."""

from __future__ import annotations

from hecate.elastic.stragglers import SlowRanks, SpeedWindows
from hecate.parallel.cluster.topology import local_topology
from hecate.report.events import DenseWork

THREE = local_topology(3, cuda=False)


def work(*seconds: float) -> dict[int, DenseWork]:
    """A step of 100 tokens on each rank."""
    return {rank: DenseWork(100, taken) for rank, taken in enumerate(seconds)}


def test_a_slow_rank_is_named_after_two_full_windows_and_only_once() -> None:
    slow = SlowRanks()
    said = [slow.after_step(work(0.06, 0.18, 0.06), THREE) for _ in range(8)]
    assert [bool(lines) for lines in said] == [False, False, False, True, False, False, False, False], "0.06 s are half a window"
    assert said[3] == ["straggler: rank 1 (node 0) computes at 0.33 of its planned speed, and all other ranks wait for it"]
    assert [slow.after_step(work(0.06, 0.06, 0.06), THREE) for _ in range(4)] == [[], ["rank 1 is no longer slow"], [], []]
    slow.begin()
    assert slow.after_step(work(0.2, 0.2, 0.9), THREE) == [], "windows of other ranks do not count"
    assert slow.after_step(work(0.2, 0.2, 0.9), THREE)[0].startswith("straggler: rank 2 ")


def test_a_single_slow_window_names_nobody_and_a_faster_rank_is_no_straggler() -> None:
    slow = SlowRanks()
    steps = [work(0.2, 0.5, 0.2), work(0.2, 0.2, 0.2), work(0.2, 0.5, 0.2), work(0.2, 0.2, 0.2), work(0.2, 0.2, 0.1), work(0.2, 0.2, 0.1)]
    assert [line for one in steps for line in slow.after_step(one, THREE)] == []


def test_ranks_that_are_left_out_are_not_waited_for() -> None:
    seen = SpeedWindows()
    assert seen.add({}, THREE) is None
    assert seen.add({0: DenseWork(100, 0.2), 2: DenseWork(100, 0.4)}, THREE) == {}
    assert seen.speeds == {0: 1.0, 2: 0.5}
    assert seen.add({0: DenseWork(100, 0.2), 2: DenseWork(100, 0.4)}, THREE) == {2: 0.5}
