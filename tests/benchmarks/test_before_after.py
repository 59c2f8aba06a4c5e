"""`benchmarks.before_after` lets two checkouts take turns, and compares the parts of samples that both have."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.before_after import OTHER, THIS, Compared, Sample, _run, compare
from benchmarks.ratios import Budget

FEW = Budget(half_width=1e-9, rounds=4)


def test_sides_take_turns_and_only_common_parts_are_compared(tmp_path: Path) -> None:
    turns: list[str] = []

    def take(checkout: Path, folder: Path) -> Sample:
        assert folder.is_dir()
        assert not list(folder.iterdir())
        turns.append(checkout.name)
        return {"plan": 2.0, "new": 1.0} if checkout.name == THIS else {"plan": 4.0, "old": 5.0}

    checkouts = {THIS: tmp_path / THIS, OTHER: tmp_path / OTHER}
    samples, ratios = compare(Compared(take, whole=True, budget=FEW), checkouts, FEW)
    assert turns == [THIS, OTHER, *[THIS, OTHER, OTHER, THIS] * 2]
    assert [len(found) for found in samples.values()] == [4, 4]
    assert {part: ratio.value for part, ratio in ratios.items()} == pytest.approx({"plan": 0.5, "whole": 1 / 3})


def test_a_program_that_fails_gives_no_result(tmp_path: Path) -> None:
    _run(["false"], tmp_path, 1)
    with pytest.raises(SystemExit, match=r"false in .* ended with exit status 1"):
        _run(["false"], tmp_path, 0)
