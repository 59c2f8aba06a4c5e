"""One of four ranks is killed: seconds from SIGKILL until the next step is finished, under torchrun and the local launcher, and under Ray.

- shrink: the three that are left go on in their processes and lose no step (`fssdp.redundancy: 1`);
- replace: the same until four ranks have finished a step together: a new one loads while three train, then joins them;
- restart: nobody has a copy of what the lost rank owned: all go back to the last checkpoint, which is that of the step before. Under
  `hecate launch`, torch's elastic agent, all processes end and start again; under Ray one is new, and the others wait for it.

A tiny model in float64 (hidden 32, 2 layers, 8 experts). A job is killed several times, each time when it has trained on for a while and
its spare process, if it keeps one, is there. Before the figures: the losses of all jobs, up to step 500, are those of one
process that trained alone.
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
from typing import Any

from benchmarks.following import Job, job
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
    "learning_rate=1e-4",  # at 1e-2 the order of sums alone changes a loss by 1e-3 within a hundred steps
    "max_steps=1000000",
)
ONE_ROW = "micro_batch_size=1"
"""on each of the ranks"""
_MOST_REPLACED = 3
"""by the local launcher in one job"""
_REST_STEPS = 20
"""trained before the next kill"""
_CHECKED_STEPS = 500


@dataclass(frozen=True)
class Recovery:
    """Seconds since the SIGKILL."""

    noticed: float
    """until the launcher said so"""
    step: float
    """until the next step was finished"""
    whole: float
    """until all four had finished a step together again"""


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
    with job(workshop, name, ["train"], *COMMON, ONE_ROW, f"nproc={RANKS}", "fssdp.redundancy=1") as run:
        for number in range(1, kills + 1):  # those that the run began with
            run.rest(_REST_STEPS)
            found.append(shrink_and_replace(run, lambda: kill_rank(run.process.pid, number), "was killed"))  # noqa: B023 - called at once
    return found


def torchrun(workshop: Path, name: str, kills: int) -> list[Recovery]:
    found = []
    with job(
        workshop, name, ["launch", "--nproc-per-node", str(RANKS), "--max-restarts", str(kills)], *COMMON, ONE_ROW, "save_steps=1"
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


def ray(workshop: Path, name: str, kills: int, *, copies: bool) -> list[Recovery]:
    found = []
    overrides = [*COMMON, ONE_ROW, f"ray.workers={RANKS}", "fssdp.redundancy=1" if copies else "save_steps=1"]
    with job(workshop, name, ["ray", "--address", "local"], *overrides) as run:
        for _ in range(kills):
            devices = run.status(lambda s: s["state"] == "running" and _all_train(s) and s["spares"] == 1)["devices"]
            run.rest(_REST_STEPS)

            def kill(pid: int = devices[1]["pid"]) -> None:
                os.kill(pid, signal.SIGKILL)

            if copies:
                found.append(shrink_and_replace(run, kill, "the worker's process died"))
                continue
            killed = time.perf_counter()
            kill()
            noticed = run.until_said("the worker's process died")
            run.until_ranks(RANKS)
            step, _ = run.next_step()
            found.append(Recovery(noticed - killed, step - killed, step - killed))
    return found


def _all_train(status: dict[str, Any]) -> bool:
    return all(device["state"] == "training" for device in status["devices"])


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
        ("ray", partial(ray, copies=True), kills),
        ("local", local, kills - replaced),
        ("ray_restart", partial(ray, copies=False), kills),
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
