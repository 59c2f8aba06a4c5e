"""How long is a step of each system of `benchmarks.methods`, beside one of LoRA of rank 8 on every linear?

    python -m benchmarks.method_speed [--quick] [--json FILE]

All runs are `hecate train` of SmolLM2-135M-Instruct on one rank with one thread, in bfloat16, with 512 tokens a step and with the
systems' settings of `benchmarks.methods`; no bytes are sent. Runs of a few steps take turns (`benchmarks.ratios`). A run's sample is the
first quartile of its steps' seconds, because what else runs on a shared machine only ever slows a step down. `methods` records tokens a
second, too, but over hours in which the machine does not stay the same. The goal: a step of ALLoRA takes at most 1.05 of LoRA's.
"""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.method_cases import METHODS, TASKS, Method
from benchmarks.ratios import Budget, of_times, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.whole_run import FIVE_TASKS, train
from hecate.data.synthetic_tasks import write_tasks

BESIDE = "lora_r8"
NAMES = (BESIDE, "allora", "ffa_lora", "mos", "nola", "mola_5555", "smora", "llava_mole", "mixlora")
GOAL = 1.05
"""the most that a step of ALLoRA may take of LoRA's"""
ENOUGH = Budget(half_width=0.02, rounds=30)
SETTINGS = {
    "data.eval": "[]",
    "data.seq_len": "256",
    "eval.generate": "false",
    "fssdp.policy": "full",
    "micro_batch_size": "2",
    "model.dtype": "bfloat16",
    "nproc": "1",
}


def step_seconds(method: Method, steps: int, output: Path, folder: Path) -> float:
    """The first quartile of the seconds of a training's steps, but for the first two.

    Raises:
        SystemExit: the training has failed.
    """
    given = {**SETTINGS, "max_steps": steps, "output_dir": output, **method.settings}
    taken = train(FIVE_TASKS, given, folder).of_kind("step")[2:]
    return quantiles([step["step_seconds"] for step in taken], n=4)[0]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    steps, names, budget = (4, NAMES[:2], Budget(ENOUGH.half_width, 2)) if options.quick else (8, NAMES, ENOUGH)
    methods = {method.name: method for method in METHODS}
    numbers = count()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_tasks(folder / "data" / "quickstart", TASKS, train_size=400, eval_size=1, seed=0)

        def seconds_of(name: str) -> float:
            return step_seconds(methods[name], steps, folder / "runs" / f"{name}-{next(numbers)}", folder)

        seconds = until_narrow(seconds_of, names, [(name, BESIDE) for name in names[1:]], budget)
    ratio = {name: of_times(seconds[name], seconds[BESIDE], budget) for name in names[1:]}
    rows: list[dict[str, Any]] = [{"system": name, "step_seconds": median(values), "all": values} for name, values in seconds.items()]
    finish("method_speed", rows, {f"{name} / {BESIDE}": one for name, one in ratio.items()}, options.json)
    verdict = "met" if ratio["allora"].high <= GOAL else "missed" if ratio["allora"].low > GOAL else "not decided"
    print(f"allora: a step takes at most {GOAL} of LoRA's: {verdict}")


if __name__ == "__main__":
    main()
