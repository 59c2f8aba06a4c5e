"""Each drill passes in its short form, and fails where the product does not do what it asks for.

Those that start runs are slow; `make drills` runs all in full.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hecate.apps.check.drill.cases import damage, followers, launching, losses, memory, naming, numbers, resuming, saves
from hecate.apps.check.drill.catalogue import DRILLS
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, outcome_of
from hecate.apps.check.drill.program import found, name_of
from hecate.apps.check.drill.prove import PROOFS
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
