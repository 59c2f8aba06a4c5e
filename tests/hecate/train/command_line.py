"""Runs of `hecate train` as a user starts them, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testing.commands import run_hecate
from testing.tiny_run import make_workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, two tasks of data and a configuration."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def hecate(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hecate", *map(str, arguments)]


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_hecate([str(one) for one in arguments], timeout=240)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def train_arguments(workshop: Path, name: str, *overrides: str) -> list[str]:
    return ["train", str(workshop / "config.yaml"), f"output_dir={workshop}/runs/{name}", *overrides]


def records(workshop: Path, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (workshop / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(workshop: Path, name: str) -> list[tuple[float, float, float]]:
    return [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in records(workshop, name, "step")]


def kill_rank_1_after(line_start: str, arguments: list[str]) -> str:
    """Start a run, SIGKILL one of its ranks once it has printed such a line; the run's error text."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(hecate(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(line_start):
                break
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    return errors


def rank_process(launcher: int, rank: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8").split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")
