"""Compare steps of a training under several settings, step by step in turn, on gloo ranks of one thread each.

Each rank holds all these trainings and takes a step of one, then a step of the next (`benchmarks.ratios`), so that whatever else the
machine does slows all. More ranks than cores take turns. Where other programs share the cores, ranks wait for each other at random; the
ratio of processor times, over all ranks, does not count that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ratios import Budget, Ratio, of_times, until_narrow
from hecate.config import load_config
from hecate.parallel.cluster.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.ranks import run_ranks

WARM_UP = 2
"""steps of each side that are not counted"""
Settings = Mapping[str, Any]
"""configuration key -> value, or the YAML of one"""


@dataclass(frozen=True)
class Taken:
    """The seconds of the steps of one training."""

    clock: list[float]
    """of the slowest rank"""
    processor: list[float]
    """over all ranks"""


@dataclass(frozen=True)
class Compared:
    """The steps with a setting, and those without it that they took turns with."""

    with_it: Taken
    without: Taken

    def clock(self, budget: Budget) -> Ratio:
        return of_times(self.with_it.clock, self.without.clock, budget)

    def processor(self, budget: Budget) -> Ratio:
        return of_times(self.with_it.processor, self.without.processor, budget)


def training(rank: int, world: int, folder: str, name: str, settings: Settings) -> Training:
    """The training of `folder`'s config.yaml on this rank of a default gloo group; its output goes to runs/NAME."""
    given = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    config = load_config(Path(folder) / "config.yaml", [*given, f"output_dir={folder}/runs/{name}"], claim_output=False)
    return Training(config, Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world))))


def on_all_ranks(action: Callable[[], object]) -> tuple[float, float]:
    """Act on all ranks together. Returns, on each rank, the slowest one's seconds by the clock and the processor seconds of all."""
    dist.barrier()
    started, used = time.perf_counter(), time.process_time()
    action()
    clock = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    processor = torch.tensor(time.process_time() - used, dtype=torch.float64)
    dist.all_reduce(clock, op=dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    return clock.item(), processor.item()


def steps_in_turn(
    rank: int, world: int, folder: str, sides: Mapping[str, Settings], pairs: list[tuple[str, str]], budget: Budget
) -> dict[str, Taken]:
    """The steps of each side, until the ratios of these pairs' processor times are narrow."""
    runs = {side: training(rank, world, folder, side, settings) for side, settings in sides.items()}
    clock: dict[str, list[float]] = {side: [] for side in runs}

    def step(side: str) -> float:
        took, processor = on_all_ranks(runs[side].train_one)
        clock[side].append(took)
        return processor

    for _ in range(WARM_UP):
        for side in runs:
            step(side)
    processor = until_narrow(step, list(runs), pairs, budget)
    return {side: Taken(clock[side][WARM_UP:], processor[side]) for side in runs}


def alternating(world: int, folder: str, sides: Mapping[str, Settings], pairs: list[tuple[str, str]], budget: Budget) -> dict[str, Taken]:
    """Take steps of each side, by its name and settings, on `world` new ranks, until the ratios of these pairs are narrow."""
    return run_ranks(world, steps_in_turn, folder, sides, pairs, budget, timeout=3600)[0]


def compared(world: int, folder: str, settings: Settings, change: Settings, budget: Budget) -> Compared:
    """Take steps with `settings` and `change`, and with `settings` alone, on `world` new ranks."""
    found = alternating(world, folder, {"with": {**settings, **change}, "without": settings}, [("with", "without")], budget)
    return Compared(found["with"], found["without"])
