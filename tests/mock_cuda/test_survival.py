"""Mock GPUs go on without a rank that is killed, though their collectives raise nothing, and train what an uninterrupted run trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from testing.processes import OVERRIDES, hecate, kill_rank, losses, read_rest, read_until, running
from testing.tiny_run import make_workshop

ROOT = Path(__file__).parents[2]
"""where the ranks find their program, since nothing that hecate starts looks in the working directory"""
STEPS = 30
GIVEN = (*OVERRIDES, "micro_batch_size=1", "kernels=torch", "fssdp.redundancy=1", "fssdp.policy=static_ep", "logging_steps=1")


@pytest.mark.slow
def test_those_left_go_on_without_a_killed_rank(tmp_path: Path) -> None:
    """Rank 1 of three is killed in some step; the other two go on with the same losses, and later a fourth process joins them."""
    workshop = make_workshop(tmp_path / "workshop")
    given = [str(workshop / "config.yaml"), *GIVEN]
    command = [sys.executable, "-m", "tests.mock_cuda.surviving_rank", given[0], "3", *given[1:]]
    mock = [*command, "max_steps=100000", f"output_dir={workshop}/runs/mock"]
    with running(mock, tmp_path / "tmp-mock", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(ROOT)) as process:
        printed = read_until(process, "step 5/")
        kill_rank(process.pid, 1)
        printed += read_until(process, "2 ranks go on after step")
        printed += read_until(process, f"step {STEPS}/")
        if "3 ranks go on after step" not in printed:
            printed += read_until(process, "3 ranks go on after step")
        printed += read_until(process, "step ")
        process.terminate()
        printed += read_rest(process, 143)
    assert "Traceback" not in printed
    assert "went on after: the process groups of this rank were aborted" in printed
    whole = [*given, f"max_steps={STEPS}", f"output_dir={workshop}/runs/whole", "nproc=3"]
    with hecate("train", *whole, temporary=tmp_path / "tmp-whole") as process:
        read_rest(process)
    steps = losses(workshop / "runs/mock")
    for step, values in losses(workshop / "runs/whole").items():
        assert steps[step] == pytest.approx(values, rel=1e-9), step
