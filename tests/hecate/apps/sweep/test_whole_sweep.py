"""Sweeps of tiny runs through the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.hecate.train.command_line import hecate, losses, run, train_arguments, workshop

__all__ = ["workshop"]  # a fixture
COMMON = "set: {max_steps: 2, eval.on_start: false, eval.generate: false, nproc: 1}\n"


def write_sweep(workshop: Path, name: str, text: str) -> Path:
    file = workshop / f"{name}.yaml"
    file.write_text(f"run: {workshop}/config.yaml\noutput_dir: {workshop}/runs/{name}\n{text}", encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_sweep_trains_its_runs_and_compares_them(workshop: Path) -> None:
    file = write_sweep(workshop, "swept", COMMON + "grid: {learning_rate: [1e-6, 1e-2]}\n")
    assert run("sweep", file, "--table").stdout.splitlines()[1:] == ["1e-6           not begun", "1e-2           not begun"]
    assert "learning_rat: unknown key" in run("sweep", file, "learning_rat=3", "--table", status=2).stderr
    lines = run("sweep", file, "--json", workshop / "swept.json").stdout.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["1e-2", "1e-6"]  # the faster learner is first
    assert lines[-1].endswith("finished")
    best, worst = json.loads((workshop / "swept.json").read_text(encoding="utf-8"))["rows"]
    assert best["figures"]["held_out_loss"]["mean"] < worst["figures"]["held_out_loss"]["mean"]
    assert run("sweep", file).stdout.splitlines()[0] == "hecate: sweep of 2 runs, 2 of them finished already"


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_bit_for_bit(workshop: Path) -> None:
    """The first run's sequences are too short for its samples, which only a rank finds. The second one is stopped, and goes on."""
    text = "set: {max_steps: 40, eval.on_start: false, eval.generate: false, nproc: 1}\nlist:\n"
    file = write_sweep(workshop, "stopped", text + "- {name: broken, lora.target_modules: [no_proj]}\n")
    assert "stopped.yaml:5: lora.target_modules: names none" in run("sweep", file, status=2).stderr
    file = write_sweep(workshop, "stopped", text + "- {name: broken, data.seq_len: 8}\n- {name: whole, lora.r: 2}\n")
    log = workshop / "runs/stopped/sweep/whole.log"
    with subprocess.Popen(hecate("sweep", file), stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and "step 2/" in log.read_text(encoding="utf-8")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "broken: failed" in printed
    assert "status 2: hecate: " in printed
    assert "has no usable sample" in printed
    assert "whole: stopped after" in printed
    assert "whole: goes on" in run("sweep", file, status=1).stdout
    run(*train_arguments(workshop, "alone", "max_steps=40", "eval.on_start=false", "eval.generate=false", "nproc=1", "lora.r=2"))
    assert losses(workshop, "stopped/whole") == losses(workshop, "alone")


@pytest.mark.slow
def test_a_sweep_on_ray_trains_each_run_as_a_job(workshop: Path) -> None:
    pytest.importorskip("ray")
    file = write_sweep(workshop, "on-ray", COMMON + "list: [{name: one, ray.workers: 1}]\n")
    lines = run("sweep", file, "--address", "local").stdout.splitlines()
    assert lines[-1].split()[0] == "one"
    assert lines[-1].endswith("finished")
    assert (workshop / "runs/on-ray/one/status.json").is_file()
    assert (workshop / "runs/on-ray/one/adapter").is_dir()
