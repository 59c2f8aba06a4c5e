"""Ranks and launchers killed: the run goes on or starts again and ends as if nothing had been, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.launch.processes import OVERRIDES, descendants, hecate, kill_rank, losses, read_rest, read_until, wait_until_gone
from tests.tiny_run import make_workshop

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc, and a parent's death signal")
STEPS = 40


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def arguments(workshop: Path, name: str, *overrides: str) -> list[str]:
    return [str(workshop / "config.yaml"), *OVERRIDES, f"output_dir={workshop}/runs/{name}", *overrides]


@pytest.fixture(scope="module")
def whole(workshop: Path) -> dict[int, tuple[float, float]]:
    with hecate("train", *arguments(workshop, "whole", f"max_steps={STEPS}", "nproc=2"), temporary=workshop / "tmp-whole") as process:
        read_rest(process)
    return losses(workshop / "runs/whole")


def test_a_launched_run_starts_again_from_its_checkpoint(workshop: Path, whole: dict[int, tuple[float, float]]) -> None:
    temporary = workshop / "tmp-again"
    given = arguments(workshop, "again", f"max_steps={STEPS}", "save_steps=3")
    with hecate("launch", "--nproc-per-node", "2", *given, temporary=temporary) as process:
        read_until(process, "step 5/")
        kill_rank(process.pid, 1)
        printed = read_rest(process)
    assert "a rank was lost; all start again" in printed
    assert "resumed after step " in printed
    assert "Traceback" not in printed
    assert losses(workshop / "runs/again") == whole
    assert wait_until_gone([], temporary) == []


def test_those_left_go_on_and_another_takes_the_place(workshop: Path, whole: dict[int, tuple[float, float]]) -> None:
    """Rank 0 of two is killed, which keeps the terminal and the metrics. The other goes on alone without losing a step until a third
    process has loaded and joined; then a signal stops both."""
    given = arguments(workshop, "left", "max_steps=100000", "nproc=2", "fssdp.redundancy=1", "logging_steps=1")
    temporary = workshop / "tmp-left"
    with hecate("train", *given, temporary=temporary) as process:
        read_until(process, "step 5/")
        kill_rank(process.pid, 0)
        alone = read_until(process, "2 ranks go on after step")
        if f"step {STEPS}/" not in alone:
            read_until(process, f"step {STEPS}/")
        read_until(process, "step ")
        process.send_signal(signal.SIGTERM)
        printed = read_rest(process)
    assert "1 ranks go on" in alone
    assert "Traceback" not in alone + printed
    saved = sorted((workshop / "runs/left").glob("checkpoint-*"))
    assert len(saved) == 1
    assert len(list(saved[0].glob("rank-*-of-00002.safetensors"))) == 2
    steps = losses(workshop / "runs/left")
    for step, values in whole.items():
        assert steps[step] == pytest.approx(values, rel=1e-9), step
    assert wait_until_gone([], temporary) == []


def test_a_killed_launcher_leaves_nothing(workshop: Path) -> None:
    """For the launcher of local ranks see test_local."""
    temporary = workshop / "tmp-killed"
    given = arguments(workshop, "killed", "max_steps=100000")
    with hecate("launch", "--nproc-per-node", "1", *given, temporary=temporary) as process:
        read_until(process, "step 2/")
        below = descendants(process.pid)
        assert len(below) >= 2
        assert any(temporary.iterdir()), "there is nothing that could be left"
        os.kill(process.pid, signal.SIGKILL)
    assert wait_until_gone(below, temporary) == []
