"""What surviving faults costs: digests, saves beside the steps, second copies, `deterministic`, and going on when a rank is killed.

    python -m benchmarks.faults [--quick] [--json FILE]

All ratios are of things that take turns within this run (`benchmarks.paired_steps`, `benchmarks.save_costs`), medians with quartiles: by
the clock and, where it means something, by the processor time of all ranks, which other programs on the machine hardly change. What is
above its goal is said to be missed. The training is that of `benchmarks.small_run`: hidden size 256, 4 layers, 8 experts of rank 8, on
gloo ranks of one thread each. `deterministic` is measured by `benchmarks.deterministic`, kills by drill R1 (`hecate drill R1`), which
kills each of four ranks of a tiny run in each phase and compares the result bit for bit.

`benchmarks.effective_time` reads the file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import deterministic
from benchmarks.paired_steps import Ratios, compared, ratios, spread
from benchmarks.report import arguments, finish
from benchmarks.save_costs import STEPS, digest_shares, kept_copies, saves_among_steps
from benchmarks.small_run import make_folder
from hecate.drill.catalogue import DRILLS
from hecate.drill.outcome import DrillOutcome
from hecate.drill.run import ground
from hecate.launch.local_launcher import ALLOCATOR_SETTINGS
from testing.ranks import run_ranks

SAVING_RANKS, REDUNDANT_RANKS = 2, 4
SETTINGS: dict[str, Any] = {"micro_batch_size": 6}


@dataclass(frozen=True)
class Cost:
    """One cost, its goal, and whether that is met."""

    name: str
    value: float
    low: float
    high: float
    """quartiles; of times to go on after a kill, the highest is the worst one"""
    processor: float | None
    """the same by processor time; None: it does not apply"""
    goal: float
    exact: bool = False
    """the goal is this number and no other; else at most this"""

    @property
    def met(self) -> bool:
        return self.value == self.goal if self.exact else self.value <= self.goal

    def row(self) -> dict[str, Any]:
        return {
            "cost": self.name,
            "median": self.value,
            "low": self.low,
            "high": self.high,
            "by_processor": "" if self.processor is None else self.processor,
            "goal": f"{'exactly' if self.exact else 'at most'} {self.goal:g}",
            "met": "yes" if self.met else "missed",
        }


def added(these: Sequence[float], those: Sequence[float], per: int = 1) -> Ratios:
    """What these add to those that they took turns with, as a share of `1 / per` of those."""
    return spread([per * (a - b) / b for a, b in zip(these, those, strict=True)])


def cost_of(name: str, share: Ratios, goal: float, processor: Ratios | None = None) -> Cost:
    return Cost(name, share.median, share.low, share.high, processor.median if processor else None, goal)


def digests(found: Sequence[dict[str, Any]]) -> Cost:
    """Of each rank's shares (`digest_shares`), those of the rank whose median is the largest."""
    shares = [ratios(one["digests"], one["saves"]) for one in found]
    return cost_of("digests of a save", max(shares, key=lambda share: share.median), 0.05)


def saves_beside(found: Sequence[dict[str, list[tuple[float, float]]]]) -> Cost:
    """What a save beside the steps adds, over the time of one step (`saves_among_steps` of each rank)."""
    wall = {arm: [clock for clock, _ in stretches] for arm, stretches in found[0].items()}
    used = {arm: [sum(of_ranks) for of_ranks in zip(*([u for _, u in one[arm]] for one in found), strict=True)] for arm in found[0]}
    clock, processor = (added(one["beside"], one["none"], STEPS) for one in (wall, used))
    return cost_of("save_async, of a step", clock, 0.05, processor)


def copies(found: Sequence[dict[str, int]]) -> Cost:
    """How many more copies of experts there are than owned ones (`kept_copies` of each rank)."""
    number = sum(one["backups"] for one in found) / sum(one["owned"] for one in found)
    return Cost("redundancy: 1, more copies", number, number, number, None, 1.0, exact=True)


