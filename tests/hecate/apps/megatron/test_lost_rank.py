"""When a rank of a Megatron run is killed, the others go on without losing a step: with a new rank, or without its tensor group."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from testing.processes import hecate, kill_rank, losses, read_rest, read_until, wait_until_gone
from tests.hecate.apps.megatron.making import FOUR_HEADS, write_parts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")]
STEPS = 12
OVERRIDES = ("model.dtype=float64", "data.eval=[]", "lr_scheduler_type=constant", "warmup_ratio=0", "logging_steps=1")


def after_a_death(folder: Path, rank: int, onward: str, *settings: str) -> str:
    """What a run prints from the death of a rank on, which goes on until it prints `onward` again; it must lose no step, and have the
    losses of an undisturbed run."""
    given = [str(folder / "config.yaml"), *OVERRIDES, *settings]
    with hecate("train", *given, f"output_dir={folder}/whole", f"max_steps={STEPS}", temporary=folder / "tmp") as process:
        read_rest(process)
    whole, run = losses(folder / "whole"), folder / "left"
    with hecate("train", *given, f"output_dir={run}", "max_steps=100000", "fssdp.redundancy=1", temporary=folder / "tmp") as process:
        read_until(process, "step 5/")
        kill_rank(process.pid, rank)
        printed = read_until(process, "2 ranks go on after step")
        printed += read_until(process, onward)
        process.send_signal(signal.SIGTERM)
        printed += read_rest(process, 128 + signal.SIGTERM)
    assert "Traceback" not in printed
    steps = losses(run)
    assert len(steps) > STEPS
    for step, values in whole.items():
        assert steps[step] == pytest.approx(values, rel=1e-9), step
    assert wait_until_gone([], folder / "tmp") == []
    return printed


def test_those_left_go_on_and_another_takes_the_place(tmp_path: Path) -> None:
    write_parts(tmp_path)
    assert "1 ranks go on" in after_a_death(tmp_path, 0, "step ", "nproc=2")


def test_the_other_tensor_group_goes_on(tmp_path: Path) -> None:
    write_parts(tmp_path)
    (tmp_path / "tiny.yaml").write_text(FOUR_HEADS)
    printed = after_a_death(tmp_path, 1, f"step {STEPS + 1}/", "nproc=4", "model.tensor_parallel=2")
    assert "1 more of its tensor group ended" in printed
    assert "removed this rank" not in printed
