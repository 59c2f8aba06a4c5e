"""A folder for what the processes of one run share while they live, gone when their launcher is gone, however that ends."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ORPHANS = "orphans"
_REMOVE = (
    'trap "" INT TERM HUP; exec 2> /dev/null; if read _; then rm -rf -- "$1"; exit; fi; '
    f'kill -KILL $(cat "$1/{_ORPHANS}"); left=4; for _ in $(seq 40); do '
    "for f in $(grep -lsa default_worker.py /proc/[0-9]*/cmdline); do "
    'p=${f#/proc/}; p=${p%/cmdline}; [ "$p" = $$ ] || { grep -qsa -- "$1" "$f" && kill -KILL "$p"; }; done; '
    'if [ -e "$1" ]; then rm -rf -- "$1"; left=4; fi; sleep 1; left=$((left - 1)); [ $left -gt 0 ] || break; done'
)
"""Without a word from the launcher: until the folder has stayed away for a while. A worker of Ray that was about to start makes it once
more, and waits for its raylet for half a minute."""


@contextmanager
def run_folder(within: str | None = None) -> Iterator[Path]:
    """The folder. A small process removes it when this one leaves the block or dies, even by SIGKILL.

    Args:
        within: left out: where temporary files go.
    """
    folder = tempfile.mkdtemp(prefix="hecate-", dir=within)
    # Else torch leaves a folder for kernels that it compiles, of which there are none, beside this one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
    with subprocess.Popen(["/bin/sh", "-c", _REMOVE, "sh", folder], stdin=subprocess.PIPE, start_new_session=True) as janitor:
        try:
            yield Path(folder)
        finally:
            assert janitor.stdin is not None
            with suppress(BrokenPipeError):  # it is gone
                janitor.stdin.write(b"done\n")
                janitor.stdin.close()


@contextmanager
def ending_with_launcher(folder: Path, pids: Iterable[int]) -> Iterator[None]:
    """Processes that whoever removes the folder kills if this one dies inside the block."""
    orphans = folder / _ORPHANS
    orphans.write_text(" ".join(map(str, pids)), encoding="ascii")
    try:
        yield
    finally:
        orphans.unlink()


def processes_below(pid: int) -> list[int]:
    """Children, their children, and so on; on Linux, elsewhere none are found."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # it has ended meanwhile
            for child in map(int, (task / "children").read_text(encoding="ascii").split()):
                found += [child, *processes_below(child)]
    return found
