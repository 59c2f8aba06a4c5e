"""Does this checkout train as another does, bit for bit? Small runs of both on this machine, compared step by step and tensor by tensor.

    python -m benchmarks.same_training OTHER_CHECKOUT [--quick] [--only NAME,...] [--keep FOLDER] [--reuse FOLDER] [--json FILE]

Each run (`same_training_cases.RUNS`) is a `hecate train` of a few steps, on one to four ranks over gloo, started in each checkout as a user
would start it; both checkouts run at once, with one thread a rank. Compared are every step's loss, balance loss, gradient norm, learning
rate and number of tokens, the held-out losses, all tensors of the last checkpoint (parameters and AdamW's moments) and all tensors of
the exported adapter or model. Exit status 1: something differs, or a run failed or did not do what it is there for.

What equality shows: on this machine's CPU, both checkouts compute the same numbers in the same order, for the kinds of experts,
policies, plans, ways of travelling and changes of ranks of those runs. What it does not show: anything of a GPU, its kernels or bfloat16;
speed or memory; command lines, texts and files other than those named; larger models, where plans and block sizes may be others;
what either does with a mistake. `plans` says whether both also sent the same bytes at the same imbalance in every step: better plans
may differ there, and still leave losses equal only by luck.

With `--keep FOLDER` models, data and all that the runs leave stay in that folder. `--reuse FOLDER`, of such an earlier call on this
machine, saves half of the time: the other checkout's results are read from it where that is at the same commit as then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.report import arguments, finish
from benchmarks.same_training_cases import RUNS, Records, Training, description, environment_of, make_folder

SPELLINGS: tuple[dict[str, str], ...] = ({},)
"""Settings that checkouts spell in different ways, the newest way first: each dict maps a setting of `RUNS` to what stands in its place. A
checkout that refuses a run's settings (exit status 2) is tried with the next dict."""
TENSOR_NAMES: tuple[tuple[str, str], ...] = ()
"""(old part of a tensor's name, new part): names of both checkouts are compared with old parts replaced"""
METRICS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "aux_loss": ("aux_loss",),
    "grad_norm": ("grad_norm",),
    "learning_rate": ("learning_rate",),
    "tokens": ("tokens",),
    "loads": ("loads",),
    "calibrations": ("calibrations",),
    "bytes_sent": ("bytes_sent",),
    "imbalance": ("imbalance",),
}
"""key of a step in this program -> the keys that checkouts have in metrics.jsonl for it"""
COMPARED = ("loss", "aux_loss", "grad_norm", "learning_rate", "tokens", "loads")
PLANNED = ("bytes_sent", "imbalance", "calibrations")
"""of the plans, not of the result: said, but no failure"""
_SECONDS = 900
"""that a run may take; the first one in a fresh checkout compiles the planner's loops"""
_REFUSED = 2
"""exit status for a setting that the checkout does not have"""
ROOT = Path(__file__).resolve().parent.parent


class Failure(Exception):
    """A run has not come to its end, or has not done what it is there for."""


@dataclass(frozen=True)
class Trained:
    """What one checkout's run has left."""

    records: Records
    tensors: Mapping[str, Tensor]
    seconds: float


@dataclass(frozen=True)
class Difference:
    """How two runs differ."""

    first_step: int | None
    """whose metrics differ; None: in no step"""
    tensors: tuple[str, ...]
    """names of those that are not the same to the bit, or that one side lacks"""
    largest: float
    """of |here - there| over all elements; infinite if a tensor is missing, or of another type or shape"""
    same_plans: bool

    @property
    def is_none(self) -> bool:
        return self.first_step is None and not self.tensors


def compare(here: Trained, there: Trained) -> Difference:
    """Everything of `Trained` but the seconds."""
    different, largest = [], 0.0
    for name in sorted({*here.tensors, *there.tensors}):
        distance = distance_of(here.tensors.get(name), there.tensors.get(name))
        if distance is not None:
            different.append(name)
            largest = max(largest, distance)
    return Difference(_first_step(here, there, COMPARED), tuple(different), largest, _first_step(here, there, PLANNED) is None)


