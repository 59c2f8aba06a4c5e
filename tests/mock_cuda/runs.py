"""Run small trainings on mock GPUs, each rank in a process of its own, and the same ones on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

    def losses(self, name: str) -> list[tuple[float, float, float]]:
        """(loss, load-balancing loss, norm of the gradients) of each step of a run."""
        records = map(json.loads, Path(self.folder, name, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [(record["loss"], record["aux_loss"], record["grad_norm"]) for record in records if record["kind"] == "step"]

    def log(self, rank: int) -> str:
        """What a rank printed in all its runs."""
        return Path(self.folder, f"rank{rank}.log").read_text(encoding="utf-8")

    def steps(self, name: str, rank: int) -> list[dict[str, Any]]:
        """What a mock rank has noted of a run's later steps; see `tests.mock_cuda.rank`."""
        found: list[dict[str, Any]] = json.loads(Path(self.folder, f"{name}.rank{rank}.json").read_text(encoding="utf-8"))
        return found


def do(runs: Runs) -> Runs:
    """Train all runs to their ends."""
    folder = Path(runs.folder)
    folder.mkdir(parents=True)
    program = folder / "runs.json"
    program.write_text(json.dumps(asdict(runs)), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "1"}
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
        status = process.wait()
        output.seek(0)
        text = output.read()
        output.close()
        if status:
            failed.append(f"rank {rank}, status {status}:\n{text[-3000:]}")
    assert not failed, "\n".join(failed)
    return runs
