"""Joining a Ray cluster: at the address that was given and no other, with a token, without usage statistics."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hecate.errors import UserError, install_hint
from hecate.launch.foreign_texts import JoinProblem, join_problem
from hecate.launch.run_folder import ending_with_launcher, processes_below, run_folder

_CONNECT_SECONDS = 5.0
_CONNECT_TRIES = "3"
"""of Ray, a second apart"""
_DEFAULT_TOKEN = Path("~/.ray/auth_token")
_LONGEST_FOLDER = 40
"""bytes: below it Ray has sockets, whose paths have room for 107"""
_OF_PRIVATE = {
    "RAY_worker_niceness": "0",  # its 15 would let whatever else wakes up interrupt a rank
    # Figures that nobody will read; they are a tenth of what Ray's processes do.
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_ray_events_report_interval_ms": "60000",
    "RAY_metrics_report_interval_ms": "60000",
}
_COLLECTORS = ("/log_monitor.py", "/monitor.py", "/dashboard/dashboard.py", "/dashboard/agent.py", "ray::DashboardAgent")
WRONG_TOKEN = f"the cluster does not take this token\n  give its own in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or {_DEFAULT_TOKEN}"


def import_ray() -> Any:
    """Ray, with its environment set.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"Ray is not installed on this machine\n  {install_hint('ray')}") from None
    return ray


def check_token() -> None:
    """A token is there and is ours alone.

    Raises:
        UserError: there is none, or others may read it.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or _DEFAULT_TOKEN).expanduser()
    if not path.is_file():
        raise UserError(
            f"{path}: no Ray token, without which anybody who reaches the cluster could run code on it.\n"
            "  make one with: ray get-auth-token --generate, and put the same on all nodes; or set RAY_AUTH_TOKEN_PATH.\n"
            "  For a cluster without authentication set RAY_AUTH_MODE=disabled"
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path}: the token can be read by others; mend it with: chmod 600 {path}")


def split_address(address: str) -> tuple[str, int]:
    """Raises UserError unless it is HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536) or "/" in address:
        raise UserError(f"--address: must be HOST:PORT of the cluster's head, such as 10.0.0.1:6379, got {address!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_if_nobody_listens(host: str, port: int, what: str) -> None:
    """Raises UserError."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error) or "timed out"
        raise UserError(f"no {what} at {host}:{port}: {reason}\n  is it running, and is the address right?") from None


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, joined to the cluster at HOST:PORT until the end of the block. This machine must be one of its nodes.

    Raises:
        UserError: there is no cluster, it does not take our token, or it runs another version.
    """
    host, port = split_address(address)
    refuse_if_nobody_listens(host, port, "Ray cluster")
    if is_loopback(host):
        # Ray would put the machine's outward address in the place of a loopback one.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _CONNECT_TRIES)
    ray = import_ray()
    check_token()
    with _standard_error_in_file() as said:
        try:
            ray.init(address=f"{host}:{port}", logging_level="ERROR", log_to_driver=True)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, AssertionError) as error:
            raise UserError(f"{address}: {_reason(error, said())}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def private_cluster(num_cpus: int) -> Iterator[Any]:
    """Ray on this machine alone, on loopback, with a token that nobody else has; gone at the end of the block."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in _OF_PRIVATE.items():
        os.environ.setdefault(name, value)
    ray = import_ray()
    short = len(os.fsencode(tempfile.gettempdir())) + len("/hecate-") + 8 <= _LONGEST_FOLDER
    with run_folder(None if short else "/tmp") as folder:
        before = processes_below(os.getpid())
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=True, _temp_dir=str(folder)
        )
        started = set(processes_below(os.getpid())) - set(before)
        _yield_to_training(started)
        # When this process is killed, Ray's own end with it but for its agents, which look for their head for a minute.
        with ending_with_launcher(folder, started):
            try:
                yield ray
            finally:
                ray.shutdown()


def _yield_to_training(pids: Iterable[int]) -> None:
    """Let those of Ray's processes that only collect logs and figures run when nobody else wants a core: on a machine whose every core has
    a rank they would interrupt one and make all others wait for it. Not its head and its raylet, whose silence counts as their death."""
    if not hasattr(os, "SCHED_IDLE"):  # not Linux
        return
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(word.strip().endswith(_COLLECTORS) for word in words):  # the raylet has the agent's command in one of its words
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


@contextmanager
def _standard_error_in_file() -> Iterator[Callable[[], str]]:
    """What is written to standard error, by Ray's C++ part too, goes into a file; the function given reads it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _reason(error: Exception, said: str) -> str:
    text, problem = " ".join(str(error).split()), join_problem(error, said)
    if problem is JoinProblem.WRONG_TOKEN:
        return WRONG_TOKEN
    if problem is JoinProblem.OTHER_VERSIONS:
        return f"the cluster runs other versions than this machine: {text[:300]}"
    return f"Ray could not join: {text[:300]}\n  start `hecate ray` on a node of the cluster; from elsewhere use `hecate submit`"
