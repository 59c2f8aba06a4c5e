"""A finished run ends well, whatever befalls its picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hecate.checkpoint.train_state import TrainState
from hecate.parallel.values.units import Unit
from hecate.report.events import EvalScore, Evaluation
from hecate.train.run_summary import Measured, show_summary

LAST = Evaluation({"sums": EvalScore(loss=1.25, accuracy=0.5, samples=8)}, {"sums": {Unit(0): [3, 1]}})
STATE = TrainState(step=6, completed=6, tokens=480, skipped=0, skipped_in_a_row=0, stream={}, sequences_per_step=4, history=[])


@pytest.mark.parametrize("lacking", ["matplotlib", "room"])
def test_the_summary_is_shown_where_no_picture_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    folder, reason = tmp_path / "missing", f"{tmp_path}/missing/expert_load.png: the heatmap cannot be written: No such file or directory"
    if lacking == "matplotlib":
        folder, reason = tmp_path, "the heatmap needs matplotlib (import of matplotlib.figure halted; None in sys.modules); "
        for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
            monkeypatch.setitem(sys.modules, name, None)
    show_summary(folder, STATE, Measured(last=LAST), 3.0, [("adapter", "runs/a/adapter")])
    shown = capsys.readouterr().out
    assert "1.250" in shown
    assert "runs/a/adapter" in shown
    said = next(line for line in shown.splitlines() if line.startswith("expert loads")).split(maxsplit=2)[2]
    assert said.startswith(f"not drawn: {reason}")
