"""Start functions on several ranks, and whole runs under the local launcher, and say what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecate.apps.check.drill.armed import Injected, to_text
from hecate.apps.check.drill.launchers import Launcher, LaunchRequest
from hecate.apps.check.drill.outcome import Scope, TooSlow
from hecate.apps.check.drill.program import name_of
from hecate.checkpoint import committed, read_manifest
from hecate.checkpoint.shard import read_tensors
from hecate.io.python_module import RUN_MODULE
from hecate.ranks.launcher_files import STORE_VARIABLE

DETERMINISTIC: tuple[str, ...] = ("deterministic=true",)
"""the setting with which a run has the same bits at every number of ranks"""
TOLERANCE = 0.0 if DETERMINISTIC else 1e-10
"""by how much results at other numbers of ranks may differ"""
OVERRIDES = (
    "model.dtype=float64",
    "data.eval=[]",
    "data.cache=null",
    "eval.generate=false",
    "eval.on_start=false",
    "lr_scheduler_type=constant",
    "warmup_ratio=0",
    "moe.num_experts=5",
    "micro_batch_size=1",
    "fssdp.policy=hecate_paper",
    "logging_steps=1",
    *DETERMINISTIC,
)
"""settings with which results do not depend on when a run stops or on the number of ranks; five experts never share out evenly"""


def settings(*own: str) -> list[str]:
    """OVERRIDES, and over them these, key by key."""
    return list({one.partition("=")[0]: one for one in (*OVERRIDES, *own)}.values())


class RankFailed(AssertionError):
    """A rank of a drill failed by itself; the text is its traceback, or says how its process ended."""


def call_on_ranks(scope: Scope, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(ranks, *arguments)` on `world` new ranks, and return what it returns, by rank, as JSON has it.

    Args:
        function: at the top of a module of this room. Its arguments must be JSON values.

    Raises:
        RankFailed: a rank failed.
        TooSlow: none failed, and one had not ended after `timeout` seconds.
    """
    folder = _new_folder(scope, "call")
    results = [folder / f"result-{rank}" for rank in range(world)]
    processes = []
    for rank, result in enumerate(results):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), STORE_VARIABLE: str(folder / "store")}
        with open(folder / f"log-{rank}", "wb") as log:
            command = [*scope.start, "call", name_of(function), json.dumps(arguments), str(result)]
            processes.append(subprocess.Popen(command, env=environment() | places, stdout=log, stderr=log))
    try:
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 3.0)  # the others may say more of the reason
            if time.monotonic() > deadline:
                if all(process.poll() in (None, 0) for process in processes):
                    raise TooSlow(f"{function.__name__} on {world} ranks had not ended after {timeout:.0f} s")
                break
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode or not results[rank].exists()]
    if failed:
        texts = [json.loads(results[rank].read_text())["failed"] if results[rank].exists() else "" for rank in failed]
        first = next((text for text in texts if text and "gloo" not in text.splitlines()[-1]), "") or next(filter(None, texts), "")
        raise RankFailed(f"rank {failed[0]} of {world}: {(first.strip().splitlines() or ['ended without a word'])[-1]}\n{first}")
    return [json.loads(result.read_text())["value"] for result in results]


@dataclass(frozen=True)
class Launched:
    """A run that has ended."""

    status: int
    log: str
    output: Path
    trace: list[dict[str, Any]]
    """what armed ranks came by (`hecate.apps.check.drill.armed.Armed`), sorted by time"""

    @property
    def last_line(self) -> str:
        return (self.log.strip().splitlines() or ["it printed nothing"])[-1][:200]

    @cached_property
    def losses(self) -> dict[int, list[float]]:
        """Loss, balance loss and gradient norm of each step, from metrics.jsonl."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {one["step"]: [one["loss"], one["aux_loss"], one["grad_norm"]] for one in map(json.loads, lines) if one["kind"] == "step"}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All of the newest checkpoint."""
        newest = committed(self.output)[0]
        return read_tensors(newest, read_manifest(newest))

    def when(self, what: str, rank: int | None = None) -> list[float]:
        """The times in s at which ranks, or one of them, came by something."""
        return [one["time"] for one in self.trace if one["what"] == what and rank in (None, one["rank"])]


