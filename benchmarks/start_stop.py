"""Start and end runs repeatedly, and check that they leave no processes, sockets or files behind.

A run of two ranks with a tiny model ends, in turn, by itself, by SIGTERM to its launcher, or by SIGKILL to it. Before the first run and
after each one, this program counts processes, sockets (TCP in any state but TIME_WAIT, and Unix), open files of all processes, and files
in /dev/shm and in the folder for temporary files. It runs in namespaces of its own, which needs root, so only those of the runs are
counted. The exit status is 1 if the last counts differ from the first ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import arguments, finish
from testing.processes import OVERRIDES, hecate, paths_below, read_rest, read_until
from testing.tiny_run import make_workshop

COMMANDS = {
    "train": ("train", "nproc=2"),
    "launch": ("launch", "nproc=2"),
    "ray": ("ray", "ray.workers=2", "--address", "local"),
}
WAYS = ("itself", "SIGTERM", "SIGKILL")
NAMESPACES = ("--mount", "--net", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child")
_INSIDE = "HECATE_START_STOP"
_SETTLE_SECONDS = 20.0
_TIME_WAIT = "06"


@dataclass(frozen=True)
class Held:
    processes: int
    sockets: int
    open_files: int
    shared_memory: int
    temporary: int


def held(temporary: Path) -> Held:
    """Count everything in this process's namespaces."""
    pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if not _is_zombie(pid)]
    sockets = 0
    for table in ("tcp", "tcp6"):
        sockets += sum(line.split()[3] != _TIME_WAIT for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:])
    sockets += len(Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:])
    files = 0
    for pid in pids:
        with suppress(OSError):  # the process has ended meanwhile
            files += len(os.listdir(f"/proc/{pid}/fd"))
    return Held(len(pids), sockets, files, len(os.listdir("/dev/shm")), len(paths_below(temporary)))


def one_cycle(command: tuple[str, ...], workshop: Path, temporary: Path, number: int) -> str:
    """Start a run and end it. Returns how it was ended."""
    way = WAYS[number % len(WAYS)]
    name, *overrides = command
    steps = "max_steps=3" if way == "itself" else "max_steps=100000"
    given = [str(workshop / "config.yaml"), *OVERRIDES, f"output_dir={workshop}/runs/{number}", steps, *overrides]
    with hecate(name, *given, temporary=temporary) as process:
        if way != "itself":
            read_until(process, "step 2/")
            process.send_signal(signal.Signals[way])
        if way == "SIGKILL":
            process.wait(timeout=60)
        else:
            read_rest(process, 128 + signal.SIGTERM if (name, way) == ("launch", "SIGTERM") else 0)
    return way


def counts_after_end(before: Held, temporary: Path) -> Held:
    """Return the counts as soon as they equal those of before, or else after some time."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (now := held(temporary)) != before and time.monotonic() < deadline:
        with suppress(ChildProcessError):  # a process whose parent has ended becomes a child of the namespace's first process
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)
    return now


def measure(command: str, cycles: int, json_file: Path | None) -> int:
    """Run the cycles inside the namespaces and return the exit status."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/shm"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as name:
        (workshop := Path(name) / "workshop").mkdir()
        (temporary := Path(name) / "temporary").mkdir()
        make_workshop(workshop)
        before = held(temporary)
        rows = []
        for number in range(cycles):
            start = time.perf_counter()
            way = one_cycle(COMMANDS[command], workshop, temporary, number)
            ended = time.perf_counter()
            after = counts_after_end(before, temporary)
            seconds = {"seconds": ended - start, "settled_after": time.perf_counter() - ended}
            rows.append({"command": command, "cycle": number + 1, "ended_by": way, **seconds, **asdict(after)})
            print(f"{number + 1} of {cycles}: {after}", file=sys.stderr, flush=True)
    left = {f"left_{kind}": float(count - asdict(before)[kind]) for kind, count in asdict(after).items()}
    finish("start_stop", rows, {"cycles": float(cycles), **left}, json_file)
    return int(any(left.values()))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--command", choices=COMMANDS, default="launch")
    parser.add_argument("--cycles", type=int, default=50)
    options = parser.parse_args()
    if _INSIDE in os.environ:
        sys.exit(measure(options.command, len(WAYS) if options.quick else options.cycles, options.json))
    if os.geteuid() != 0:
        sys.exit("start_stop: needs root, for namespaces in which nothing else runs")
    program = [sys.executable, "-m", "benchmarks.start_stop", *sys.argv[1:]]
    sys.exit(subprocess.run(["unshare", *NAMESPACES, *program], env={**os.environ, _INSIDE: "1"}, check=False).returncode)


if __name__ == "__main__":
    main()
