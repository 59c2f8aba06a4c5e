"""Processes that take turns: each answers when it is asked, and one that fails ends the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.handover import Worker, WorkerGroup

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


GROUP = """
import os, sys, time
from benchmarks.handover import take_steps
rank = os.environ["RANK"]
here, other = (f"{sys.argv[1]}/{name}" for name in (rank, "10"[int(rank)]))
def meet(what):
    open(f"{here}-{what}", "w").close()
    while not os.path.exists(f"{other}-{what}"):
        time.sleep(0.01)
steps = []
def step():
    steps.append(1)
    meet(len(steps))
    return 1.5
take_steps(step)
meet("end")
"""


def test_ranks_of_a_group_take_steps_and_end_together(tmp_path: Path) -> None:
    """One that were asked, or waited for, before the other one would wait for it forever."""
    with WorkerGroup([sys.executable, "-c", GROUP, str(tmp_path)], 2, {}) as group:
        assert [group.step(), group.step()] == [3.0, 3.0]
        assert len(group.clock) == 2
    assert {path.name for path in tmp_path.iterdir()} == {f"{rank}-{what}" for rank in (0, 1) for what in (1, 2, "end")}
