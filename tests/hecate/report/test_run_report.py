"""One rank reports, and another rank may take over while the run lasts."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.values.traces import load_trace
from hecate.report.events import Rebuilt
from hecate.report.metrics import step_record
from hecate.report.progress import Progress
from hecate.report.run_report import Reports, RunFacts
from hecate.report.summary import EVERY_RANK, TrainableRow
from tests.hecate.apps.megatron.making import config_of, write_parts
from tests.hecate.report.made_runs import a_step

FACTS = RunFacts(0, True, make_mesh(2), (TrainableRow("layers.0.router", 1, 128, 512, EVERY_RANK),), tokens_per_rank=64)


def kinds(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_rank_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path, "trace=true")
    folder = Path(config.output_dir)
    folder.mkdir()
    with Reports(config, FACTS) as reports:
        reports.begin()
        reports.step(a_step(1))
        reports.saving()
        reports.saved(1, folder / "checkpoint-1")
        reports.step(a_step(2))
        reports.saving()
    assert kinds(folder) == ["step", "event", "step"]
    assert (folder / "config.yaml").exists()
    assert (folder / "trainable.json").exists()
    assert load_trace(folder / "loads").steps == (1, 2)
    shown = capsys.readouterr().out
    assert "step 1/3" in shown
    assert "trains 128 parameters" in shown


@contextmanager
def full_disk(path: Path, room: int) -> Iterator[None]:
    """No file of this process may become longer than this one is now and `room` bytes more; part of a longer write is done."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path, "trace=true")
    folder = Path(config.output_dir)
    folder.mkdir()
    with Reports(config, FACTS) as reports:
        reports.step(a_step(1))
        with full_disk(folder / "metrics.jsonl", room=40):
            reports.step(a_step(2))
            reports.step(a_step(3))
            records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [record["step"] for record in records] == [1], "a part of a record is left"
        reports.step(a_step(4))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [("step", 1), ("event", 4), ("step", 4)]
    assert records[1]["text"] == "2 records before this one are missing, because the disk has refused them"
    assert capsys.readouterr().out.count("metrics cannot be written") == 1


@pytest.mark.parametrize("was_first", [True, False])
def test_a_full_disk_stops_no_run_that_goes_on_without_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], was_first: bool
) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path)
    folder = Path(config.output_dir)
    folder.mkdir()
    with Reports(config, FACTS) as reports:
        for step in (2, 1, 3):  # so that what goes is not all at the end
            reports.step(a_step(step))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Reports(config, replace(FACTS, step=9, is_first=was_first)) as reports:
        for module in ("run_report", "metrics"):
            monkeypatch.setattr(f"hecate.report.{module}.replace_file", full)
        reports.regrouped(Rebuilt(1, "expert 0", 3), replace(FACTS, step=1), seconds=0.1)
        reports.step(a_step(2))
    assert kinds(folder)[-1] == "step"
    shown = capsys.readouterr().out
    assert "config.yaml and trainable.json stay as they were: No space left on device" in shown
    assert "records of steps after 1 stay, and the run goes on" in shown
    monkeypatch.undo()
    monkeypatch.setattr("hecate.report.run_report.replace_file", full)
    with Reports(config, FACTS) as reports, pytest.raises(UserError, match="configuration cannot be written: No space"):
        reports.begin()


def test_a_refusal_while_reports_open_leaves_no_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path)
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "metrics.jsonl").mkdir()
    closed: list[Progress] = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(self))
    with pytest.raises(UserError, match="Is a directory"), Reports(config, FACTS):
        pass
    (folder / "metrics.jsonl").rmdir()

    def refuse(*_: object) -> None:
        raise UserError("no tracker")

    monkeypatch.setattr(Reports, "_open_trackers", refuse)
    with pytest.raises(UserError, match="no tracker"), Reports(config, FACTS):
        pass
    assert len(closed) == 1, "only the second had come to open one"


def test_a_resume_says_which_steps_have_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A power cut keeps a checkpoint, which was synced, and may lose what was written before it and was not."""
    write_parts(tmp_path)
    config = config_of(tmp_path, "logging_steps=1")
    folder = Path(config.output_dir)
    folder.mkdir()
    lines = [json.dumps(step_record(a_step(step))) + "\n" for step in (1, 2, 5, 6, 9)]
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], "\0" * 100 + "\n", *lines[2:]]), encoding="utf-8")
    with Reports(config, replace(FACTS, step=6)) as reports:
        reports.begin()
    shown = capsys.readouterr().out
    assert "metrics.jsonl was damaged; its records stay, and all of it is in metrics.damaged-1.jsonl" in shown
    assert "2 of 6 steps have no record in metrics.jsonl: 3, 4" in shown


def test_loads_that_the_disk_refuses_are_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path, "trace=true")
    folder = Path(config.output_dir)
    folder.mkdir()
    with Reports(config, FACTS) as reports:
        reports.step(a_step(1))
        (folder / "loads").write_text("a file where a folder is to be")
        reports.saving()
        reports.step(a_step(2))
        reports.saving()
    assert kinds(folder) == ["step", "event", "step"]
    assert capsys.readouterr().out.count("records no more loads") == 1


def test_another_rank_writes_nothing_until_it_becomes_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path)
    folder = Path(config.output_dir)
    folder.mkdir()
    with Reports(config, replace(FACTS, is_first=False)) as reports:
        reports.begin()
        reports.step(a_step(1))
        assert not list(folder.iterdir())
        reports.regrouped(Rebuilt(1, "", 3), replace(FACTS, step=1), seconds=0.1)
        reports.step(a_step(2))
        reports.regrouped(Rebuilt(2, "", 0), replace(FACTS, step=2, is_first=False), seconds=0.1)
        reports.step(a_step(3))
    assert kinds(folder) == ["event", "event", "step"]
    shown = capsys.readouterr().out
    assert "2 ranks go on after step 1, 3 experts moved" in shown
    assert "step 1 is done and has no record" in shown


def test_only_a_step_without_a_record_is_told(tmp_path: Path) -> None:
    """The first rank had not come to report step 4 when it took that step with the gradients that it had."""
    write_parts(tmp_path)
    config = config_of(tmp_path, "logging_steps=2")
    folder = Path(config.output_dir)
    folder.mkdir()
    with Reports(config, FACTS) as reports:
        for step, recorded in ((0, False), (1, False), (2, True), (3, False), (4, False)):
            if recorded:
                reports.step(a_step(step))
            reports.regrouped(Rebuilt(step, "", 0), replace(FACTS, step=step), seconds=0.1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "has no record" in record.get("text", "")] == [4]
