"""Compare a training step of this checkout with one of another checkout, on one CPU thread: the small MixLoRA of `benchmarks.train_step`.

Each side runs in a process of its own, and they take turns step by step. The other checkout has to have `benchmarks.handover`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ratios import Budget, of_times, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.train_step import WARM_UP, frozen_worker, make_inputs, our_worker

CASES = {"dropout": (0.05, False), "no dropout": (1e-9, False), "dropout, recomputed": (0.05, True)}
"""name -> dropout, and whether layers are recomputed"""
THIS, OTHER, FROZEN = "this", "other", "frozen model"
ENOUGH = Budget(half_width=0.01, rounds=100)


def case_seconds(folder: Path, other: Path, dropout: float, recompute: bool, budget: Budget) -> dict[str, list[float]]:
    """The seconds of the steps of both checkouts, and of passes through the frozen model by this one."""
    out = Path(os.devnull)
    with (
        our_worker(folder, out, dropout, recompute) as mine,
        our_worker(folder, out, dropout, recompute, other) as theirs,
        frozen_worker(folder) as frozen,
    ):
        workers = {THIS: mine, OTHER: theirs, FROZEN: frozen}
        for worker in workers.values():
            for _ in range(WARM_UP):
                worker.step()
        return until_narrow(lambda side: workers[side].step(), list(workers), [(THIS, OTHER)], budget)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    options = parser.parse_args()
    budget = Budget(ENOUGH.half_width, 4) if options.quick else ENOUGH
    rows: list[dict[str, Any]] = []
    summary = {}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for case, (dropout, recompute) in CASES.items():
            seconds = case_seconds(Path(name), options.other.resolve(), dropout, recompute, budget)
            summary[f"{case}: this_over_other"] = of_times(seconds[THIS], seconds[OTHER], budget)
            frozen = of_times(seconds[THIS], seconds[FROZEN], budget).value
            rows.append({"case": case, "this_over_frozen_model": frozen, **{f"{side}_s": found for side, found in seconds.items()}})
    finish("step_before_after", rows, summary, options.json)


if __name__ == "__main__":
    main()
