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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.paired_steps import Compared, alternating, training
from benchmarks.ratios import Budget, Ratio, largest
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
ENOUGH = Budget(half_width=0.02, rounds=40)
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


@dataclass(frozen=True)
class Measured:
    """Steps with it and without it, of one number of ranks and of sequences in a group."""

    model: str
    ranks: int
    sequences: int
    """of a rank in a micro-step"""
    group: int
    steps: Compared

    def row(self, budget: Budget) -> dict[str, Any]:
        """What is recorded."""
        clock, processor = self.steps.clock(budget), self.steps.processor(budget)
        with_it, without = self.steps.with_it, self.steps.without
        return {
            "model": self.model,
            "ranks": self.ranks,
            "sequences": self.sequences,
            "group": self.group,
            "with_s": median(with_it.clock),
            "without_s": median(without.clock),
            **clock.numbers("slowdown"),
            **processor.numbers("processor_slowdown"),
            "clock": [with_it.clock, without.clock],
            "processor": [with_it.processor, without.processor],
        }


def measured(name: str, folder: str, budget: Budget = ENOUGH) -> list[Measured]:
    """Steps with it and without it, for each number of ranks and of sequences in a group.

    Args:
        name: of the case.
        folder: of its model (`make_folder`).
    """
    case, found = CASES[name], []
    settings = {"micro_batch_size": case.sequences}
    sides = {str(group): {**settings, "deterministic": True, "deterministic_group": group} for group in case.groups}
    pairs = [(side, _WITHOUT) for side in sides]
    for world in case.ranks:
        taken = alternating(world, folder, {_WITHOUT: settings, **sides}, pairs, budget)
        found += [Measured(name, world, case.sequences, int(side), Compared(taken[side], taken[_WITHOUT])) for side in sides]
    return found


def of_groups(found: Sequence[Measured], *, whole: bool) -> list[Measured]:
    """Those of groups of a rank's whole micro-batch, or of groups of one."""
    return [one for one in found if one.group == (one.sequences if whole else 1)]


def worst(found: Sequence[Measured], budget: Budget, *, whole: bool) -> Ratio:
    """The largest cost in processor time."""
    return largest(one.steps.processor(budget) for one in of_groups(found, whole=whole))


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    budget = Budget(ENOUGH.half_width, 4) if options.quick else ENOUGH
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as base:
        folders = {}
        for name, case in CASES.items():
            (Path(base) / name).mkdir()
            folders[name] = str(make_folder(Path(base) / name, **case.model).parent)
        require_same_bits(folders["small"])
        for name, folder in folders.items():
            found += measured(name, folder, budget)
    summary = {
        f"{size}_processor_slowdown": worst(found, budget, whole=whole)
        for size, whole in (("group_of_one", False), ("whole_micro_batch", True))
    }
    finish("deterministic", [one.row(budget) for one in found], summary, options.json)


if __name__ == "__main__":
    main()