def cost_of_order(row: dict[str, Any]) -> Cost:
    """What `deterministic` adds to a step, of a row of `benchmarks.deterministic`."""
    name = f"deterministic, of a step ({row['ranks']} ranks, {row['sequences']} sequences in groups of {row['group']})"
    return cost_of(name, added(*row["clock"]), 0.05, added(*row["processor"]))


def kills(outcome: DrillOutcome) -> list[Cost]:
    """What drill R1 has measured, in ms."""
    found = outcome.counts
    return [
        Cost(f"{name} in ms", found[f"{key}_ms"], found[f"{key}_ms"], found[f"{key}_worst_ms"], None, goal)
        for name, key, goal in (("a killed rank is noticed", "noticed", 250.0), ("the others go on", "recovered", 1000.0))
    ]


def measured(folder: str, *, quick: bool) -> tuple[list[Cost], dict[str, float]]:
    """All costs, and the seconds that a simulation needs.

    Raises:
        SystemExit: a run that lost a rank did not end with the same bits, or trainings at several numbers of ranks did not.
    """
    saves, rounds, steps = (3, 2, 4) if quick else (9, 60, 30)
    shares = run_ranks(SAVING_RANKS, digest_shares, folder, saves, timeout=1200)
    among = run_ranks(SAVING_RANKS, saves_among_steps, folder, SETTINGS, rounds, timeout=1200)
    redundant = compared(REDUNDANT_RANKS, folder, SETTINGS, {"fssdp.redundancy": 1}, steps)
    kept = run_ranks(REDUNDANT_RANKS, kept_copies, folder, SETTINGS, timeout=600)
    deterministic.require_same_bits(folder)
    ordered = deterministic.measured("small", folder, 3 if quick else 15)
    with ground() as made:
        killed = made.run(DRILLS["R1"], quick=quick).outcome
    if others := [text for text in killed.failures if ": took " not in text]:  # a time that is missed is said below
        raise SystemExit(f"drill R1 has failed, so there are no figures: {others[0]}")
    costs = [
        digests(shares),
        saves_beside(among),
        cost_of("redundancy: 1, of a step", added(*redundant.clock), 0.03, added(*redundant.processor)),
        copies(kept),
        *(cost_of_order(deterministic.worst(ordered, whole=whole)) for whole in (True, False)),
        *kills(killed),
    ]
    wall = {arm: [clock for clock, _ in stretches] for arm, stretches in among[0].items()}
    summary = {
        "step_s": median(wall["none"]) / STEPS,
        "save_at_once_of_a_step": added(wall["at_once"], wall["none"], STEPS).median,
        "save_beside_of_a_step": max(0.0, costs[1].value),
        "redundancy_of_a_step": max(0.0, costs[2].value),
        "redundancy_of_a_step_by_processor": max(0.0, added(*redundant.processor).median),
        "noticed_s": killed.counts["noticed_ms"] / 1000,
        "recovered_s": killed.counts["recovered_ms"] / 1000,
        "next_step_s": killed.counts["next_step_ms"] / 1000,
        "kill_cases": float(killed.total),
        "saved_MB_per_s": sum(one["bytes"] for one in shares) / 1e6 / median(shares[0]["saves"]),
    }
    return costs, summary


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ.update(ALLOCATOR_SETTINGS, OMP_NUM_THREADS="1")  # for the ranks, as hecate's launcher sets them
    with tempfile.TemporaryDirectory() as name:
        costs, summary = measured(str(make_folder(Path(name)).parent), quick=options.quick)
    finish("faults", [cost.row() for cost in costs], summary, options.json)
    missed = [cost for cost in costs if not cost.met]
    print(f"{len(costs) - len(missed)} of {len(costs)} goals met" + "".join(f"; {one.name} is {one.value:.3g}" for one in missed))


if __name__ == "__main__":
    main()
