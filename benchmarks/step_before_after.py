"""Compare a training step of this checkout with one of another checkout, on one CPU thread: the small MixLoRA of `benchmarks.train_step`.

Both sides run in processes of their own, in alternating rounds, and each side's figure is its fastest step, because what else runs on a
shared machine only ever slows a step down. The frozen model's own passes, which no checkout of ours computes, say how quiet it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, finish
from benchmarks.train_step import make_inputs
from hecate.launch.local_launcher import ALLOCATOR_SETTINGS

CASES = {"dropout": ("0.05", "0"), "no dropout": ("1e-9", "0"), "dropout, recomputed": ("0.05", "1")}
"""name -> the arguments of `benchmarks.train_step --ours`: dropout, and whether layers are recomputed"""
STEPS, WARM_UP = 6, 2


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    options = parser.parse_args()
    checkouts = {"this": Path(__file__).resolve().parent.parent, "other": options.other.resolve()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for case, given in CASES.items():
            fastest: dict[str, list[float]] = {side: [] for side in checkouts}
            frozen: dict[str, list[float]] = {side: [] for side in checkouts}
            for number in range(1 if options.quick else 4):
                for side in sorted(checkouts, reverse=bool(number % 2)):
                    found = _run(checkouts[side], Path(name), given)
                    fastest[side] += found["step_seconds"]
                    frozen[side] += found["base_seconds"]
            rows.append(
                {
                    "case": case,
                    "this_over_other": min(fastest["this"]) / min(fastest["other"]),
                    "frozen_model_this_over_other": min(frozen["this"]) / min(frozen["other"]),
                    "this_over_frozen_model": min(fastest["this"]) / min(frozen["this"]),
                }
            )
    finish("step_before_after", rows, {f"{row['case']}: this_over_other": row["this_over_other"] for row in rows}, options.json)


def _run(checkout: Path, folder: Path, given: tuple[str, str]) -> dict[str, Any]:
    out = folder / "out.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--ours", str(folder), str(out), str(STEPS), str(WARM_UP), *given]
    environment = {**os.environ, **ALLOCATOR_SETTINGS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    subprocess.run(command, check=True, env=environment, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    main()
