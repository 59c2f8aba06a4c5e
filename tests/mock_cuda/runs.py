"""Run small trainings on mock GPUs or real ones, each rank in a process of its own, and the same ones on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Runs:
    """Trainings that some ranks do one after the other."""

    config: str
    folder: str
    """where each run has a folder of its own"""
    world: int
    mock: bool
    overrides: Mapping[str, Sequence[str]]
    """of each run, by its name"""
    asked: Sequence[str] = ()
    """names of the runs whose adapter or model is evaluated again, and answers a question, when it is written; one rank only"""
    seconds: int = 280
    """that a rank may take for all runs"""
    unwatched: int = 2
    """steps of which nothing is noted: the first ones make what later ones find"""
    gpu: bool = False
    """without `mock`: on the machine's GPUs, not on its CPU"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """variables of the ranks' processes"""

    def losses(self, name: str) -> list[tuple[float, float, float]]:
        """(loss, load-balancing loss, norm of the gradients) of each step of a run."""
        return [(record["loss"], record["aux_loss"], record["grad_norm"]) for record in self.records(name, "step")]

    def evaluations(self, name: str) -> list[dict[str, dict[str, Any]]]:
        """The numbers of each source in each evaluation of a run."""
        return [
            {source: {key: value for key, value in scores.items() if key != "answers"} for source, scores in record["sources"].items()}
            for record in self.records(name, "eval")
        ]

    def records(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Of one kind, from the metrics of a run."""
        lines = Path(self.folder, name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def exported(self, name: str) -> dict[str, Tensor]:
        """All tensors of the adapters or the model that a run has written; those of several adapters as FOLDER/NAME."""
        files = [path for part in ("adapter", "model") for path in Path(self.folder, name, part).glob("*.safetensors")]
        of_sources = list(Path(self.folder, name, "adapters").glob("*/*.safetensors"))
        assert files or of_sources, f"{name} has written no adapter and no model"
        named = {tensor: value for path in files for tensor, value in load_file(path).items()}
        return named | {f"{path.parent.name}/{tensor}": value for path in of_sources for tensor, value in load_file(path).items()}

    def answered(self, name: str) -> dict[str, str]:
        """What the adapter or the model of one of `asked` answered, and what its evaluation printed."""
        found: dict[str, str] = json.loads(Path(self.folder, f"{name}.answered.json").read_text(encoding="utf-8"))
        return found

    def log(self, rank: int) -> str:
        """What a rank printed in all its runs."""
        return Path(self.folder, f"rank{rank}.log").read_text(encoding="utf-8")

    def steps(self, name: str, rank: int) -> list[dict[str, Any]]:
        """What a mock rank has noted of a run's later steps; see `tests.mock_cuda.rank`."""
        found: list[dict[str, Any]] = json.loads(Path(self.folder, f"{name}.rank{rank}.json").read_text(encoding="utf-8"))
        return found


def do(runs: Runs, begun: Runs | None = None) -> Runs:
    """Train all runs to their ends.

    Args:
        begun: runs of the same names, whose output folders are copied, so that `resume=true` goes on from their checkpoints.
    """
    folder = Path(runs.folder)
    folder.mkdir(parents=True)
    for name in runs.overrides if begun else ():
        shutil.copytree(Path(begun.folder, name), folder / name, ignore=shutil.ignore_patterns("adapter", "model"))
    program = folder / "runs.json"
    program.write_text(json.dumps(asdict(runs)), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "0" if runs.gpu else "1"}
    if not runs.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # no run of the CPU may find a GPU
    environment |= runs.environment
    outputs = [(folder / f"rank{rank}.log").open("w+", encoding="utf-8") for rank in range(runs.world)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.mock_cuda.rank", str(program), str(rank)],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    failed = []
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        status = _wait(process, runs.seconds + 30)
        output.seek(0)
        text = output.read()
        output.close()
        if status:
            failed.append(f"rank {rank}, status {status}:\n{text[-3000:]}")
    assert not failed, "\n".join(failed)
    return runs


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Exit status; a process that does not end in time, though it was to end itself before, is killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
