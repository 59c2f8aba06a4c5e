"""How do the systems of the field compare on the same data: held-out loss, exact answers, parameters, bytes sent, speed and memory?

    python -m benchmarks.methods [--quick] [--resume] [--only NAME,...] [--most N] [--tables] [--json FILE]

Each run (`method_cases.METHODS`) is a `hecate train` of SmolLM2-135M-Instruct on two ranks of this machine, in bfloat16 with one thread
each, on five small tasks of reasoning-gym; all see the same samples in the same order. One table is of 64 steps, each of two sequences
of 256 tokens, one of 400 steps of two sequences of 128, both over three seeds. Each run is written to the file
(benchmarks/results/methods.json) as soon as it is through: a call with `--resume` goes on with the runs that are missing, the first seed's
before the second's and short ones before long ones, and `--most` ends it after some. A call without it begins anew. `--tables` trains
nothing. The complete recording takes about twelve hours on two idle cores.

Experts are materialized on both ranks in every step (`fssdp.policy: full`), so that bytes sent are those of one gather and one reduction.
Tokens a second are the median step's, on a machine that others may use, too; tokens a processor second are not troubled by that.
What is shown is a comparison at this size and this number of steps, with one or two learning rates a system; it does not show what any
system could reach with rates of its own, with more steps, or with larger models.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from benchmarks import whole_run
from benchmarks.method_cases import EXACT, GOALS, LONG, METHODS, SEEDS, SHORT, TASKS, Method, Run, Runs
from benchmarks.report import arguments, commit, machine
from hecate.data.files.synthetic_tasks import write_tasks

RESULTS = whole_run.ROOT / "benchmarks" / "results" / "methods.json"


@dataclass(frozen=True)
class Size:
    """How much a run trains and evaluates."""

    steps: int
    seq_len: int
    eval_samples: int
    """of each task"""


SIZES = {SHORT: Size(SHORT, 256, 50), LONG: Size(LONG, 128, 50)}
QUICK = Size(3, 256, 4)


def wanted(names: Sequence[str], *, quick: bool) -> Iterator[tuple[Method, int, Size]]:
    """The runs of a recording as (method, seed, size), in the order in which they are done."""
    for steps in (SHORT,) if quick else (SHORT, LONG):
        for seed in SEEDS[:1] if quick else SEEDS:
            for method in METHODS:
                if steps in method.steps and (not names or method.name in names):
                    yield method, seed, QUICK if quick else SIZES[steps]


def train(method: Method, seed: int, size: Size, folder: Path) -> Run:
    """One training in `folder`, which holds the tasks in data/quickstart.

    Raises:
        SystemExit: the training has failed.
    """
    output = folder / "runs" / f"{method.name}-{seed}-{size.steps}"
    settings = {
        "seed": seed,
        "max_steps": size.steps,
        "data.seq_len": size.seq_len,
        "output_dir": output,
        "nproc": 2,
        "model.dtype": "bfloat16",
        "fssdp.policy": "full",
        "eval.on_start": "false",
        "eval.max_samples": size.eval_samples,
        **method.settings,
    }
    run = whole_run.train(whole_run.FIVE_TASKS, settings, folder)
    steps, scores = run.of_kind("step"), run.of_kind("eval")[-1]["sources"]
    return Run(
        method=method.name,
        seed=seed,
        steps=size.steps,
        parameters=json.loads((output / "trainable.json").read_text(encoding="utf-8"))["parameters"],
        loss=fmean(scores[task]["loss"] for task in TASKS),
        accuracy={task: scores[task]["accuracy"] for task in TASKS},
        tokens_per_second=median(step["tokens_per_s"] for step in steps),
        tokens_per_processor_second=sum(step["tokens"] for step in steps) / run.processor_seconds,
        bytes_per_step=median(step["bytes_sent"] for step in steps),
        peak_megabytes=run.peak_megabytes,
        load_spread=load_spread([step["loads"] for step in steps[-max(len(steps) // 4, 1) :]]),
        commit=commit(),
    )


def load_spread(loads: Sequence[dict[str, list[int]]]) -> float:
    """See `Run.load_spread`.

    Args:
        loads: of some steps: unit -> assignments of each expert.
    """
    spreads = []
    for unit in loads[0]:
        sums = [sum(of_step[unit][expert] for of_step in loads) for expert in range(len(loads[0][unit]))]
        spreads.append(pstdev(sums) / fmean(sums) if sum(sums) else 0.0)
    return fmean(spreads)


def by_method(runs: Sequence[Run]) -> Runs:
    found: dict[tuple[str, int], dict[int, Run]] = {}
    for run in runs:
        found.setdefault((run.method, run.steps), {})[run.seed] = run
    return found


def tables(runs: Sequence[Run]) -> str:
    """A table for each number of steps, means over seeds with the spread of exact answers, and the goals."""
    lines, found = [], by_method(runs)
    for steps in sorted({run.steps for run in runs}):
        lines += [f"{steps} steps", f"{'system':16}{'seeds':>6}{'parameters':>12}{'loss':>8}{'exact':>8}{'+-':>7}" + "".join(
            f"{task[:12]:>13}" for task in TASKS
        ) + f"{'tokens/s':>10}{'/proc. s':>10}{'MB/step':>9}{'peak MB':>9}{'loads':>7}"]  # fmt: skip
        for method in METHODS:
            of_seeds = list(found.get((method.name, steps), {}).values())
            if of_seeds:
                lines.append(_row(method.name, of_seeds))
        lines.append("")
    width = max(len(goal.system) for goal in GOALS)
    lines += [f"{goal.system:{width}}  {goal.text} ({goal.steps} steps): {goal.verdict(found)}" for goal in GOALS]
    return "\n".join(lines)


def _row(name: str, runs: Sequence[Run]) -> str:
    exact, spread = EXACT.mean_and_spread({run.seed: run for run in runs})
    return (
        f"{name:16}{len(runs):6}{runs[0].parameters:12}{fmean(run.loss for run in runs):8.4f}{exact / 100:8.3f}{spread / 100:7.3f}"
        + "".join(f"{fmean(run.accuracy[task] for run in runs):13.3f}" for task in TASKS)
        + f"{fmean(run.tokens_per_second for run in runs):10.0f}{fmean(run.tokens_per_processor_second for run in runs):10.1f}"
        + f"{fmean(run.bytes_per_step for run in runs) / 1e6:9.2f}{max(run.peak_megabytes for run in runs):9.0f}"
        + f"{fmean(run.load_spread for run in runs):7.2f}"
    )


def read(path: Path) -> list[Run]:
    """The runs of a recording; none where there is no file."""
    return [Run(**row) for row in json.loads(path.read_text(encoding="utf-8"))["runs"]] if path.exists() else []


def _write(path: Path, runs: Sequence[Run], environment: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"name": "methods", "machine": environment, "runs": [asdict(run) for run in runs]}
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file has, and do those that it lacks")
    parser.add_argument("--only", default="", help="names of systems, separated by commas")
    parser.add_argument("--most", type=int, help="end after so many runs")
    parser.add_argument("--tables", action="store_true", help="train nothing; show what the file has")
    given = parser.parse_args()
    path = given.json or (Path(tempfile.gettempdir()) / "methods-quick.json" if given.quick else RESULTS)
    runs = read(path) if given.resume or given.tables else []
    names = [name for name in given.only.split(",") if name]
    if unknown := sorted(set(names) - {method.name for method in METHODS}):
        sys.exit(f"--only: unknown: {', '.join(unknown)}\n  known: {', '.join(method.name for method in METHODS)}")
    done = {(run.method, run.seed, run.steps) for run in runs}
    todo = [run for run in wanted(names, quick=given.quick) if (run[0].name, run[1], run[2].steps) not in done]
    environment = machine()
    for method, seed, size in [] if given.tables else todo[: given.most]:
        with tempfile.TemporaryDirectory() as folder:
            write_tasks(Path(folder) / "data" / "quickstart", TASKS, train_size=2000, eval_size=50, seed=0)
            runs.append(train(method, seed, size, Path(folder)))
        _write(path, runs, environment)
        print(f"{method.name}, seed {seed}, {size.steps} steps: loss {runs[-1].loss:.4f}, exact {runs[-1].exact:.3f}", flush=True)
    if runs:
        print(tables(runs))


if __name__ == "__main__":
    main()
