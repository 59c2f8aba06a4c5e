"""A folder for the files that the processes of one run share. It is removed when the run's launcher ends, however the launcher ends."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ORPHANS = "orphans"
"""name of a file in the folder; each line has a process id and its `start_time`"""
_REMOVE = (
    'trap "" INT TERM HUP; exec 2> /dev/null; if read _; then rm -rf -- "$1"; exit; fi; '
    'while read -r p begun; do s=$(cat "/proc/$p/stat") || continue; s=${s##*) }; '
    f'[ "$(echo $s | cut -d " " -f 20)" = "$begun" ] && kill -KILL "$p"; done < "$1/{_ORPHANS}"; '
    "left=4; for _ in $(seq 40); do "
    "for f in $(grep -lsa default_worker.py /proc/[0-9]*/cmdline); do "
    'p=${f#/proc/}; p=${p%/cmdline}; [ "$p" = $$ ] || { grep -qsa -- "$1" "$f" && kill -KILL "$p"; }; done; '
    'if [ -e "$1" ]; then rm -rf -- "$1"; left=4; fi; sleep 1; left=$((left - 1)); [ $left -gt 0 ] || break; done'
)
"""Shell program of the process that removes the folder, whose path is its first argument.

If its input ends with a line, the launcher has ended in order, and the program removes the folder once. If its input ends without one, the
launcher was killed: the program kills the processes of the orphans file, and removes the folder again until it has stayed away for some
seconds, because a worker of Ray that was about to start makes the folder once more and waits for its raylet for half a minute.
"""


@contextmanager
def run_folder(within: str | None = None) -> Iterator[Path]:
    """Make a folder. A small process removes it when this process leaves the block or dies, even by SIGKILL.

    Args:
        within: the folder in which it is made; None: the system's folder for temporary files.
    """
    folder = tempfile.mkdtemp(prefix="hecate-", dir=within)
    # Otherwise torch leaves a folder for compiled kernels among the temporary files, though it compiles none.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
    with subprocess.Popen(["/bin/sh", "-c", _REMOVE, "sh", folder], stdin=subprocess.PIPE, start_new_session=True) as janitor:
        try:
            yield Path(folder)
        finally:
            assert janitor.stdin is not None
            with suppress(BrokenPipeError):  # the process has been killed
                janitor.stdin.write(b"done\n")
                janitor.stdin.close()


@contextmanager
def ending_with_launcher(folder: Path, pids: Iterable[int]) -> Iterator[None]:
    """If this process dies inside the block, the process that removes the folder kills `pids`, too.

    A process that has ended by then is left alone, even if another one has been given its number.
    """
    orphans = folder / _ORPHANS
    lines = []
    for pid in pids:
        with suppress(OSError):  # the process has ended meanwhile
            lines.append(f"{pid} {start_time(pid)}\n")
    orphans.write_text("".join(lines), encoding="ascii")
    try:
        yield
    finally:
        orphans.unlink()


def start_time(pid: int) -> str:
    """When a process began, in clock ticks since the machine started. Its id and this time identify a process for good. Linux only.

    Raises:
        OSError: there is no such process.
    """
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]


def processes_below(pid: int) -> list[int]:
    """The children of a process, their children, and so on. Empty except on Linux."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # the process has ended meanwhile
            for child in map(int, (task / "children").read_text(encoding="ascii").split()):
                found += [child, *processes_below(child)]
    return found
