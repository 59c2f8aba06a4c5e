"""Kill one of four ranks, and measure the seconds from SIGKILL to the next finished step, under `hecate train`, `hecate launch` and Ray.

- shrink: the three remaining ranks continue in their processes and lose no step (`fssdp.redundancy: 1`).
- replace: the time until four ranks have finished a step together again. A new rank loads while three train, and then joins them.
- restart: there is no backup of the lost rank's experts, so all ranks return to the last checkpoint, which is that of the step before.
  Under `hecate launch` all processes end and start again; under Ray only one is new, and the others wait for it.

The model is tiny and in float64 (hidden 32, 2 layers, 8 experts). The ways take turns (`benchmarks.ratios`): a job starts, trains for a
while until its spare process, if it has one, is ready, loses a rank, and ends when it has gone on. Before times are reported, the losses
of all jobs up to step 500 are checked against those of one process that trained alone.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.following import Job, job
from benchmarks.ratios import Budget, Ratio, speedup, until_narrow
from benchmarks.report import arguments, finish
from hecate.launch.membership.job_states import State
from hecate.launch.ray_job.status import DeviceState, JobStatus
from testing.processes import OVERRIDES, kill_rank
from testing.tiny_run import make_workshop

RANKS = 4
COMMON = (
    *OVERRIDES,
    "moe.num_experts=8",
    "learning_rate=1e-4",  # at 1e-2 the order of sums alone would change a loss by 1e-3 within a hundred steps
    "max_steps=1000000",
)
ONE_SEQUENCE = "micro_batch_size=1"
"""one sequence on each rank"""
_REST_STEPS = 20
"""the steps trained before the next kill"""
_CHECKED_STEPS = 500
ENOUGH = Budget(half_width=0.1, rounds=20)
"""times of 0.2 s are compared with some of 1.4 s"""


@dataclass(frozen=True)
class Recovery:
    """The seconds from the SIGKILL to three events."""

    noticed: float
    """the launcher reported the loss"""
    step: float
    """the next step was finished"""
    whole: float
    """all four ranks had finished a step together again"""


def shrink_and_replace(run: Job, kill: Callable[[], None], said: str) -> Recovery:
    killed = time.perf_counter()
    kill()
    noticed = run.until_said(said)
    run.until_ranks(RANKS - 1)
    step, _ = run.next_step()
    run.until_ranks(RANKS)
    whole, _ = run.next_step()
    return Recovery(noticed - killed, step - killed, whole - killed)


def local(workshop: Path, name: str) -> Recovery:
    with job(workshop, name, ["train"], *COMMON, ONE_SEQUENCE, f"nproc={RANKS}", "fssdp.redundancy=1") as run:
        run.rest(_REST_STEPS)
        return shrink_and_replace(run, lambda: kill_rank(run.process.pid, 1), "was killed")


def launch(workshop: Path, name: str) -> Recovery:
    with job(
        workshop, name, ["launch", "--nproc-per-node", str(RANKS), "--max-restarts", "1"], *COMMON, ONE_SEQUENCE, "save_steps=1"
    ) as run:
        run.rest(_REST_STEPS)
        killed = time.perf_counter()
        kill_rank(run.process.pid, 1)
        noticed = run.until_said("all ranks start again")
        run.until_said("resumed after step")
        step, _ = run.next_step()
        return Recovery(noticed - killed, step - killed, step - killed)


def ray(workshop: Path, name: str, *, backups: bool) -> Recovery:
    overrides = [*COMMON, ONE_SEQUENCE, f"ray.workers={RANKS}", "fssdp.redundancy=1" if backups else "save_steps=1"]
    with job(workshop, name, ["ray", "--address", "local"], *overrides) as run:
        devices = run.status(lambda s: s.state is State.RUNNING and _all_train(s) and s.spares == 1).devices
        run.rest(_REST_STEPS)

        def kill() -> None:
            os.kill(devices[1].pid, signal.SIGKILL)

        if backups:
            return shrink_and_replace(run, kill, "the worker's process died")
        killed = time.perf_counter()
        kill()
        noticed = run.until_said("the worker's process died")
        run.until_ranks(RANKS)
        step, _ = run.next_step()
        return Recovery(noticed - killed, step - killed, step - killed)


def _all_train(status: JobStatus) -> bool:
    return all(device.state is DeviceState.TRAINING for device in status.devices)


def losses(workshop: Path, name: str) -> dict[int, float]:
    lines = (workshop / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"}


def check(workshop: Path, names: list[str]) -> None:
    found = {name: losses(workshop, name) for name in names}
    last = min(_CHECKED_STEPS, max(max(by_step) for by_step in found.values()))
    with job(workshop, "whole", ["train"], *COMMON, "nproc=1", f"micro_batch_size={RANKS}") as run:
        while run.next_step()[1]["step"] < last:
            pass
    wanted = losses(workshop, "whole")
    for name, by_step in found.items():
        worst = max(abs(loss - wanted[step]) / wanted[step] for step, loss in by_step.items() if step <= last)
        if worst > 1e-6:
            raise SystemExit(f"recovery: {name} is off by {worst:.2e} from one process that trained alone; no figures")


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    budget = Budget(ENOUGH.half_width, 2) if options.quick else ENOUGH
    ways: dict[str, Callable[[Path, str], Recovery]] = {
        "launch": launch,
        "local": local,
        "ray": partial(ray, backups=True),
        "ray_restart": partial(ray, backups=False),
    }
    found: dict[str, list[Recovery]] = {way: [] for way in ways}
    names: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = make_workshop(Path(folder))

        def until_next_step(way: str) -> float:
            names.append(f"{way}-{len(names)}")
            found[way].append(ways[way](workshop, names[-1]))
            return found[way][-1].step

        seconds = until_narrow(until_next_step, list(ways), [("local", "launch"), ("ray", "ray_restart")], budget)
        check(workshop, names)
    figures = {
        "shrink": ("local", "step"),
        "replace": ("local", "whole"),
        "launch_restart": ("launch", "step"),
        "ray_shrink": ("ray", "step"),
        "ray_replace": ("ray", "whole"),
        "ray_restart": ("ray_restart", "step"),
    }
    rows = []
    for name, (way, until) in figures.items():
        noticed, taken = [r.noticed for r in found[way]], [getattr(r, until) for r in found[way]]
        rows.append(
            {
                "way": name,
                "noticed_s": statistics.median(noticed),
                "median_s": statistics.median(taken),
                "worst_s": max(taken),
                "noticed_all": noticed,
                "all": taken,
            }
        )
    summary: dict[str, float | Ratio] = {f"{row['way']}_s": row["median_s"] for row in rows}
    summary["shrink_speedup_over_launch_restart"] = speedup(seconds["local"], seconds["launch"], budget)
    summary["ray_shrink_speedup_over_ray_restart"] = speedup(seconds["ray"], seconds["ray_restart"], budget)
    finish("recovery", rows, summary, options.json)


if __name__ == "__main__":
    main()