@dataclass
class Running:
    """A run that has been started."""

    process: subprocess.Popen[bytes]
    log: Path
    output: Path
    trace: Path

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words: str, timeout: float = 60.0) -> None:
        """Wait until the run has printed something.

        Raises:
            AssertionError: it has ended before.
            TooSlow: it has not in time.
        """
        deadline = time.monotonic() + timeout
        while words not in self.printed():
            ended = self.process.poll() is not None
            if ended and words not in self.printed():
                raise AssertionError(f"the run ended before it printed {words!r}: {self.printed()[-500:]}")
            if not ended and time.monotonic() > deadline:
                raise TooSlow(f"a run had not printed {words!r} after {timeout:.0f} s")
            time.sleep(0.01)

    def end(self, timeout: float = 120.0) -> Launched:
        """Wait for the end of the run.

        Raises:
            TooSlow: it has not come after the timeout, so the run was killed.
        """
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TooSlow(f"a run had not ended after {timeout:.0f} s") from None
        return self.ended()

    def ended(self) -> Launched:
        """What became of the run, which has ended or was killed."""
        status = self.process.wait()
        lines = self.trace.read_text(encoding="utf-8").splitlines() if self.trace.exists() else []
        return Launched(status, self.printed(), self.output, sorted(map(json.loads, lines), key=lambda one: one["time"]))


@dataclass(frozen=True)
class Started:
    """How a launcher starts the ranks of a drill's run."""

    launcher: Launcher = "local"
    joins: bool = False
    """ranks that the launcher starts in the place of lost ones join; else they wait for the end of the run"""
    restarts: int = 0
    """how often the launchers of nodes may start all ranks again, or one in the place of a lost one"""


def begin_run(
    scope: Scope,
    name: str,
    ranks: int,
    *overrides: str,
    injected: Sequence[Injected] = (),
    survives: bool = True,
    output: Path | None = None,
    started: Started = Started(),
) -> Running:
    """Start the tiny run, with backups if it survives.

    Args:
        output: the run's folder; None: a new one.
        started: how its ranks are started; on two nodes `ranks` must be even.
    """
    folder = _new_folder(scope, name)
    output = output or folder / "out"
    given = settings(f"output_dir={output}", *([] if not survives else ["fssdp.redundancy=1"]), *overrides)
    request = LaunchRequest(
        launcher=started.launcher,
        start=scope.start,
        injected=to_text(injected),
        trace=str(folder / "trace.jsonl"),
        joins=started.joins,
        arguments=(f"{scope.workshop}/config.yaml", *given),
        ranks=ranks,
        survives=survives,
        restarts=started.restarts,
    )
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*scope.start, "launch", json.dumps(vars(request))], env=environment(), stdout=log, stderr=log)
    return Running(process, folder / "log", output, folder / "trace.jsonl")


def begin_command(scope: Scope, name: str, ranks: int, *overrides: str, temporary: Path | None = None) -> Running:
    """Start `hecate train` as a user does, with a fork server of its own.

    Args:
        temporary: the folder for temporary files.
    """
    folder = _new_folder(scope, name)
    output = folder / "out"
    given = settings(f"output_dir={output}", f"nproc={ranks}", *overrides)
    command = [*RUN_MODULE, "hecate", "train", f"{scope.workshop}/config.yaml", *given]
    variables = environment() | ({"TMPDIR": str(temporary)} if temporary else {})
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    return Running(process, folder / "log", output, folder / "trace.jsonl")


def environment() -> dict[str, str]:
    """The variables of every process that a drill starts."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", STORE_VARIABLE)}
    return kept | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


def difference(mine: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference of any two numbers of the same place; infinite if names or shapes differ."""
    if mine.keys() != others.keys() or any(mine[name].shape != others[name].shape for name in mine):
        return float("inf")
    return max((float((mine[name].double() - others[name].double()).abs().max()) for name in mine if mine[name].numel()), default=0.0)


def loss_difference(mine: dict[int, list[float]], others: dict[int, list[float]]) -> float:
    """The largest difference of any loss or norm of the same step; infinite if the steps differ."""
    if mine.keys() != others.keys():
        return float("inf")
    return max((float((torch.tensor(mine[step]) - torch.tensor(others[step])).abs().max()) for step in mine), default=0.0)


def _new_folder(scope: Scope, name: str) -> Path:
    number = 0
    while True:
        folder = scope.path / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
