"""How long is a step of each system of `benchmarks.methods`, beside one of LoRA of rank 8 on every linear?

    python -m benchmarks.method_speed [--quick] [--json FILE]

All are trainings of SmolLM2-135M-Instruct on one rank with one thread, in bfloat16, with 512 tokens a step and with the systems' settings
of `benchmarks.methods`; no bytes are sent. One process holds all of them and takes a step of one after the other (`benchmarks.ratios`).
`methods` records tokens a second, too, but over hours in which the machine does not stay the same. The goal: a step of ALLoRA takes at
most 1.05 of LoRA's.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.method_cases import METHODS, TASKS
from benchmarks.paired_steps import alternating
from benchmarks.ratios import LEAST_PAIRS, Budget, of_times, reached
from benchmarks.report import arguments, finish
from benchmarks.whole_run import FIVE_TASKS, ONE_PROCESS
from hecate.data.files.synthetic_tasks import write_tasks

BESIDE = "lora_r8"
NAMES = (BESIDE, "allora", "ffa_lora", "mos", "nola", "mola_5555", "smora", "llava_mole", "mixlora")
GOAL = 1.05
"""the most that a step of ALLoRA may take of LoRA's"""
ENOUGH = Budget(half_width=0.02, rounds=50)
SETTINGS = {
    "data.eval": "[]",
    "data.seq_len": "256",
    "eval.generate": "false",
    "fssdp.policy": "full",
    "micro_batch_size": "2",
    "model.dtype": "bfloat16",
}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    names, budget = (NAMES[:2], Budget(ENOUGH.half_width, 2)) if options.quick else (NAMES, ENOUGH)
    os.environ |= ONE_PROCESS
    methods = {method.name: method for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder, "data", "quickstart"), TASKS, train_size=400, eval_size=1, seed=0)
        text = FIVE_TASKS.read_text(encoding="utf-8").replace("data/quickstart", f"{folder}/data/quickstart")
        Path(folder, "config.yaml").write_text(text, encoding="utf-8")
        sides = {name: {**SETTINGS, **methods[name].settings} for name in names}
        taken = alternating(1, folder, sides, [(name, BESIDE) for name in names[1:]], budget)
    ratio = {name: of_times(taken[name].clock, taken[BESIDE].clock, budget) for name in names[1:]}
    rows: list[dict[str, Any]] = [{"system": name, "step_seconds": median(one.clock), "all": one.clock} for name, one in taken.items()]
    finish("method_speed", rows, {f"{name} / {BESIDE}": one for name, one in ratio.items()}, options.json)
    goal = ratio["allora"]
    verdict = "not decided" if goal.pairs < LEAST_PAIRS else reached(goal.low, goal.high, at_most=GOAL)
    print(f"allora: a step takes at most {GOAL} of LoRA's: {verdict}")


if __name__ == "__main__":
    main()
