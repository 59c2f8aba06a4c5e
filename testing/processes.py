"""Start, watch and kill `hecate` commands, and find the processes and files that they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hecate.apps.check.drill.processes import paths_below, wait_until_gone
from hecate.apps.check.drill.processes import tcp_addresses as listening
from hecate.launch.run_folder import processes_below

__all__ = ["listening", "paths_below", "wait_until_gone"]

OVERRIDES = (
    "model.dtype=float64",
    "data.eval=[]",
    "eval.generate=false",
    "eval.on_start=false",
    "lr_scheduler_type=constant",
    "warmup_ratio=0",
)
"""settings with which runs of `testing.tiny_run` have losses that do not depend on when they stop or on the number of ranks"""


@contextmanager
def hecate(*arguments: str, temporary: Path, command: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run `hecate` with these arguments; see `running`.

    Args:
        command: a command that runs another one, such as `nsenter ...`, put before `hecate`.
    """
    with running([*command, sys.executable, "-m", "hecate", *arguments], temporary) as process:
        yield process


@contextmanager
def running(command: Sequence[str], temporary: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command with a temporary folder of its own and `hecate` on its path. It is killed at the end if it still runs."""
    temporary.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PATH": path, **variables}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch sets it in the tests' process; a user's environment does not have it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read lines until one contains `text`, and return all of them."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no line with {text!r}:\n{''.join(lines)}")


def read_rest(process: subprocess.Popen[str], status: int = 0) -> str:
    """Read the rest of the output, and check the exit status."""
    assert process.stdout is not None
    rest = process.stdout.read()
    assert (ended := process.wait(timeout=60)) == status, f"exit status {ended}\n{rest}"
    return rest


def command_line(pid: int) -> str:
    """Return the command line of a process, or "" if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
    return ""


def rank_process(launcher: int, rank: int) -> int:
    """Return the process id of a rank below a launcher."""
    for pid in processes_below(launcher):
        if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == f"hecate-rank-{rank}":
            return pid
    raise AssertionError(f"no rank {rank} below {launcher}")


def kill_rank(launcher: int, rank: int) -> None:
    """Kill a rank below a launcher."""
    os.kill(rank_process(launcher, rank), signal.SIGKILL)


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Return the loss and gradient norm of each step, from metrics.jsonl."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records if record["kind"] == "step"}
