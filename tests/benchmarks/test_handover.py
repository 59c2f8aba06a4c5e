"""Processes that take turns: each answers when it is asked, and one that fails ends the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.handover import Worker

PROGRAM = """
import sys
from benchmarks.handover import take_steps
print("what a library prints")
taken = []
def step():
    taken.append(len(taken) + 0.5)
    print("more of it")
    if taken[-1] == float(sys.argv[2]):
        sys.exit(3)
    return taken[-1]
take_steps(step)
open(sys.argv[1], "w").write(repr(taken))
"""


def worker(out: Path, fails_at: float = -1.0) -> Worker:
    return Worker([sys.executable, "-c", PROGRAM, str(out), str(fails_at)], {})


def test_two_processes_take_turns_and_end(tmp_path: Path) -> None:
    with worker(tmp_path / "one") as one, worker(tmp_path / "two") as two:
        seconds = [side.step() for side in (one, two, two, one)]
        assert not (tmp_path / "one").exists()
    assert seconds == [0.5, 0.5, 1.5, 1.5]
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in ("one", "two")] == ["[0.5, 1.5]"] * 2


def test_a_process_that_fails_ends_all(tmp_path: Path) -> None:
    with worker(tmp_path / "one", fails_at=1.5) as one:
        assert one.step() == 0.5
        with pytest.raises(SystemExit, match=r"has ended \(exit status 3\)"):
            one.step()
    assert not (tmp_path / "one").exists()


def test_ranks_of_a_group_are_asked_and_dismissed_together(tmp_path: Path) -> None:
    """One that waited for the other's answer, or for its end, would wait forever where they exchange something in a step."""
    with worker(tmp_path / "one") as one, worker(tmp_path / "two") as two:
        one.ask()
        two.ask()
        assert (one.answer(), two.answer()) == (0.5, 0.5)
        one.dismiss()
        two.dismiss()
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in ("one", "two")] == ["[0.5]"] * 2
