"""A Ray cluster of several raylets on this machine's loopback interface, one for a test session."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.launch.ray_job.status import DeviceStatus, JobStatus, read_status
from hecate.launch.run_folder import processes_below
from testing.processes import command_line

ROOT = Path(__file__).parents[2]
OF_RAYLETS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback stays loopback
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Job:
    """`hecate ray` or `hecate submit` in a process of its own. A thread collects its output as it arrives."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, run: Path) -> None:
        self.run = run
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, what: Callable[[JobStatus], bool], seconds: float = 90) -> JobStatus:
        """Wait for a status of the run for which `what` is true, and return it."""
        deadline = time.monotonic() + seconds
        status: JobStatus | None = None
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(UserError):
                status = read_status(self.run)
                if what(status):
                    return status
            time.sleep(0.05)
        raise AssertionError(f"it did not come to that; last:\n{status}\n{self.output[-6000:]}")

    def end(self, seconds: float = 90) -> int:
        """Wait for the process to end, and return its exit status."""
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        return code

    def close(self) -> None:
        """Kill the process if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.end()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


def make_token(folder: Path) -> Path:
    """Make a file with a new token that only its owner can read."""
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32), encoding="utf-8")
    return file


def environment(token_file: Path, **changes: str) -> dict[str, str]:
    """The environment of a process that is to use a cluster."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TORCHINDUCTOR_"))}
    given = {"RAY_AUTH_TOKEN_PATH": str(token_file), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **given, **changes}


class RayCluster:
    """A head without devices, and nodes that have one each, known by their ids; in a process of its own (`cluster_host`)."""

    def __init__(self, folder: Path, **variables: str) -> None:
        """
        Args:
            variables: of Ray's processes, in the place of those of `OF_RAYLETS`; an empty one is not set.
        """
        self.folder = folder
        self.token_file = make_token(folder)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._host = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.cluster_host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: text for name, text in self.environment(**{**OF_RAYLETS, **variables}, PATH=path).items() if text},
            cwd=ROOT,
        )
        addresses = self._answer()
        self.address: str = addresses["address"]
        self.dashboard: str = addresses["dashboard"]
        self.nodes: list[str] = []

    def add(self, kind: str, variables: dict[str, str] | None = None) -> str:
        self.nodes.append(self._ask({"add": [kind, variables]}))
        return self.nodes[-1]

    def remove(self, node: str) -> None:
        """End a node as if its machine had lost its power."""
        self.nodes.remove(node)
        self._ask({"remove": node})

    def node_of(self, device: DeviceStatus) -> str:
        return next(node for node in self.nodes if node.startswith(device.node.split()[1]))

    def workers(self) -> set[int]:
        """The process ids of the actors of all jobs."""
        return {pid for pid in processes_below(self._host.pid) if command_line(pid).startswith("ray::Worker")}

    def environment(self, **changes: str) -> dict[str, str]:
        return environment(self.token_file, **changes)

    @contextmanager
    def job(self, command: str, run: Path, *arguments: object, **changes: str) -> Iterator[Job]:
        """`hecate COMMAND` with the workshop's configuration; killed at the end if it still runs."""
        overrides = (f"output_dir={run}", "data.eval=[]", "eval.generate=false", "fssdp.policy=hecate_paper", *map(str, arguments))
        started = Job([sys.executable, "-m", "hecate", command, "config.yaml", *overrides], self.environment(**changes), self.folder, run)
        try:
            yield started
        finally:
            started.close()

    def close(self) -> None:
        assert self._host.stdin is not None
        self._host.stdin.close()
        try:
            self._host.wait(timeout=60)
        finally:
            self._host.kill()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._host.stdin is not None
        self._host.stdin.write(json.dumps(command) + "\n")
        self._host.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._host.stdout is not None
        for line in self._host.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError(f"the cluster's process ended with status {self._host.wait()}")


@contextmanager
def cluster_of(kinds: tuple[str, ...], folder: Path, **variables: str) -> Iterator[RayCluster]:
    """A cluster with a node of each kind; `variables` as `RayCluster` has them."""
    made = RayCluster(folder, **variables)
    try:
        for kind in kinds:
            made.add(kind)
        yield made
    finally:
        made.close()
