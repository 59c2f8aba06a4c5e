"""Compare steps of a small training under several settings, step by step in turn, on gloo ranks of one thread each.

Each rank holds all these trainings and takes a step of one, then a step of the next, so that whatever else the machine does slows all. More
ranks than cores take turns. Where other programs share the cores, ranks wait for each other at random; the ratio of processor times, over
all ranks, does not count that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

from hecate.config import load_config
from hecate.parallel.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.ranks import run_ranks

WARM_UP = 2
"""steps of each side that are not counted"""
Settings = Mapping[str, Any]
"""configuration key -> value"""


@dataclass(frozen=True)
class Ratios:
    """Ratios of one thing to another that were measured in turn."""

    median: float
    low: float
    """the lower quartile"""
    high: float
    """the upper quartile"""


@dataclass(frozen=True)
class Compared:
    """The seconds of steps with a setting and of the steps without it that they took turns with."""

    clock: tuple[list[float], list[float]]
    """of the first rank: with, without"""
    processor: tuple[list[float], list[float]]
    """over all ranks"""


@dataclass(frozen=True)
class Taken:
    """The seconds of the steps of one training."""

    clock: list[float]
    """of the first rank"""
    processor: list[float]
    """over all ranks"""


def training(rank: int, world: int, folder: str, name: str, settings: Settings) -> Training:
    """The training of `benchmarks.small_run` in `folder` on this rank of a default gloo group; its output goes to runs/NAME."""
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    config = load_config(Path(folder) / "config.yaml", [*given, f"output_dir={folder}/runs/{name}"], claim_output=False)
    return Training(config, Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world))))


def seconds(rank: int, world: int, folder: str, sides: Mapping[str, Settings], steps: int) -> dict[str, list[tuple[float, float]]]:
    """The seconds of alternating steps on this rank: of the clock, and of the processor."""
    runs = {side: training(rank, world, folder, side, settings) for side, settings in sides.items()}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in runs}
    for number in range(WARM_UP + steps):
        for side in sorted(runs, reverse=bool(number % 2)):
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            runs[side].train_one()
            if number >= WARM_UP:
                found[side].append((time.perf_counter() - started, time.process_time() - used))
    return found


def alternating(world: int, folder: str, sides: Mapping[str, Settings], steps: int) -> dict[str, Taken]:
    """Take so many steps of each side, by its name and settings, on `world` new ranks."""
    found = run_ranks(world, seconds, folder, sides, steps, timeout=3600)
    clock = {side: [wall for wall, _ in found[0][side]] for side in sides}
    processor = {side: [sum(used) for used in zip(*([u for _, u in one[side]] for one in found), strict=True)] for side in sides}
    return {side: Taken(clock[side], processor[side]) for side in sides}


def compared(world: int, folder: str, settings: Settings, change: Settings, steps: int) -> Compared:
    """Take so many steps of each side, with `settings` and `change`, and with `settings` alone, on `world` new ranks."""
    found = alternating(world, folder, {"with": {**settings, **change}, "without": settings}, steps)
    return Compared((found["with"].clock, found["without"].clock), (found["with"].processor, found["without"].processor))


def ratios(these: Sequence[float], those: Sequence[float]) -> Ratios:
    """Each of these over that of those which it took turns with."""
    return spread([a / b for a, b in zip(these, those, strict=True)])


def spread(values: Sequence[float]) -> Ratios:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Ratios(median(values), low, high)
