"""Compare steps with `deterministic` with steps without it, on 1, 2 and 4 gloo ranks of one thread each, of a small MixLoRA.

`benchmarks.paired_steps` says how. With it, 1, 2 and 4 ranks must first end with the same bits.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.paired_steps import Compared, compared, training
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from testing.ranks import run_ranks

RANKS = (1, 2, 4)
SEQUENCES = (1, 6)
"""of a rank in a micro-step"""


def final_digests(rank: int, world: int, folder: str, sequences: int) -> dict[str, str]:
    """What two steps leave, by name, of `sequences` sequences that all ranks share."""
    run = training(rank, world, folder, f"bits-{world}", {"deterministic": True, "micro_batch_size": sequences // world})
    for _ in range(2):
        run.train_one()
    path = run.save().folder
    assert path is not None
    dist.barrier()
    return {name: entry["xxh3_128"] for name, entry in json.loads((path / "manifest.json").read_text(encoding="utf-8"))["tensors"].items()}


def measured(folder: str, steps: int) -> list[dict[str, Any]]:
    """Steps with it and without it, for each number of ranks and of sequences.

    Raises:
        SystemExit: the numbers of ranks do not end with the same bits.
    """
    digests = [run_ranks(world, final_digests, folder, 4, timeout=600)[0] for world in RANKS]
    if any(one != digests[0] for one in digests):
        sys.exit("1, 2 and 4 ranks do not end with the same bits, so nothing was measured")
    return [
        row_of(world, sequences, compared(world, folder, {"micro_batch_size": sequences}, {"deterministic": True}, steps))
        for world in RANKS
        for sequences in SEQUENCES
    ]


def row_of(world: int, sequences: int, found: Compared) -> dict[str, Any]:
    """What is recorded of one number of ranks and sequences."""
    (clock_with, clock_without), (used_with, used_without) = found.clock, found.processor
    return {
        "ranks": world,
        "sequences": sequences,
        "with_s": median(clock_with),
        "without_s": median(clock_without),
        "slowdown": median(clock_with) / median(clock_without),
        "slowdown_of_fastest": min(clock_with) / min(clock_without),
        "processor_slowdown": median(used_with) / median(used_without),
        "clock": [clock_with, clock_without],
        "processor": [used_with, used_without],
    }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        rows = measured(str(make_folder(Path(name)).parent), 3 if options.quick else 15)
    summary = {
        "deterministic_slowdown": max(row["slowdown"] for row in rows),
        "deterministic_processor_slowdown": max(row["processor_slowdown"] for row in rows),
    }
    finish("deterministic", rows, summary, options.json)


if __name__ == "__main__":
    main()
