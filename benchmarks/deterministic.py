"""Compare steps with `deterministic` with steps without it, on 1, 2 and 4 gloo ranks of one thread each, of a small MixLoRA.

Each rank holds both trainings and takes a step of one, then a step of the other, so that whatever else the machine does slows both. With
it, 1, 2 and 4 ranks must first end with the same bits. More ranks than cores take turns. Where other programs share the cores,
ranks wait for each other at random; the ratio of processor times, over all ranks, does not count that.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from hecate.config import load_config
from hecate.parallel.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.ranks import run_ranks

RANKS = (1, 2, 4)
SEQUENCES = (1, 6)
"""of a rank in a micro-step"""
WARM_UP = 2


def _training(rank: int, world: int, folder: str, name: str, settings: dict[str, Any]) -> Training:
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    config = load_config(Path(folder) / "config.yaml", [*given, f"output_dir={folder}/runs/{name}"], claim_output=False)
    return Training(config, Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world))))


def final_digests(rank: int, world: int, folder: str, sequences: int) -> dict[str, str]:
    """What two steps leave, by name, of `sequences` sequences that all ranks share."""
    run = _training(rank, world, folder, f"bits-{world}", {"deterministic": True, "micro_batch_size": sequences // world})
    for _ in range(2):
        run.train_one()
    path = run.save()
    assert path is not None
    dist.barrier()
    return {name: entry["xxh3_128"] for name, entry in json.loads((path / "manifest.json").read_text(encoding="utf-8"))["tensors"].items()}


def seconds(rank: int, world: int, folder: str, settings: dict[str, Any], steps: int) -> dict[str, list[tuple[float, float]]]:
    """The seconds of alternating steps on this rank: of the clock, and of the processor."""
    runs = {
        "with": _training(rank, world, folder, "with", {**settings, "deterministic": True}),
        "without": _training(rank, world, folder, "without", settings),
    }
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in runs}
    for number in range(WARM_UP + steps):
        for side in sorted(runs, reverse=bool(number % 2)):
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            runs[side].train_one()
            if number >= WARM_UP:
                found[side].append((time.perf_counter() - started, time.process_time() - used))
    return found


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    steps = 3 if options.quick else 15
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = str(make_folder(Path(name)).parent)
        digests = [run_ranks(world, final_digests, folder, 4, timeout=600)[0] for world in RANKS]
        if any(one != digests[0] for one in digests):
            sys.exit("1, 2 and 4 ranks do not end with the same bits, so nothing was measured")
        for world in RANKS:
            for sequences in SEQUENCES:
                found = run_ranks(world, seconds, folder, {"micro_batch_size": sequences}, steps, timeout=1200)
                clock = {side: [wall for wall, _ in found[0][side]] for side in found[0]}
                processor = {
                    side: [sum(used) for used in zip(*([u for _, u in one[side]] for one in found), strict=True)] for side in found[0]
                }
                rows.append(
                    {
                        "ranks": world,
                        "sequences": sequences,
                        "with_s": median(clock["with"]),
                        "without_s": median(clock["without"]),
                        "slowdown": median(clock["with"]) / median(clock["without"]),
                        "slowdown_of_fastest": min(clock["with"]) / min(clock["without"]),
                        "processor_slowdown": median(processor["with"]) / median(processor["without"]),
                        "clock": [clock["with"], clock["without"]],
                        "processor": [processor["with"], processor["without"]],
                    }
                )
    summary = {
        "deterministic_slowdown": max(row["slowdown"] for row in rows),
        "deterministic_processor_slowdown": max(row["processor_slowdown"] for row in rows),
    }
    finish("deterministic", rows, summary, options.json)


if __name__ == "__main__":
    main()
