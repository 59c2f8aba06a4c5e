"""What `benchmarks.merging` makes of its figures, and what it does to adapters, without training anything."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.merging import METHODS, PEFT, TASKS, Measured, error_of, goals, multiply, table, wanted
from hecate.adapters.sets.set_files import read_set, write_set
from hecate.adapters.sets.sums import stack
from tests.hecate.adapters.exporting import save_dense, save_peft
from tests.hecate.adapters.making_sets import sums


def of(name: str, *exact: float, seconds: float = 0.0) -> Measured:
    return Measured(name, dict(zip(TASKS, exact, strict=True)), dict.fromkeys(TASKS, 1.0), seconds=seconds)


SINGLE = [of(TASKS[0], 0.9, 0.0, 0.0), of(TASKS[1], 0.0, 0.8, 0.0), of(TASKS[2], 0.0, 0.0, 0.7)]
THEIRS = [of(name, 0.3, 0.3, 0.3 + number / 10) for number, name in enumerate(PEFT)]


def test_goals_are_judged_by_means_and_by_the_best_of_peft() -> None:
    met, share, time = goals([*SINGLE, *THEIRS, of("lego", 0.5, 0.5, 0.5, seconds=29.0)]).values()
    assert met == "met: 0.500; linear 0.300, linear x 3 0.333, ties 0.367, ties x 3 0.400"
    assert share == "missed: 0.500 of 0.800, 62%"
    assert time.startswith("met: 29.0 s")
    best, share, time = goals([*SINGLE, *THEIRS, of("lego", 0.3, 0.3, 0.59, seconds=31.0)]).values()
    assert (best.split(":")[0], share.split(":")[0], time.split(":")[0]) == ("missed", "missed", "missed")
    assert set(goals([*SINGLE, of("lego", 1, 1, 1)]).values()) == {f"open: not measured: {', '.join(PEFT)}"}


def test_a_recording_has_all_that_the_goals_need_and_reads_what_it_wrote() -> None:
    assert {"lego", *PEFT, *TASKS} <= set(wanted())
    assert len(set(wanted())) == len(wanted())
    assert Measured(**asdict(SINGLE[0])) == SINGLE[0]
    assert "0.300" in table([*SINGLE, *THEIRS])


def test_a_third_of_the_sum_times_three_is_the_sum(tmp_path: Path) -> None:
    model = save_dense("llama", tmp_path / "model")
    adapters = [save_peft(tmp_path / name, model, ["q_proj"], experts=False, r=4)[0] for name in "abc"]
    sets = [read_set(adapter) for adapter in adapters]
    write_set(stack(sets, [1 / 3] * 3), tmp_path / "all")
    shares = {method.name: method.share for method in METHODS}
    assert error_of(tmp_path / "all", adapters, shares["stack"]) < 1e-6
    assert error_of(tmp_path / "all", adapters, 1.0) == pytest.approx(2 / 3)
    multiply(tmp_path / "all", 3)
    assert error_of(tmp_path / "all", adapters, shares["stack x 3"]) < 1e-6
    torch.testing.assert_close(sums(read_set(tmp_path / "all")), sum(sums(one) for one in sets), rtol=1e-5, atol=1e-6)
