"""Time what a user waits for: `hecate --help`, a refused configuration, and the first step of a fresh installation.

The first step of a fresh installation plans without machine code (`hecate.parallel.loops.jit`). Ranks of a job plan side by side, once with
an empty cache and once with the one that this has left; between two plans each rests as long as a step of the quickstart computes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, finish

PLANS = {"quickstart": (8, 2, 30), "64 experts on 32 ranks": (64, 32, 32)}
"""experts, ranks, layers"""
RANKS = 2
"""that plan side by side on this machine"""


def command_rows(repeats: int) -> tuple[list[dict[str, Any]], float]:
    """A row a command; and the median seconds of `hecate --help`."""
    with tempfile.TemporaryDirectory() as name:
        wrong = Path(name) / "wrong.yaml"
        wrong.write_text("learning_rat: 1\n", encoding="utf-8")
        commands = {
            "python -c pass": ([sys.executable, "-c", "pass"], 0),
            "hecate --help": ([sys.executable, "-m", "hecate", "--help"], 0),
            "hecate train WRONG": ([sys.executable, "-m", "hecate", "train", str(wrong)], 2),
        }
        seconds: dict[str, list[float]] = {command: [] for command in commands}
        for _ in range(repeats):
            for command, (words, status) in commands.items():
                start = time.perf_counter()
                done = subprocess.run(words, capture_output=True, check=False)
                seconds[command].append(time.perf_counter() - start)
                assert done.returncode == status, (command, done.returncode, done.stderr)
    rows = [
        {"command": command, "seconds_median": statistics.median(times), "seconds_min": min(times), "seconds_all": times}
        for command, times in seconds.items()
    ]
    return rows, statistics.median(seconds["hecate --help"])


def first_plans(sizes: tuple[int, ...], cache: str) -> list[dict[str, float]]:
    """What each of `RANKS` processes that start together has measured."""
    words = [sys.executable, "-m", "benchmarks.first_plan", *map(str, sizes)]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(RANKS)]
    return [json.loads(rank.communicate()[0]) for rank in ranks]


def plan_rows() -> list[dict[str, Any]]:
    rows = []
    for size, sizes in PLANS.items():
        with tempfile.TemporaryDirectory() as cache:
            for state in ("fresh", "warm"):
                ranks = first_plans(sizes, cache)
                seconds = [rank["first_plan_seconds"] for rank in ranks]
                rows.append(
                    {
                        "command": f"first plan, {size}, {state} cache",
                        "seconds_median": max(seconds),
                        "seconds_all": seconds,
                        "ranks": ranks,
                    }
                )
    return rows


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    commands, help_seconds = command_rows(3 if options.quick else 15)
    plans = plan_rows()
    first = {row["command"]: row["seconds_median"] for row in plans}
    late = {size: first[f"first plan, {size}, fresh cache"] - first[f"first plan, {size}, warm cache"] for size in PLANS}
    summary = {
        "help_seconds": help_seconds,
        "first_step_delay_seconds": late["quickstart"],
        "large_first_step_delay_seconds": late["64 experts on 32 ranks"],
        "compiler_processor_seconds": sum(rank["compiler_processor_seconds"] for rank in plans[0]["ranks"]),
    }
    finish("startup", commands + plans, summary, options.json)


if __name__ == "__main__":
    main()
