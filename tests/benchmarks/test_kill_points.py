"""Kill points come from a seed, and what a killed run lacks is counted."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_plans import CALLS, DEATHS, RANKS, goes_on, in_a_row, plan_of
from benchmarks.kill_points import KilledRun, go_through, lost, read_runs, repeated, totals, write_runs
from hecate.apps.check.drill.ranks import Launched
from hecate.apps.check.drill.run import drill_folder


def run_of(*trained: tuple[int, int, list[int]]) -> Launched:
    """A run of which ranks have said (rank, step, samples)."""
    trace: list[dict[str, Any]] = [
        {"what": "trained", "rank": rank, "step": step, "more": [[0, sample] for sample in samples]} for rank, step, samples in trained
    ]
    return Launched(0, "", Path(), trace)


def test_plans_are_the_same_in_each_call_and_cover_everything() -> None:
    plans = [plan_of(number) for number in range(400)]
    assert plans[:20] == [plan_of(number) for number in range(20)]
    deaths = [one for plan in plans for one in plan.deaths]
    assert {one.place for one in deaths} == {*CALLS, "connect"}
    assert {one.rank for one in deaths} == set(range(RANKS))
    assert {one.step for one in deaths} == set(range(6))
    launchers = [plan.launcher for plan in plans]
    assert launchers[:20] == ["local"] * 18 + ["ray", "node_again"]
    assert launchers[27:30] == ["two_nodes", "ray", "two_nodes_again"]
    assert [launchers.count(each) for each in ("ray", "node_again", "two_nodes_again", "node", "two_nodes")] == [39, 20, 19, 19, 19]
    assert max(one.call for one in deaths if one.place == "file" and one.rank != 0) > 100, "whoever commits may die while it does"
    rows = [plan for plan in plans if in_a_row(plan.number)]
    assert (len(rows), {plan.launcher for plan in rows}) == (76, {"local"})
    assert {len(plan.deaths) for plan in rows} == {2, 3}
    assert {plan.deaths[1].call for plan in rows} == {1, 2, 3, 4}
    for first, second, *third in (plan.deaths for plan in rows):
        assert first.rank is not None
        assert (second.place, second.rank, second.step) == ("connect", (first.rank + 2) % RANKS, first.step), "no neighbour of the first"
        assert all(one.rank not in (first.rank, second.rank) and one.step != first.step for one in third)
    for plan in plans:
        if in_a_row(plan.number):
            continue
        assert len({one.step for one in plan.deaths}) == DEATHS
        if goes_on(plan.launcher):
            assert len({one.rank for one in plan.deaths}) == DEATHS, "a dead rank cannot die again"
        early = [one.place for one in plan.deaths if one.step == 0 and one.place in ("save", "file")]
        if plan.beside and early:
            assert min(one.step for one in plan.deaths if one.step) > 1, "two at once, with no checkpoint to go back to"


def test_lost_and_repeated_steps_are_counted() -> None:
    whole = run_of((0, 0, [1, 2]), (1, 0, [1, 2]), (0, 1, [3, 4]))
    assert lost(whole, whole) == (0, 0)
    assert lost(run_of((0, 0, [1, 2])), whole) == (1, 2)
    assert lost(run_of((0, 0, [1, 5]), (0, 1, [3, 4])), whole) == (1, 1)
    assert repeated(whole) == 0
    assert repeated(run_of((0, 0, [1]), (0, 1, [3]), (0, 1, [3]), (1, 1, [3]))) == 1


def test_all_points_of_a_run_that_differs_have_failed() -> None:
    good = KilledRun(0, "local", False, ("rank 1, step 2, norm 1", "rank 0, step 3, file 4"), "", 0, 0, 0, 0, 1.0, 2.0)
    bad = KilledRun(1, "node_again", False, ("rank 1, step 2, norm 1",), "", 0, 1, 1, 0, 1.0, 2.0)
    found = totals([good, bad])
    assert (found["points"], found["bitwise_equal"], found["lost_samples"]) == (3, 2, 1)
    assert found["by_place"] == {"file": 1, "norm": 2}
    assert found["repeated_steps"] == {"local": 0, "node_again": 1}


def test_a_run_whose_plan_is_another_one_now_is_done_again(tmp_path: Path) -> None:
    runs = [
        KilledRun(number, "local", plan_of(number).beside, ("rank 1, step 2, norm 1",), "", 0, 0, 0, 0, 1.0, 2.0) for number in range(4)
    ]
    changed = dataclasses.replace(runs[2], beside=not runs[2].beside)
    elsewhere = dataclasses.replace(runs[1], launcher="ray")
    write_runs(tmp_path / "found.json", [runs[0], elsewhere, changed, runs[3]], {})
    assert read_runs(tmp_path / "found.json") == [runs[0], runs[3]]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc and fork")
def test_runs_that_lose_three_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    """The plans 27 to 29: under `hecate launch` on two nodes, on Ray, and without backups on two nodes."""
    runs = [KilledRun(number, "local", False, (), "", 0, 0, 0, 0, 0.0, 0.0) for number in range(27)]
    with drill_folder() as made:
        go_through(made, runs, 7, tmp_path / "found.json")
    assert [run.launcher for run in runs[27:30]] == ["two_nodes", "ray", "two_nodes_again"]
    assert all(run.held for run in runs), runs
    assert all(run.points for run in runs[27:])
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["totals"]["points"] >= 7
