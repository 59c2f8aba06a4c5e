"""Joins a Ray cluster, or starts a private one. It joins at the given address and no other, with a token and without usage statistics."""

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
"""number of Ray's attempts to connect, a second apart"""
TOKEN_MODE = "token"
"""the value of RAY_AUTH_MODE where there is none: who joins shows a token"""
_DEFAULT_TOKEN = Path("~/.ray/auth_token")
_LONGEST_FOLDER = 40
"""largest number of bytes in the path of Ray's folder: Ray makes sockets below it, and the path of a socket has at most 107 bytes"""
_PRIVATE_SETTINGS = {
    "RAY_worker_niceness": "0",  # with Ray's default of 15, any other process would interrupt a rank
    # Statistics of a private cluster, which nobody reads. They take a tenth of the work of Ray's processes.
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_ray_events_report_interval_ms": "60000",
    "RAY_metrics_report_interval_ms": "60000",
}
_COLLECTORS = ("/log_monitor.py", "/monitor.py", "/dashboard/dashboard.py", "/dashboard/agent.py", "ray::DashboardAgent")
WRONG_TOKEN = f"the cluster does not take this token\n  give its own in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or {_DEFAULT_TOKEN}"


def import_ray() -> Any:
    """Set Ray's environment variables and import it.

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", TOKEN_MODE)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no codes of colours before each line in a file
    try:
        import ray
    except ImportError:
        raise UserError(f"Ray is not installed on this machine\n  {install_hint('ray')}") from None
    return ray


def check_token() -> None:
    """Check that there is a token for the cluster, and that only this user can read it.

    Raises:
        UserError: there is none, or others can read it.
    """
    if os.environ.get("RAY_AUTH_MODE", TOKEN_MODE) != TOKEN_MODE or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or _DEFAULT_TOKEN).expanduser()
    if not path.is_file():
        raise UserError(
            f"{path}: there is no Ray token; without one, anybody who reaches the cluster could run code on it\n"
            "  make one with `ray get-auth-token --generate` and copy it to all nodes, or set RAY_AUTH_TOKEN_PATH\n"
            "  for a cluster without authentication set RAY_AUTH_MODE=disabled"
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path}: other users can read the token; mend it with: chmod 600 {path}")


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT.

    Raises:
        UserError: the address has another form.
    """
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
    """Check that a server takes connections at this address.

    Args:
        what: the server's name in the error.

    Raises:
        UserError: none does.
    """
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error) or "timed out"
        raise UserError(f"no {what} at {host}:{port}: {reason}\n  is it running, and is the address right?") from None


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Join the cluster at HOST:PORT until the end of the block. Gives the module `ray`. This machine must be one of the cluster's nodes.

    Raises:
        UserError: there is no cluster, it does not take this machine's token, or it runs another version.
    """
    host, port = split_address(address)
    refuse_if_nobody_listens(host, port, "Ray cluster")
    if is_loopback(host):
        # Otherwise Ray replaces a loopback address by the machine's outward address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _CONNECT_TRIES)
    ray = import_ray()
    check_token()
    with _standard_error_in_file() as written:
        try:
            ray.init(address=f"{host}:{port}", logging_level="ERROR", log_to_driver=True)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, AssertionError) as error:
            raise UserError(f"{address}: {_reason(error, written())}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def private_cluster(num_cpus: int) -> Iterator[Any]:
    """Start Ray on this machine alone, on loopback, with a new token, until the end of the block. Gives the module `ray`."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in _PRIVATE_SETTINGS.items():
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
        # When this process is killed, most of Ray's processes end with it, but its agents look for their head for a minute.
        with ending_with_launcher(folder, started):
            try:
                yield ray
            finally:
                ray.shutdown()


def _yield_to_training(pids: Iterable[int]) -> None:
    """Let those of Ray's processes that only collect logs and statistics run on otherwise idle cores alone.

    On a machine with a rank on each core they would interrupt one rank, and all others would wait for it. Ray's head and its raylet keep
    their priority, because Ray takes them for dead when they are silent.
    """
    if not hasattr(os, "SCHED_IDLE"):  # not Linux
        return
    for pid in pids:
        with suppress(OSError):  # the process has ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(word.strip().endswith(_COLLECTORS) for word in words):  # not the raylet, which has the agent's command inside a word
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


@contextmanager
def _standard_error_in_file() -> Iterator[Callable[[], str]]:
    """Send standard error, Ray's C++ part included, to a file during the block. Gives the function that reads the file."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def written() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield written
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _reason(error: Exception, standard_error: str) -> str:
    text, problem = " ".join(str(error).split()), join_problem(error, standard_error)
    if problem is JoinProblem.WRONG_TOKEN:
        return WRONG_TOKEN
    if problem is JoinProblem.OTHER_VERSIONS:
        return f"the cluster runs other versions than this machine: {text[:300]}"
    return f"Ray could not join: {text[:300]}\n  start `hecate ray` on a node of the cluster; from elsewhere use `hecate submit`"
