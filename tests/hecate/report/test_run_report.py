"""One rank reports, and another rank may take over while the run lasts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hecate.parallel.mesh import make_mesh
from hecate.parallel.traces import load_trace
from hecate.report.events import Rebuilt
from hecate.report.run_report import Reports, RunFacts
from hecate.report.summary import EVERY_RANK, TrainableRow
from tests.hecate.megatron.making import config_of, write_parts
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
    assert kinds(folder) == ["event", "step"]
    assert "2 ranks go on after step 1, 3 experts moved" in capsys.readouterr().out
