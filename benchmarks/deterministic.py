"""Compare steps with `deterministic`, in groups of several sizes, with steps without it, on gloo ranks of one thread each.

    python -m benchmarks.deterministic [--quick] [--json FILE]

Two MixLoRA models of random weights: a small one, whose many small products show what they cost at worst, and a wider one with longer
sequences. `benchmarks.paired_steps` says how steps are compared: those of all settings take turns. First 1, 2 and 4 ranks must end with the
same bits.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.paired_steps import Taken, alternating, ratios, training
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from testing.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """What is measured of one model."""

    model: Mapping[str, int]
    """its sizes (`make_folder`)"""
    ranks: tuple[int, ...]
    sequences: int
    """of a rank in a micro-step"""
    groups: tuple[int, ...]
    """how many of them make a group, each in turn"""


CASES = {
    "small": Case({"hidden": 256, "ffn": 688, "layers": 4, "seq_len": 128}, (1, 2), 6, (1, 2, 6)),
    "wide": Case({"hidden": 512, "ffn": 1376, "layers": 2, "seq_len": 256}, (1, 2), 6, (1, 2, 6)),
}
COMPARED_RANKS = (1, 2, 4)
STEPS = 7
_WITHOUT = "without"


def final_digests(rank: int, world: int, folder: str, sequences: int, group: int) -> dict[str, str]:
    """What two steps leave, by name, of `sequences` sequences that all ranks share."""
    settings = {"deterministic": True, "deterministic_group": group, "micro_batch_size": sequences // world}
    run = training(rank, world, folder, f"bits-{world}-{group}", settings)
    for _ in range(2):
        run.train_one()
    path = run.save().folder
    assert path is not None
    dist.barrier()
    return {name: entry["xxh3_128"] for name, entry in json.loads((path / "manifest.json").read_text(encoding="utf-8"))["tensors"].items()}


def require_same_bits(folder: str) -> None:
    """Raises SystemExit: the numbers of ranks do not end with the same bits."""
    for group in (1, 2):
        digests = [run_ranks(world, final_digests, folder, 8, group, timeout=1200)[0] for world in COMPARED_RANKS]
        if any(one != digests[0] for one in digests):
            sys.exit(f"1, 2 and 4 ranks do not end with the same bits in groups of {group}, so nothing was measured")


def measured(name: str, folder: str, steps: int = STEPS) -> list[dict[str, Any]]:
    """Steps with it and without it, for each number of ranks and of sequences in a group.

    Args:
        name: of the case.
        folder: of its model (`make_folder`).
    """
    case, rows = CASES[name], []
    settings = {"micro_batch_size": case.sequences}
    sides = {str(group): {**settings, "deterministic": True, "deterministic_group": group} for group in case.groups}
    for world in case.ranks:
        found = alternating(world, folder, {_WITHOUT: settings, **sides}, steps)
        rows += [row_of(name, world, case.sequences, group, found[str(group)], found[_WITHOUT]) for group in case.groups]
    return rows


def row_of(model: str, world: int, sequences: int, group: int, with_it: Taken, without: Taken) -> dict[str, Any]:
    """What is recorded of one size of groups."""
    return {
        "model": model,
        "ranks": world,
        "sequences": sequences,
        "group": group,
        "with_s": median(with_it.clock),
        "without_s": median(without.clock),
        "slowdown": ratios(with_it.clock, without.clock).median,
        "processor_slowdown": (by_processor := ratios(with_it.processor, without.processor)).median,
        "processor_low": by_processor.low,
        "processor_high": by_processor.high,
        "clock": [with_it.clock, without.clock],
        "processor": [with_it.processor, without.processor],
    }


def worst(rows: list[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
    """The row with the largest cost in processor time, of groups of a rank's whole micro-batch, or of groups of one."""
    chosen = [row for row in rows if row["group"] == (row["sequences"] if whole else 1)]
    return max(chosen, key=lambda row: float(row["processor_slowdown"]))


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as base:
        folders = {}
        for name, case in CASES.items():
            (Path(base) / name).mkdir()
            folders[name] = str(make_folder(Path(base) / name, **case.model).parent)
        require_same_bits(folders["small"])
        for name, folder in folders.items():
            rows += measured(name, folder, 3 if options.quick else STEPS)
    summary = {
        f"{size}_processor_slowdown": worst(rows, whole=whole)["processor_slowdown"]
        for size, whole in (("group_of_one", False), ("whole_micro_batch", True))
    }
    finish("deterministic", rows, summary, options.json)


if __name__ == "__main__":
    main()
