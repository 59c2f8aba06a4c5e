"""Several runs on one page, and a page that is written while its run trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.cli import app
from hecate.errors import UserError
from hecate.report.metrics import event_record, step_record
from hecate.report.pages import page as page_module
from hecate.report.pages.comparison import MOST_RUNS, comparison_page
from hecate.report.pages.page import write_report
from hecate.report.run_records import read_run
from tests.hecate.report.made_runs import a_step, usual_records, write_run
from tests.hecate.report.pages.sound_page import Sound, pictures


def two_runs(folder: Path) -> dict[str, Path]:
    other = {"learning_rate": 0.5, "output_dir": "elsewhere"}
    second = write_run(folder / "b", [step_record(a_step(step)) for step in (1, 2, 3)], other)
    return {"a": write_run(folder / "a", usual_records()), "b": second}


def test_runs_are_drawn_over_one_another(tmp_path: Path) -> None:
    page = comparison_page({name: read_run(folder) for name, folder in two_runs(tmp_path).items()})
    seen = Sound(page)
    assert seen.headings == ["Curves", "Configurations"]
    assert seen.outside == []
    loss = next(svg for svg in pictures(page) if svg.get("aria-label") == "training loss of each run by step")
    assert [one.get("class") for one in loss.iter() if one.tag.endswith("path")] == ["line c0", "line c1"]
    assert "held-out loss of" in seen.text, "the second run has none, and the first one's is drawn"
    assert "learning_rate - 0.5" in " ".join(seen.text.split())
    assert "output_dir" not in seen.text


def test_runs_that_are_alike_differ_in_no_key(tmp_path: Path) -> None:
    runs = {name: read_run(write_run(tmp_path / name, usual_records())) for name in "ab"}
    assert "The configurations differ in no key." in Sound(comparison_page(runs)).text


def test_a_run_without_records_is_among_others(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_bytes(b"")
    assert "not recorded" in Sound(comparison_page({"empty": read_run(empty), "b": read_run(two_runs(tmp_path)["b"])})).text
    assert "not recorded" in Sound(comparison_page({"empty": read_run(empty)})).text


def test_the_command_compares(tmp_path: Path) -> None:
    runs = [str(folder) for folder in two_runs(tmp_path).values()]
    shown = CliRunner().invoke(app, ["report", *runs], catch_exceptions=False)
    assert (tmp_path / "a" / "comparison.html").is_file(), shown.output
    for arguments in ([*runs, "--follow"], [runs[0], runs[0]], [f"{tmp_path}/{number}" for number in range(MOST_RUNS + 1)]):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert isinstance(result.exception, UserError)
        assert "report: --follow takes one run; a comparison, 2 to 8 runs, each once" in str(result.exception)


def test_a_report_follows_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written again with what has come, has a browser reload it, and is left alone once the run is finished."""
    records = usual_records()
    folder, place, seen = write_run(tmp_path / "run", records[:4]), tmp_path / "page.html", []

    def sleep(seconds: float) -> None:
        seen.append((seconds, 'http-equiv="refresh"' in place.read_text()))
        (folder / "metrics.jsonl").unlink()
        write_run(folder, records[: 4 + 6 * len(seen)] if len(seen) < 3 else records)

    monkeypatch.setattr(page_module.time, "sleep", sleep)
    assert write_report(folder, place, "no plan", follow=True) == place
    assert seen[0] == (page_module.RELOAD_SECONDS, True)
    assert "12 of 12, finished" in Sound(place.read_text()).text
    assert "refresh" not in place.read_text()


def test_ctrl_c_ends_the_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page_module.time, "sleep", interrupted)
    folder = write_run(tmp_path / "run", [step_record(a_step(1)), event_record(1, "stopped by a signal")])
    place = write_report(folder, tmp_path / "page.html", "no plan", follow=True)
    assert "refresh" not in place.read_text()