def distance_of(a: Tensor | None, b: Tensor | None) -> float | None:
    """None: the same bytes. Else the largest difference of an element: 0 for zeros of two signs, infinity if they cannot be subtracted."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return math.inf
    if torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
        return None
    distance = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(distance) else distance


def _first_step(here: Trained, there: Trained, keys: Sequence[str]) -> int | None:
    """The first step whose records differ in `keys`, or that one side lacks. With `COMPARED`, evaluations count, too."""
    a, b = (_by_step(side.records, keys) for side in (here, there))
    return next((step for step in sorted({*a, *b}) if a.get(step) != b.get(step)), None)


def _by_step(records: Records, keys: Sequence[str]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for record in records:
        if record["kind"] == "step":
            found.setdefault(record["step"], []).append([record[key] for key in keys])
        elif record["kind"] == "eval" and keys is COMPARED:
            sources = record["sources"].items()  # an earlier state of the code records no answers
            numbers = {name: {key: value for key, value in scores.items() if key != "answers"} for name, scores in sources}
            found.setdefault(record["step"], []).append(numbers)
    return found


def read_trained(folder: Path, seconds: float = 0.0) -> Trained:
    """What stands in a run's folder. Raises Failure if there is no checkpoint, or no metrics."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    if not checkpoints or not (folder / "metrics.jsonl").is_file():
        raise Failure(f"no checkpoint or no metrics.jsonl in {folder}")
    tensors: dict[str, Tensor] = {}
    for part in (checkpoints[-1], folder / "adapter", folder / "model"):
        for path in sorted(part.glob("*.safetensors")):
            where = "" if part == checkpoints[-1] else f"{part.name}:"
            tensors |= {where + _canonical(name): tensor for name, tensor in load_file(path).items()}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained([_with_our_keys(json.loads(line)) for line in lines], tensors, seconds)


def _canonical(name: str) -> str:
    for old, new in TENSOR_NAMES:
        name = name.replace(old, new)
    return name


def _with_our_keys(record: dict[str, Any]) -> dict[str, Any]:
    if record["kind"] != "step":
        return record
    ours = {key: next((record[name] for name in names if name in record), None) for key, names in METRICS.items()}
    return {"kind": "step", "step": record["step"], **ours}


def train(training: Training, checkout: Path, folder: Path, output: Path) -> Trained:
    """Do a run in `checkout`, and see that it did what it is there for. Raises Failure."""
    started = time.monotonic()
    settings = _run(training, checkout, folder, output)
    if training.resumes_at is not None:
        whole = read_trained(output)
        _take_back(output, training.resumes_at)
        _hecate(checkout, [str(folder / "config.yaml"), *settings, "resume=true"], {}, output.with_suffix(".log"))
    found = read_trained(output, time.monotonic() - started)
    if training.resumes_at is not None and not compare(found, whole).is_none:
        raise Failure("the resumed run is another than the one that went on")
    shards = len(list(_last_checkpoint(output).glob("*.safetensors")))
    if training.shards is not None and shards != training.shards:
        raise Failure(f"the last checkpoint is of {shards} ranks, not {training.shards}")
    if training.shows is not None and not training.shows(found.records):
        raise Failure(f"nothing to be seen of: {training.shows.__name__}")
    return found


def _run(training: Training, checkout: Path, folder: Path, output: Path) -> list[str]:
    """Returns the settings in the checkout's spelling."""
    hooks, log = folder / "hooks", output.with_suffix(".log")
    extra = environment_of(training, hooks, output.with_suffix(".killed"))
    for spelling in SPELLINGS:
        settings = [spelling.get(setting, setting).format(folder=folder) for setting in training.settings]
        settings.append(f"output_dir={output}")
        status = _hecate(checkout, [str(folder / "config.yaml"), *settings], extra, log, may_refuse=spelling is not SPELLINGS[-1])
        if status == 0:
            return settings
    raise AssertionError("the last spelling is refused by an exception")


