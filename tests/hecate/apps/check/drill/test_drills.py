"""Each drill passes in its short form, and fails where the product does not do what it asks for.

Those that start runs are slow; `make drills` runs all in full.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.apps.check.drill import outcome, program, run
from hecate.apps.check.drill.cases import damage, followers, launching, losses, memory, naming, numbers, resuming, saves
from hecate.apps.check.drill.catalogue import DRILLS, Drill
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.program import found, name_of
from hecate.apps.check.drill.prove import PROOFS
from hecate.apps.check.drill.ranks import Running
from hecate.apps.check.drill.run import DrillFolder, DrillReport, chosen_drills, drill_folder
from hecate.apps.check.drill.table import drills_json, proof_text, proofs_json, proofs_text, report_text, summary_text
from hecate.cli import app
from hecate.errors import UserError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc and fork")
IN_EVERY_TEST = ("R6", "R7", "R8", "R18", "R25")
"""of a few seconds of processor time"""
MODULES = (damage, followers, launching, losses, memory, naming, numbers, resuming, saves)


@pytest.fixture(scope="module")
def made() -> Iterator[DrillFolder]:
    with drill_folder() as it:
        yield it


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in IN_EVERY_TEST else pytest.mark.slow) for name in DRILLS])
def test_a_drill_passes(made: DrillFolder, name: str) -> None:
    report = made.run(DRILLS[name], quick=True)
    assert report.outcome.ok, report_text(report)
    assert report.outcome.total > 0


PROVED_IN_EVERY_TEST = ("R6", "R7", "R8")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in PROVED_IN_EVERY_TEST else pytest.mark.slow) for name in DRILLS])
def test_a_drill_fails_without_what_it_is_about(made: DrillFolder, name: str) -> None:
    report = made.run(DRILLS[name], quick=True, without=True)
    assert not report.outcome.ok
    assert "the drill itself" not in report.outcome.seen, report.outcome
    assert "fails" in proof_text(report)
    assert proofs_text([report]).endswith("1 of 1 drills fail without what they are about, as they must")
    assert proofs_json([report])["summary"] == {"failed": 1, "total": 1}


def test_every_drill_has_a_proof() -> None:
    assert list(PROOFS) == list(DRILLS)


def test_a_drill_that_breaks_down_has_failed_with_its_last_words(made: DrillFolder) -> None:
    broken = made.run(replace(DRILLS["R5"], function="saves:no_such_function"), quick=True)
    assert not broken.outcome.ok
    assert "no_such_function" in broken.outcome.failures[-1]


def told_to_end(_: Scope) -> DrillOutcome:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("the time was over")


def waits_for_a_process(_: Scope) -> DrillOutcome:
    raise subprocess.TimeoutExpired("hecate train", 30)


def waits_for_a_run(scope: Scope) -> DrillOutcome:
    with subprocess.Popen(["sleep", "60"]) as process:
        Running(process, scope.path / "log", scope.path, scope.path / "trace").end(0.1)
    raise AssertionError("it took a minute")


def waits_for_words(scope: Scope) -> DrillOutcome:
    (scope.path / "log").touch()
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            Running(process, scope.path / "log", scope.path, scope.path / "trace").wait_for("step 2/", 0.1)
        finally:
            process.kill()
    raise AssertionError("it printed nothing")


def outcome_of_a_drill(monkeypatch: pytest.MonkeyPatch, folder: Path, does: Callable[[Scope], DrillOutcome], problem: str) -> DrillOutcome:
    """What the program of drills leaves of one that does a case, and then something else."""

    def drill(scope: Scope) -> DrillOutcome:
        DrillCase("the first", problem)
        return does(scope)

    monkeypatch.setattr(outcome, "_MADE", [])
    monkeypatch.setattr(program, "found", lambda _: drill)
    before = signal.getsignal(signal.SIGTERM)
    try:
        program._drill("any", json.dumps(vars(Scope(str(folder), "", True, ()))), str(folder / "outcome.json"))
    finally:
        signal.signal(signal.SIGTERM, before)
    value = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    return DrillOutcome(**{**value, **{name: tuple(value[name]) for name in ("failures", "too_slow")}})


LATE = {
    told_to_end: "the drill had not ended when its time was over",
    waits_for_a_process: "Command 'hecate train' timed out after 30 seconds",
    waits_for_a_run: "a run had not ended after 0 s",
    waits_for_words: "a run had not printed 'step 2/' after 0 s",
}


@pytest.mark.parametrize("does", LATE)
def test_a_limit_of_the_clock_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: Callable[[Scope], DrillOutcome]) -> None:
    left = outcome_of_a_drill(monkeypatch, tmp_path, does, "")
    assert (left.ok, left.undecided, left.failures) == (False, True, ())
    assert (left.passed, left.total) == (1, 2), "what was done until then"
    report = DrillReport(DRILLS["R1"], left, 900.0)
    text = report_text(report)
    assert text.startswith("R1   not decided      1/2 ")
    assert "seen: not decided: the machine was too slow for 1 of 2; all others went as expected" in text
    assert f"too slow: the case under way: {LATE[does]}" in text
    assert "failed" not in text
    assert summary_text([report]).endswith("0 of 1 drills passed in 900 s; not passed: R1 (not decided)")
    assert drills_json([report])["rows"][0]["state"] == "not decided"


def test_what_went_wrong_before_the_limit_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = outcome_of_a_drill(monkeypatch, tmp_path, told_to_end, "was lost")
    assert (left.undecided, left.failures, left.passed, left.total) == (False, ("the first: was lost",), 0, 2)


def test_a_run_that_ends_before_it_says_what_is_waited_for_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(AssertionError, match="the run ended before it printed 'step 2/'"):
        Running(process, tmp_path / "log", tmp_path, tmp_path / "trace").wait_for("step 2/", 0.0)


@pytest.mark.parametrize("ending", [30.0, 0.0])
def test_a_drill_whose_time_is_over_is_not_decided(made: DrillFolder, monkeypatch: pytest.MonkeyPatch, ending: float) -> None:
    """Whether it ends when it is told to, or is killed."""
    monkeypatch.setattr(run, "_LIMIT", 0.3)
    monkeypatch.setattr(run, "_ENDING", ending)
    left = made.run(DRILLS["R1"], quick=True).outcome
    assert (left.undecided, left.failures, left.total) == (True, (), 1), left


def test_times_leave_a_drill_open(tmp_path: Path) -> None:
    assert losses.timely("noticed", 200.0, 250.0) == DrillCase("noticed in 250 ms")
    late = losses.timely("noticed", 300.0, 250.0)
    assert outcome_of([DrillCase("a"), late], "all well").too_slow == ("noticed in 250 ms: took 300 ms",)
    both = outcome_of([DrillCase("a", "was lost", "took 9 s")], "all well")
    assert (both.undecided, both.failures, both.too_slow) == (False, ("a: was lost",), ())


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([outcome_of([DrillCase("a")], "")], 0),
        ([outcome_of([DrillCase("a")], ""), outcome_of([DrillCase("a", too_slow="9 s")], "")], 3),
        ([outcome_of([DrillCase("a", "was lost")], ""), outcome_of([DrillCase("a", too_slow="9 s")], "")], 1),
        ([DrillOutcome("nothing was tried", 0, 0)], 1),
    ],
)
def test_the_exit_status_tells_an_open_drill_from_a_failed_one(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[DrillOutcome], status: int
) -> None:
    asked, left = [], list(outcomes)

    class Made:
        def run(self, drill: Drill, *, quick: bool, without: bool) -> DrillReport:
            asked.append((drill.name, quick, without))
            return DrillReport(drill, left.pop(0), 1.0)

    monkeypatch.setattr(run, "drill_folder", lambda: nullcontext(Made()))
    given = ["R1", "R2"][: len(outcomes)]
    assert CliRunner().invoke(app, ["drill", *given]).exit_code == status
    assert asked == [(name, False, False) for name in given]


@pytest.mark.parametrize(
    ("given", "names", "quick"),
    [
        ([], ["R1"], True),
        (["--quick"], list(DRILLS), True),
        (["--quick", "R2"], ["R2"], True),
        (["--all"], list(DRILLS), False),
        (["r3"], ["R3"], False),
    ],
)
def test_without_a_name_there_is_a_first_taste(monkeypatch: pytest.MonkeyPatch, given: list[str], names: list[str], quick: bool) -> None:
    asked = []

    class Made:
        def run(self, drill: Drill, *, quick: bool, without: bool) -> DrillReport:
            asked.append((drill.name, quick, without))
            return DrillReport(drill, outcome_of([DrillCase("a")], ""), 1.0)

    monkeypatch.setattr(run, "drill_folder", lambda: nullcontext(Made()))
    done = CliRunner().invoke(app, ["drill", *given])
    assert asked == [(name, quick, False) for name in names]
    assert ("hecate drill --quick does all 22 so; --all does them in full" in done.output) is not given


def test_there_are_22_and_each_has_a_function() -> None:
    assert list(DRILLS) == [f"R{number}" for number in range(1, 26) if number not in (9, 16, 17)]
    functions = [found(drill.function) for drill in DRILLS.values()]
    assert [name_of(function) for function in functions] == [drill.function for drill in DRILLS.values()]
    assert {function.__module__ for function in functions} == {module.__name__ for module in MODULES}
    assert [function.__doc__.partition(".")[0] for function in functions] == list(DRILLS)


def test_drills_are_chosen_by_name() -> None:
    assert [drill.name for drill in chosen_drills(["r8", "R1"])] == ["R8", "R1"]
    assert len(chosen_drills([])) == 22
    with pytest.raises(UserError, match="no drill is called R26"):
        chosen_drills(["R26"])
    listed = CliRunner().invoke(app, ["drill", "--list"])
    assert (listed.exit_code, len(listed.output.splitlines())) == (0, 22)


def test_what_failed_is_said() -> None:
    good = outcome_of([DrillCase("a"), DrillCase("b")], "all well", {"noticed_ms": 12.0})
    bad = outcome_of([DrillCase("a"), DrillCase("rank 1, norm", "was lost")], "mostly well")
    reports = [DrillReport(DRILLS["R1"], good, 1.0), DrillReport(DRILLS["R2"], bad, 2.0)]
    assert good.ok
    assert not bad.ok
    assert not DrillOutcome("nothing was tried", 0, 0).ok
    text = report_text(reports[1])
    assert "failed" in text.splitlines()[0]
    assert "     1/2  " in text.splitlines()[0]
    assert "failed: rank 1, norm: was lost" in text
    assert summary_text(reports).endswith("1 of 2 drills passed in 3 s; not passed: R2 (failed)")
    value = drills_json(reports)
    assert value["summary"] == {"passed": 1, "total": 2, "kill_points": 2, "kill_points_equal": 2}
    assert [(row["name"], row["counts"]) for row in value["rows"]] == [("R1", {"noticed_ms": 12.0}), ("R2", {})]
