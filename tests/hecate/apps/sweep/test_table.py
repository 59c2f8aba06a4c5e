"""What runs have come to, and the table of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hecate.apps.sweep.results import FIGURES, SweepResult, read_result, rows_of
from hecate.apps.sweep.table import table_json, table_text
from hecate.launch.many_runs.ledger import RunState, SweepEntry
from hecate.launch.many_runs.sweep import SweepRun, SweepValue
from tests.hecate.report.made_runs import usual_records, write_run


def result(r: int, seed: int, held_out: float | None, state: str = "finished") -> SweepResult:
    figures = dict.fromkeys(FIGURES) | {"held_out_loss": held_out, "training_loss": 2.0, "tokens_per_s": 1000.0, "seconds": 75.0}
    return SweepResult(f"r-{r}_seed-{seed}", None, {"lora.r": str(r)}, seed, state, "", 5, 10, figures, {})


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    run = SweepRun("r-4", None, (SweepValue("lora.r", "4", 3),), None, (), str(tmp_path / "r-4"))
    entry = SweepEntry(RunState.STARTED, "", 12.5, "max_steps: 12\n")
    assert read_result(run, None, working=True).standing == "not begun"
    assert read_result(run, entry, working=False).standing == "interrupted at 0/12"
    write_run(tmp_path / "r-4", usual_records())
    found = read_result(run, entry, working=True)
    assert found.standing == "running at 12/12"
    assert found.figures["training_loss"] == 3.0 / 12
    assert found.figures["tokens_per_s"] == 1024.0
    assert found.figures["seconds"] == 12.5
    assert found.figures["accuracy"] is None  # one source has none
    assert found.figures["held_out_loss"] == pytest.approx(sum(one["loss"] for one in found.sources.values()) / 2)


def test_rows_are_means_over_seeds_the_best_first_and_unfinished_ones_last() -> None:
    runs = [result(4, 1, 3.0), result(8, 1, 2.0), result(4, 2, 1.5), result(8, 2, 2.2), result(2, 1, 0.1, "stopped"), result(16, 1, 9.0)]
    runs += [result(8, 3, 99.0, "failed")]
    rows = rows_of(runs)
    assert [row.values["lora.r"] for row in rows] == ["8", "4", "16", "2"]
    best = rows[0].figures["held_out_loss"]
    assert best is not None
    assert best.mean == pytest.approx(2.1)
    assert best.spread == pytest.approx(0.2 / 2**0.5)  # of a sample; the failed run does not count
    assert best.runs == 2
    assert table_text(rows, ["lora.r"], named=False).splitlines() == [
        "r     training loss    held-out loss  tokens/s   time  state",
        "8   2.0000 ± 0.0000  2.1000 ± 0.1414  1000 ± 0  1m15s  2 finished, 1 failed",
        "4   2.0000 ± 0.0000  2.2500 ± 1.0607  1000 ± 0  1m15s  all finished",
        "16           2.0000           9.0000      1000  1m15s  finished",
        "2            2.0000           0.1000      1000  1m15s  stopped at 5/10",
    ]
    written = json.loads(json.dumps(table_json(rows, runs, "sweep.yaml"), allow_nan=False))
    assert written["rows"][0]["figures"]["accuracy"] is None
    assert written["rows"][0]["runs"] == ["r-8_seed-1", "r-8_seed-2", "r-8_seed-3"]
    assert written["runs"][0]["held_out_loss"] == 3.0
