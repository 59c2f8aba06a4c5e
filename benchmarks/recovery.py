"""One of four ranks is killed: seconds until the next step is finished.

- restart: `hecate launch`, torch's elastic agent: all ranks end and start again from the last checkpoint, which is that of the step before;
- shrink: the local launcher with `fssdp.redundancy: 1`: the three that are left go on in their processes, no step is lost;
- replace: the same until four ranks have finished a step together: a new one loads while three train, then joins them.

Each is a whole run of the command line with a tiny model in float64 (hidden 32, 2 layers, 8 experts). Before the figures: the losses of the
runs that lost a rank are those of one that did not.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import arguments, finish
from tests.launch.processes import kill_rank
from tests.tiny_run import make_workshop

RANKS = 4
COMMON = (
    "model.dtype=float64",
    "data.eval=[]",
    "eval.generate=false",
    "eval.on_start=false",
    "lr_scheduler_type=constant",
    "warmup_ratio=0",
    "moe.num_experts=8",
    "micro_batch_size=1",
    "max_steps=1000000",
)


@dataclass(frozen=True)
class Recovery:
    """Seconds since the SIGKILL."""

    noticed: float
    """until the launcher said so"""
    step: float
    """until the next step was finished"""
    whole: float
    """until all four had finished a step together again"""


@contextmanager
def run_of(workshop: Path, name: str, command: list[str], *overrides: str) -> Iterator[subprocess.Popen[str]]:
    given = [str(workshop / "config.yaml"), *COMMON, f"output_dir={workshop}/runs/{name}", *overrides]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "hecate", *command, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            for _ in process.stdout or ():  # until all ranks have saved and gone
                pass


def until(process: subprocess.Popen[str], start: str, beyond: int = -1) -> float:
    """When a line began with `start`, and, if it is a step's, with a later one than `beyond`."""
    assert process.stdout is not None
    for line in process.stdout:
        now = time.perf_counter()
        if line.startswith(start) and (beyond < 0 or int(line.split("/")[0].removeprefix("step ")) > beyond):
            return now
    raise RuntimeError(f"the run ended before a line {start!r}")


def kill_one(process: subprocess.Popen[str]) -> float:
    """SIGKILL the rank that was RANK 1 in the beginning."""
    kill_rank(process.pid, 1)
    return time.perf_counter()


def restart(workshop: Path, name: str) -> Recovery:
    with run_of(workshop, name, ["launch", "--nproc-per-node", str(RANKS)], "save_steps=1") as process:
        until(process, "step ", 5)
        killed = kill_one(process)
        noticed = until(process, "hecate: a rank was lost")
        until(process, "resumed after step")
        step = until(process, "step ")
    return Recovery(noticed - killed, step - killed, step - killed)


def shrink_and_replace(workshop: Path, name: str) -> Recovery:
    with run_of(workshop, name, ["train"], f"nproc={RANKS}", "fssdp.redundancy=1") as process:
        until(process, "step ", 5)
        killed = kill_one(process)
        noticed = until(process, "hecate: rank 1 was killed")
        until(process, f"{RANKS - 1} ranks go on after step")
        step = until(process, "step ")
        until(process, f"{RANKS} ranks go on after step")
        whole = until(process, "step ")
    return Recovery(noticed - killed, step - killed, whole - killed)


def losses(workshop: Path, name: str) -> dict[int, float]:
    lines = (workshop / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"}


def check(workshop: Path, names: list[str]) -> None:
    found = {name: losses(workshop, name) for name in names}
    last = max(max(by_step) for by_step in found.values())
    with run_of(workshop, "whole", ["train"], f"nproc={RANKS}") as process:
        until(process, "step ", last)
    wanted = losses(workshop, "whole")
    for name, by_step in found.items():
        worst = max(abs(loss - wanted[step]) / wanted[step] for step, loss in by_step.items())
        if worst > 1e-6:
            raise SystemExit(f"recovery: {name} is off by {worst:.2e} from the run that lost no rank; no figures")


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    samples = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        workshop = make_workshop(Path(folder))
        restarts, shrinks = [], []
        for number in range(samples):
            shrinks.append(shrink_and_replace(workshop, f"shrink-{number}"))
            restarts.append(restart(workshop, f"restart-{number}"))
        check(workshop, [f"{kind}-{number}" for kind in ("shrink", "restart") for number in range(samples)])
    figures = {
        "shrink": ([r.noticed for r in shrinks], [r.step for r in shrinks]),
        "replace": ([r.noticed for r in shrinks], [r.whole for r in shrinks]),
        "torchrun_restart": ([r.noticed for r in restarts], [r.step for r in restarts]),
    }
    rows = [
        {
            "way": way,
            "noticed_s": statistics.median(noticed),
            "median_s": statistics.median(seconds),
            "worst_s": max(seconds),
            "noticed_all": noticed,
            "all": seconds,
        }
        for way, (noticed, seconds) in figures.items()
    ]
    finish("recovery", rows, {f"{way}_s": statistics.median(seconds) for way, (_, seconds) in figures.items()}, options.json)


if __name__ == "__main__":
    main()
