"""Kill one of four ranks, and measure the seconds from SIGKILL to the next finished step, under torchrun, the local launcher and Ray.

- shrink: the three remaining ranks continue in their processes and lose no step (`fssdp.redundancy: 1`).
- replace: the time until four ranks have finished a step together again. A new rank loads while three train, and then joins them.
- restart: there is no backup of the lost rank's experts, so all ranks return to the last checkpoint, which is that of the step before.
  Under `hecate launch` (torch's elastic agent) all processes end and start again; under Ray only one is new, and the others wait for it.

The model is tiny and in float64 (hidden 32, 2 layers, 8 experts). Ranks of a job are killed several times, each time after it has trained
for a while and its spare process, if it has one, is ready. Before times are reported, the losses of all jobs up to step 500 are
checked against those of one process that trained alone.
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
from benchmarks.report import arguments, finish
from hecate.launch.policy.job_states import State
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
_MOST_REPLACED = 3
"""the most ranks that the local launcher replaces in one job"""
_REST_STEPS = 20
"""the steps trained before the next kill"""
_CHECKED_STEPS = 500


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


def local(workshop: Path, name: str, kills: int) -> list[Recovery]:
    found = []
    with job(workshop, name, ["train"], *COMMON, ONE_SEQUENCE, f"nproc={RANKS}", "fssdp.redundancy=1") as run:
        for number in range(1, kills + 1):  # the ranks that the run started with
            run.rest(_REST_STEPS)
            found.append(shrink_and_replace(run, lambda: kill_rank(run.process.pid, number), "was killed"))  # noqa: B023 - called at once
    return found


def torchrun(workshop: Path, name: str, kills: int) -> list[Recovery]:
    found = []
    with job(
        workshop, name, ["launch", "--nproc-per-node", str(RANKS), "--max-restarts", str(kills)], *COMMON, ONE_SEQUENCE, "save_steps=1"
    ) as run:
        for _ in range(kills):
            run.rest(_REST_STEPS)
            killed = time.perf_counter()
            kill_rank(run.process.pid, 1)
            noticed = run.until_said("hecate: a rank was lost")
            run.until_said("resumed after step")
            step, _ = run.next_step()
            found.append(Recovery(noticed - killed, step - killed, step - killed))
    return found


def ray(workshop: Path, name: str, kills: int, *, backups: bool) -> list[Recovery]:
    found = []
    overrides = [*COMMON, ONE_SEQUENCE, f"ray.workers={RANKS}", "fssdp.redundancy=1" if backups else "save_steps=1"]
    with job(workshop, name, ["ray", "--address", "local"], *overrides) as run:
        for _ in range(kills):
            devices = run.status(lambda s: s.state is State.RUNNING and _all_train(s) and s.spares == 1).devices
            run.rest(_REST_STEPS)

            def kill(pid: int = devices[1].pid) -> None:
                os.kill(pid, signal.SIGKILL)

            if backups:
                found.append(shrink_and_replace(run, kill, "the worker's process died"))
                continue
            killed = time.perf_counter()
            kill()
            noticed = run.until_said("the worker's process died")
            run.until_ranks(RANKS)
            step, _ = run.next_step()
            found.append(Recovery(noticed - killed, step - killed, step - killed))
    return found


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
    kills = 1 if options.quick else 5
    replaced = min(kills, _MOST_REPLACED)
    jobs: list[tuple[str, Callable[[Path, str, int], list[Recovery]], int]] = [
        ("local", local, replaced),
        ("torchrun", torchrun, kills),
        ("ray", partial(ray, backups=True), kills),
        ("local", local, kills - replaced),
        ("ray_restart", partial(ray, backups=False), kills),
    ]
    found: dict[str, list[Recovery]] = {way: [] for way, _, _ in jobs}
    names: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = make_workshop(Path(folder))
        for way, recoveries, number in jobs:
            if number:
                names.append(f"{way}-{len(names)}")
                found[way] += recoveries(workshop, names[-1], number)
        check(workshop, names)
    figures = {
        "shrink": ("local", "step"),
        "replace": ("local", "whole"),
        "torchrun_restart": ("torchrun", "step"),
        "ray_shrink": ("ray", "step"),
        "ray_replace": ("ray", "whole"),
        "ray_restart": ("ray_restart", "step"),
    }
    rows = []
    for name, (way, until) in figures.items():
        noticed, seconds = [r.noticed for r in found[way]], [getattr(r, until) for r in found[way]]
        rows.append(
            {
                "way": name,
                "noticed_s": statistics.median(noticed),
                "median_s": statistics.median(seconds),
                "worst_s": max(seconds),
                "noticed_all": noticed,
                "all": seconds,
            }
        )
    finish("recovery", rows, {f"{row['way']}_s": row["median_s"] for row in rows}, options.json)


if __name__ == "__main__":
    main()
