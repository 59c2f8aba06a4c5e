"""Finds the TCP connections of this process, and breaks those that a process group has made.

gloo's own `abort` ends no wait: a rank that waits for a living peer waits until its timeout, and so do the ranks that wait for it.
A connection that is shut down fails at once, on both of its ends. gloo does not check either whether a silent peer's machine still runs, so
the kernel is set to check it. (Linux only. Elsewhere no connection is found, and only the direct peers of a lost rank notice the loss.)
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_FOLDER = "/proc/self/fd"
_IDLE_SECONDS, _PROBE_SECONDS, _GIVE_UP_SECONDS = 5, 2, 12


@dataclass(frozen=True)
class Connection:
    """A socket of this process, with its addresses. By these it differs from a later socket with the same descriptor."""

    descriptor: int
    local: Any
    """The address of the socket's own end."""
    peer: Any
    """The address of the socket's other end; None: the socket listens."""


def tcp_sockets() -> set[Connection]:
    """All TCP sockets that this process has now."""
    found = set()
    for name in os.listdir(_FOLDER) if os.path.isdir(_FOLDER) else ():
        with _opened(int(name)) as handle:
            if handle is not None and (connection := _describe(int(name), handle)):
                found.add(connection)
    return found


def shut_down(connections: Iterable[Connection]) -> None:
    """Break the connections that still exist. Any thread may call it."""
    for handle in _still_open(connections):
        with contextlib.suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)


def notice_lost_machines(connections: Iterable[Connection]) -> None:
    """Have the kernel break connections whose other machine has not answered for about twelve seconds, as without power or network.

    Connections to a process that is only slow stay, because the kernel of its machine answers. So do those to one that is stopped, unless
    more has come for it than its machine keeps; on this machine they stay in any case.
    """
    for handle in _still_open(connections):
        notice_lost_machine(handle)


def notice_lost_machine(handle: socket.socket) -> None:
    """`notice_lost_machines` for one connection. Does nothing if both of its ends are on this machine."""
    options = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _IDLE_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_SECONDS),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * _GIVE_UP_SECONDS),
    )
    with contextlib.suppress(OSError):
        if handle.getsockname()[0] == handle.getpeername()[0]:  # a machine does not lose itself, and a stopped process may read later
            return
        for level, name, value in options:
            if hasattr(socket, name):  # Linux has them all
                handle.setsockopt(level, getattr(socket, name), value)


def ports(connections: Iterable[Connection]) -> set[int]:
    """The ports on which sockets listen."""
    return {connection.local[1] for connection in connections if connection.peer is None}


def _still_open(connections: Iterable[Connection]) -> Iterator[socket.socket]:
    """A second handle of each connection that still exists, open until the next one is asked for."""
    for connection in connections:
        with _opened(connection.descriptor) as handle:
            # gloo may have closed the socket, and another may have its descriptor since then: the addresses tell.
            if handle is not None and connection.peer is not None and _describe(connection.descriptor, handle) == connection:
                yield handle


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[socket.socket | None]:
    """Give a second handle of a descriptor's socket until the end of the block; None: the descriptor is no socket, or is closed."""
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
