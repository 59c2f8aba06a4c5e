"""Checks of the machine: its cores, memory, limits, disks, sockets and clock."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

from hecate.apps.check.doctor.finding import Finding, by_name, ok, problem, skipped, warning
from hecate.io.durable import new_folder, write_durable
from hecate.ranks.cores import usable_cores

_GIB = 1024**3
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_INFINIBAND = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_MEMORY, _LEAST_SHARED_MEMORY, _LEAST_DISK = 2 * _GIB, _GIB, 2 * _GIB
_LEAST_FILES, _LEAST_PROCESSES = 4096, 1024
_FIRST_YEAR = 2025
"""no machine's clock that is right shows an earlier one"""


def operating_system() -> Finding:
    name = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() == "Linux":
        return ok(name)
    return warning(name, "hecate is tested on Linux; elsewhere a lost rank is noticed later, and there are no Triton kernels")


def account() -> Finding:
    """As whom training would run: nothing in hecate needs root."""
    if os.geteuid() == 0:
        return warning(
            "root", "nothing needs its rights, and a file that does harm would have them: start hecate as a user who owns output_dir"
        )
    return ok(f"user {os.geteuid()}, not root")


def cores() -> Finding:
    """How many cores this process may use: a container's share can be smaller than the machine."""
    return ok(f"{usable_cores()} of {os.cpu_count() or 1}")


def threads() -> Finding:
    given, usable = os.environ.get("OMP_NUM_THREADS"), usable_cores()
    if given is None:
        return ok("OMP_NUM_THREADS is not set; each rank gets its share of the cores")
    if not given.isdigit() or int(given) < 1:
        return problem(f"OMP_NUM_THREADS={given}", "it must be a number from 1: unset OMP_NUM_THREADS")
    if int(given) > usable:
        return warning(f"OMP_NUM_THREADS={given} on {usable} cores", "threads wait for each other: unset OMP_NUM_THREADS")
    return ok(f"OMP_NUM_THREADS={given}")


def memory() -> Finding:
    if not _MEMINFO.is_file():
        return skipped(f"no {_MEMINFO} on this system")
    from hecate.launch.profile.probe import memory_of_machine

    free = memory_of_machine(_MEMINFO, _CGROUP)
    what = f"{free / _GIB:.1f} GiB free"
    if free < _LEAST_MEMORY:
        return problem(
            what, "a rank takes about 0.5 GiB before it loads a model: end other programs, or take a larger machine or container"
        )
    return ok(what)


def shared_memory() -> Finding:
    """NCCL exchanges through it between the GPUs of a machine, and Ray keeps its objects there."""
    if not _SHARED_MEMORY.is_dir():
        return skipped(f"no {_SHARED_MEMORY} on this system")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    what = f"{free / _GIB:.2f} GiB free in {_SHARED_MEMORY}"
    if free < _LEAST_SHARED_MEMORY:
        return warning(what, "NCCL and Ray want 1 GiB: start the container with --shm-size=8g or --ipc=host")
    return ok(what)


def open_files() -> Finding:
    return _limited(resource.RLIMIT_NOFILE, _LEAST_FILES, "many ranks need more connections: ulimit -n")


def processes() -> Finding:
    return _limited(resource.RLIMIT_NPROC, _LEAST_PROCESSES, "threads count, too: ulimit -u")


def locked_memory() -> Finding:
    """InfiniBand registers memory, which this limit is about."""
    if not _INFINIBAND.is_dir() or not any(_INFINIBAND.iterdir()):
        return skipped("no InfiniBand")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        return problem(f"{_limit(soft)} bytes at most", "NCCL cannot use InfiniBand: ulimit -l unlimited, or docker's --ulimit memlock=-1")
    return ok("unlimited")


def temporary_folder() -> Finding:
    """Launchers put the files there by which ranks meet."""
    return _folder(Path(tempfile.gettempdir()), "set TMPDIR to a folder that can be written")


def working_folder() -> Finding:
    """Runs write below it, and a checkpoint is committed by renaming a folder."""
    return _folder(Path(), "change to a folder that can be written, or give output_dir on another disk")


def loopback() -> Finding:
    """Ranks of one machine exchange over it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=2):
            return ok("a port of 127.0.0.1 can be opened and reached")
    except OSError as error:
        return problem(f"127.0.0.1: {error}", "a firewall or sandbox forbids it; ranks of one machine exchange there")


def host_name() -> Finding:
    """gloo looks it up, and waits where nobody answers."""
    name, found = socket.gethostname(), []
    lookup = threading.Thread(target=lambda: found.append(_address_of(name)), daemon=True)
    lookup.start()
    lookup.join(timeout=3)
    if found and found[0]:
        return ok(f"{name} is {found[0]}")
    why = "is not known to this machine" if found else "is looked up for more than 3 seconds"
    return warning(f"{name} {why}", f"add the line '127.0.0.1 {name}' to /etc/hosts; several nodes need an address that the others reach")


def clock() -> Finding:
    year = time.gmtime().tm_year
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if year < _FIRST_YEAR:
        return warning(shown, "the clock is wrong, and so will be the times in logs: set it, or start an NTP service")
    return ok(shown)


def _limited(which: int, least: int, raised_by: str) -> Finding:
    """Whether one of the system's limits lets a process have `least`. `raised_by` is the mend without the number."""
    soft, hard = resource.getrlimit(which)
    what = f"{_limit(soft)} at most"
    return warning(what, f"{raised_by} {_limit(hard)}") if soft != resource.RLIM_INFINITY and soft < least else ok(what)


def _folder(path: Path, mend: str) -> Finding:
    """Whether files can be written durably and renamed in a folder, and how much room it has."""
    shown = path.resolve()
    try:
        with (
            tempfile.TemporaryDirectory(dir=path, prefix=".hecate-doctor-") as inside,
            new_folder(Path(inside, "checkpoint")) as staging,
        ):
            write_durable(staging / "file", [b"hecate"])
    except OSError as error:
        return problem(f"{shown}: {error.strerror or error}", mend)
    free = shutil.disk_usage(path).free
    what = f"{shown}: {free / _GIB:.1f} GiB free"
    return warning(what, mend) if free < _LEAST_DISK else ok(what)


def _address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


CHECKS = by_name(
    operating_system,
    account,
    cores,
    threads,
    memory,
    shared_memory,
    open_files,
    processes,
    locked_memory,
    temporary_folder,
    working_folder,
    loopback,
    host_name,
    clock,
)
