"""What a process does while it reads a hostile file is watched: the files it opens, what it starts, its memory and its time."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

_STARTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
_REACHES = ("socket.connect", "socket.getaddrinfo", "urllib.Request", "pickle.find_class", "ctypes.dlopen", "webbrowser.open")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STUCK = 600
"""seconds after which the process ends with a stack trace, because it waits in code that no signal interrupts"""


@dataclass
class Seen:
    """What a block has done."""

    opened: list[str] = field(default_factory=list)
    """paths, as they were given"""
    done: list[str] = field(default_factory=list)
    """what no reader may do: processes that were started, connections, classes that were unpickled"""
    grown: int = 0
    """bytes by which the memory in use was larger at its peak than before; 0 where the system does not tell"""


class TooLong(BaseException):
    """A block has taken more processor time than it may."""


_watching: list[Seen] = []
"""who is watched; empty: nobody"""
_hooks: list[bool] = []
_most_grown = [0]
"""of the blocks that have ended"""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open" and args and isinstance(args[0], str | bytes | os.PathLike):
        _watching[-1].opened.append(os.fsdecode(args[0]))
    elif event in _STARTS or event in _REACHES:
        _watching[-1].done.append(f"{event} {str(args)[:80]}")


@contextmanager
def watched(seconds: float) -> Iterator[Seen]:
    """Watch what the block does. It must be in the main thread. Python has no way to end an audit hook, so that the process keeps it.

    Args:
        seconds: of processor time that it may take.

    Raises:
        TooLong: it has taken longer.
    """
    if not _hooks:
        sys.addaudithook(_hook)
        _hooks.append(True)

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TooLong(f"more than {seconds:g} s of processor time")

    seen, before = Seen(), _memory()
    was = signal.signal(signal.SIGPROF, end)
    _watching.append(seen)
    faulthandler.dump_traceback_later(_STUCK, exit=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        _watching.pop()
        signal.signal(signal.SIGPROF, was)
        seen.grown = _peak() - before
        _most_grown[0] = max(_most_grown[0], seen.grown)


def most_grown() -> int:
    """The bytes by which memory has grown in that block, of all that were watched, in which it has grown most."""
    return _most_grown[0]


def limit_memory(room: int) -> None:
    """Let this process have only so many more bytes of address space than it has. Linux only."""
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _memory() -> int:
    """Bytes in use now; the peak is counted from here on."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return sys.maxsize  # the peak cannot be measured: nothing is larger than this
    return _field("VmRSS")


def _peak() -> int:
    return _field("VmHWM")


def _field(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
