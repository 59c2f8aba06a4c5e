"""`benchmarks.before_after` lets two checkouts take turns, and compares the parts of samples that both have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.before_after import OTHER, THIS, WARM_UP, Case, Sample, Take, _run, compare
from benchmarks.ratios import Budget

FEW = Budget(half_width=1e-9, rounds=4)


def test_sides_take_turns_and_only_common_parts_are_compared(tmp_path: Path) -> None:
    turns: list[str] = []

    def opened(checkouts: Mapping[str, Path], stack: ExitStack) -> Take:
        def take(side: str) -> Sample:
            turns.append(checkouts[side].name)
            return {"plan": 2.0, "new": 1.0} if side == THIS else {"plan": 4.0, "old": 5.0}

        stack.callback(turns.append, "closed")
        return take

    samples, ratios = compare(Case(opened, FEW), {THIS: tmp_path / "a", OTHER: tmp_path / "b"}, FEW)
    assert turns == [*"ab" * WARM_UP, *"abba" * 2, "closed"]
    assert [len(found) for found in samples.values()] == [4, 4]
    assert {part: ratio.value for part, ratio in ratios.items()} == pytest.approx({"plan": 0.5})


def test_a_program_that_fails_gives_no_result(tmp_path: Path) -> None:
    _run(["false"], tmp_path, 1)
    with pytest.raises(SystemExit, match=r"false in .* ended with exit status 1"):
        _run(["false"], tmp_path, 0)