def _hecate(checkout: Path, arguments: Sequence[str], extra: Mapping[str, str], log: Path, *, may_refuse: bool = False) -> int:
    """Exit status of `hecate train` in a checkout, whose text goes to `log`. Raises Failure if it is not 0, or 2 with `may_refuse`."""
    paths = [*([extra["PYTHONPATH"]] if "PYTHONPATH" in extra else []), str(checkout)]
    environment = {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hecate", "train", *arguments]
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            if process.poll() is None:  # its ranks die with it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status == 0 or (status == _REFUSED and may_refuse):
        return status
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    raise Failure(f"exit status {status}: {' '.join(command)}\n    " + "\n    ".join(said))


def _last_checkpoint(output: Path) -> Path:
    return max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def _take_back(output: Path, step: int) -> None:
    """As if the run had been killed after its checkpoint of `step`."""
    for path in output.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    for name in ("adapter", "model"):
        shutil.rmtree(output / name, ignore_errors=True)


@dataclass(frozen=True)
class Workshop:
    """Where the runs find their models and data, and leave what they write."""

    made: Path
    """filled by `make_folder`"""
    runs: Path
    reused: Path | None
    """the runs of an earlier call, over the same models and data"""


def row_of(training: Training, checkouts: Sequence[Path], workshop: Workshop) -> dict[str, Any]:
    """Both checkouts' runs and what came of them, as one row of the table."""
    row: dict[str, Any] = {"run": training.name, "result": "failed", "tensors": 0, "different": 0, "largest": 0.0, "first_step": "-"}
    row |= {"plans": "-", "here_s": math.nan, "there_s": math.nan, "names": []}
    runs = workshop.runs / training.name
    runs.mkdir(parents=True)

    def one(side: str, checkout: Path) -> Trained | Failure:
        commit = commit_of(checkout)
        try:
            if side == "there" and workshop.reused and _is_of(workshop.reused / training.name / side, commit):
                return read_trained(workshop.reused / training.name / side, seconds=0.0)
            trained = train(training, checkout, workshop.made, runs / side)
        except Failure as failure:
            return failure
        (runs / f"{side}.commit").write_text(commit, encoding="utf-8")
        return trained

    with ThreadPoolExecutor(2) as pool:
        here, there = pool.map(one, ("here", "there"), checkouts)
    for side, found in (("here", here), ("there", there)):
        if isinstance(found, Failure):
            print(f"{training.name}, {side}: {found}", file=sys.stderr)
        else:
            row[f"{side}_s"] = found.seconds
    if isinstance(here, Failure) or isinstance(there, Failure):
        return row
    difference = compare(here, there)
    row["result"] = "equal" if difference.is_none else "DIFFERENT"
    row["tensors"], row["different"] = len({*here.tensors, *there.tensors}), len(difference.tensors)
    row["largest"], row["names"] = difference.largest, list(difference.tensors[:20])
    row["first_step"] = "-" if difference.first_step is None else difference.first_step
    row["plans"] = "same" if difference.same_plans else "other"
    return row


def _is_of(output: Path, commit: str) -> bool:
    """Was `output` left by a run of that commit, which came to its end?"""
    note = output.with_suffix(".commit")
    return note.is_file() and note.read_text(encoding="utf-8") == commit


def commit_of(checkout: Path) -> str:
    """Its commit, or a text that is never the same again if files were changed since, or if it has none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--match=", "--dirty"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    text = done.stdout.strip()
    return text if done.returncode == 0 and not text.endswith("-dirty") else secrets.token_hex(8)


def check_checkout(checkout: Path) -> None:
    """Raises SystemExit if `python -m hecate` there would run other code."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", "import hecate; print(hecate.__file__)"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not Path(done.stdout.strip()).resolve().is_relative_to(checkout):
        raise SystemExit(f"same_training: {checkout}: is no checkout whose hecate can be imported: {done.stdout}{done.stderr}")


def chosen(options: argparse.Namespace) -> list[Training]:
    names = options.only.split(",") if options.only else [run.name for run in RUNS if run.quick or not options.quick]
    by_name = {run.name: run for run in RUNS}
    if unknown := [name for name in names if name not in by_name]:
        raise SystemExit(f"same_training: --only: no run {unknown[0]}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="the checkout to compare with")
    parser.add_argument("--only", metavar="NAME,...", help="these runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder and leave it")
    parser.add_argument("--reuse", type=Path, metavar="FOLDER", help="take the other checkout's results from what --keep has left")
    options = parser.parse_args()
    trainings = chosen(options)
    checkouts = (ROOT, options.other.resolve())
    for checkout in checkouts:
        check_checkout(checkout)
    rows = []
    with tempfile.TemporaryDirectory(prefix="same_training-") as temporary:
        folder = options.keep.resolve() if options.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=not options.keep)
        reused = options.reuse.resolve() if options.reuse else None
        if reused and (reused / "description").read_text(encoding="utf-8") != description():
            raise SystemExit(f"same_training: --reuse: {reused} is of other runs than today's: make it anew with --keep")
        workshop = Workshop(reused or folder, folder / "runs", reused / "runs" if reused else None)
        if not reused:
            make_folder(folder)
        for training in trainings:
            rows.append(row_of(training, checkouts, workshop))
            print(f"{training.name}: {rows[-1]['result']}", file=sys.stderr, flush=True)
    counts = {result: float(sum(row["result"] == result for row in rows)) for result in ("equal", "DIFFERENT", "failed")}
    finish("same_training", rows, {key.lower(): number for key, number in counts.items()}, options.json)
    sys.exit(counts["equal"] < len(rows))


if __name__ == "__main__":
    main()
