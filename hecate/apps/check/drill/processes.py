"""What the processes of a run listen on and connect to, and what they leave. Linux only: it reads /proc."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_LISTENS = "0A"


def tcp_addresses(pids: Sequence[int], *, listening: bool = True) -> set[str]:
    """The addresses, without ports, at which processes accept TCP connections; or else those of the other ends of their connections."""
    mine = set()
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/fd").glob("*")):
        with suppress(OSError):  # the file has been closed meanwhile
            mine.add(os.readlink(path))
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, other, state, *rest = line.split()
            if (state == _LISTENS) == listening and f"socket:[{rest[5]}]" in mine:
                words = bytes.fromhex((local if listening else other).partition(":")[0])
                address = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, address).removeprefix("::ffff:"))
    return found


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def paths_below(folder: Path) -> list[str]:
    """The paths of all files and folders below `folder`. Some may vanish meanwhile."""
    return [os.path.join(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files)]


def wait_until_gone(pids: Sequence[int], temporary: Path, seconds: float = 20.0) -> list[str]:
    """Wait until the processes and the files in `temporary` are gone, and return those that are left after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [*(str(pid) for pid in pids if runs(pid)), *paths_below(temporary)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
