"""The TCP connections of this process, and how to break those that a process group has made.

gloo's own `abort` frees nobody: a rank that waits for a living peer goes on waiting until its timeout, and so do those that wait for it.
A connection that is shut down fails at once, on both of its ends. (Linux; elsewhere nothing is found, and a lost rank is seen by its
direct peers alone.)
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_FOLDER = "/proc/self/fd"


@dataclass(frozen=True)
class Connection:
    """A socket of this process, by which its descriptor is told from another that has taken its number since."""

    descriptor: int
    local: Any
    peer: Any
    """None: it listens"""


def tcp_sockets() -> set[Connection]:
    """All TCP sockets that this process has now."""
    found = set()
    for name in os.listdir(_FOLDER) if os.path.isdir(_FOLDER) else ():
        with _opened(int(name)) as handle:
            if handle is not None and (connection := _describe(int(name), handle)):
                found.add(connection)
    return found


def shut_down(connections: Iterable[Connection]) -> None:
    """Break connections off, those that are still there; from any thread."""
    for connection in connections:
        with _opened(connection.descriptor) as handle:
            if handle is not None and connection.peer is not None and _describe(connection.descriptor, handle) == connection:
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)


def ports(connections: Iterable[Connection]) -> set[int]:
    """On which they listen."""
    return {connection.local[1] for connection in connections if connection.peer is None}


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[socket.socket | None]:
    """A second handle of a descriptor's socket; None if it is none, or gone."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        handle = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        yield None
        return
    with handle:
        yield handle


def _describe(descriptor: int, handle: socket.socket) -> Connection | None:
    if handle.type != socket.SOCK_STREAM or handle.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        local = handle.getsockname()
    except OSError:
        return None
    try:
        return Connection(descriptor, local, handle.getpeername())
    except OSError:
        return Connection(descriptor, local, None)
