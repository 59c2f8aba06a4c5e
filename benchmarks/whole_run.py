"""Run a command of `hecate` to its end in a process of its own, and say what it and all its ranks used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.launch.local_launcher import RANK_SETTINGS

ROOT = Path(__file__).resolve().parent.parent
FIVE_TASKS = ROOT / "benchmarks" / "five_tasks.yaml"
"""the configuration of which benchmarks of systems change some settings"""

ONE_PROCESS: Mapping[str, str] = {**RANK_SETTINGS, "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "65536"}
"""the environment of a process that holds several trainings; oneDNN keeps as many kernels of each as in a process of its own"""


@dataclass(frozen=True)
class Done:
    """What a command printed, and what it took with its start and its end."""

    text: str
    seconds: float
    processor_seconds: float
    """of all processes together"""
    peak_megabytes: float
    """largest resident memory of a process"""


@dataclass(frozen=True)
class WholeRun:
    """What a training left in metrics.jsonl, and what it took with its start and its end."""

    records: list[dict[str, Any]]
    seconds: float
    processor_seconds: float
    """of all processes together"""
    peak_megabytes: float
    """largest resident memory of a process"""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def hecate(words: Sequence[str], folder: Path) -> Done:
    """Run `hecate` with these words in `folder`, each process with one thread.

    Raises:
        SystemExit: it has failed; its text is the end of what it printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with (folder / "log.txt").open("w+b") as log:
        # Waited for by hand: wait4 says what this program and those that it started have used.
        process = subprocess.Popen(
            [sys.executable, "-m", "hecate", *words], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read().decode(errors="replace")
    if process.returncode:
        sys.exit(f"{' '.join(words)[:300]} has failed\n{text[-2000:]}")
    return Done(text, time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def train(config: Path, settings: Mapping[str, object], folder: Path) -> WholeRun:
    """Train with one thread a rank. Paths in the configuration start from `folder`.

    Args:
        settings: values of dotted keys; `output_dir` is one of them.

    Raises:
        SystemExit: the training has failed; its text is the end of what it printed.
    """
    done = hecate(["train", str(config), *(f"{key}={value}" for key, value in settings.items())], folder)
    lines = (folder / str(settings["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return WholeRun(list(map(json.loads, lines)), done.seconds, done.processor_seconds, done.peak_megabytes)
