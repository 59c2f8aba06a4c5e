"""The process that a node's ranks are forked from: it imports once, before they start, what all of them need.

Importing torch and transformers takes seconds, and ranks that start at once would all do it on the same processors. The launcher starts
this server, and runs `forked_rank.py` for each rank. The ranks run a *program*: a module with the functions `preload()`, which
imports what the program needs, and `main(arguments)`. Without a server a rank runs `python -m PROGRAM ARGUMENTS`.

The server runs one thread and never uses a GPU, so forking it is safe. If an import has used a GPU all the same, the rank replaces itself
by a new process.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hecate.io.process_end import die_with_parent, run_and_end
from hecate.io.python_module import RUN_MODULE
from hecate.ranks.launcher_files import LAUNCHED_VARIABLE, name_process

_SERVER = (*RUN_MODULE, "hecate.launch.fork_server")
_STOPS = (signal.SIGINT, signal.SIGTERM)
_RANK = Path(__file__).with_name("forked_rank.py")
_LONGEST_PATH = 100
"""the most bytes in the address of a Unix socket that every system takes"""
_WAITING = 1024
"""the number of ranks that can connect before the server has imported everything"""


@contextmanager
def forking(folder: Path, environment: Mapping[str, str], program: str) -> Iterator[tuple[str, ...]]:
    """Run a fork server during the block. Gives the command that starts a rank when the arguments of `program` are appended to it.

    The command's process ends as its rank ends, and passes signals on to it. At the block's end, and when this process dies, all ranks are
    killed.

    Args:
        folder: the folder for the server's socket; other users must have no access.
        environment: the environment of the server. A rank gets the environment of its command; libraries that read their variables while
            they are loaded have read those of the server.
        program: the name of a module; see the head of this file.
    """
    path = folder / "ranks"
    if not sys.platform.startswith("linux") or len(os.fsencode(path)) > _LONGEST_PATH:
        yield (*RUN_MODULE, program)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(_WAITING)
        # A service that is stopped signals all of its processes. The server has these signals blocked from its beginning, and only passes
        # on to ranks what the launcher sends them: without it they could not save.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            server = _start(listening, environment, program)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield (sys.executable, "-I", "-S", str(_RANK), str(path), program)
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


def _start(listening: socket.socket, environment: Mapping[str, str], program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*_SERVER, str(listening.fileno()), program],
        stdin=subprocess.PIPE,  # the server ends when this pipe is closed, which the kernel does even if this process is killed
        pass_fds=[listening.fileno()],
        env=dict(environment),
        start_new_session=True,  # a terminal's signals go to the launcher alone
    )


@dataclass(frozen=True)
class StartOrder:
    """The arguments, environment and working folder that a forked process is started with."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


def wait_for_orders(listening: socket.socket) -> StartOrder:
    """Fork a process for each order that arrives. It returns in the forked processes only, with environment, folder and output as ordered.

    Raises:
        SystemExit: in the server, when its standard input has ended and it has killed all ranks.
    """
    server = os.getpid()
    clients: dict[socket.socket, int] = {}
    """the socket to a `forked_rank.py` -> the process id of its rank"""
    with selectors.DefaultSelector() as selector, _ended_children() as ended:
        for source in (0, listening, ended):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if 0 in ready:
                _end(list(clients.values()))
                sys.exit(0)
            # Signals come before ends: until a rank that has ended is waited for, no other process can have its number.
            for client in [client for client in clients if client in ready]:
                if not _pass_on_signals(client, clients[client]):
                    selector.unregister(client)
            if ended in ready:
                ended.recv(4096)  # a byte may stand for several children, so every rank is asked
                for client in [client for client, pid in clients.items() if _report(client, pid)]:
                    if client in selector.get_map():
                        selector.unregister(client)
                    client.close()
                    del clients[client]
            if listening in ready:
                client, _ = listening.accept()
                try:
                    order, descriptors = _read_order(client)
                except (OSError, ValueError):  # the client was killed before it had sent its order
                    client.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
                clients[client] = pid
                selector.register(client, selectors.EVENT_READ)
    # In the rank. While it held the other ranks' connections open, their `forked_rank.py` would not notice the server's end.
    for other in (listening, client, *clients):
        other.close()
    _become(order, descriptors, server)
    return order


def _read_order(client: socket.socket) -> tuple[StartOrder, list[int]]:
    size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
    text = client.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
    return StartOrder(**json.loads(text)), descriptors


def _pass_on_signals(client: socket.socket, pid: int) -> bool:
    """Send a rank the signals that its `forked_rank.py` has received. False: that process is gone, so the rank was killed."""
    try:
        numbers = client.recv(16)
    except ConnectionResetError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(pid, number)
    return bool(numbers)


def _report(client: socket.socket, pid: int) -> bool:
    """Send a rank's exit status to its `forked_rank.py`. False: the rank still runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found == 0:
        return False
    with suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return True


def _end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def _become(order: StartOrder, descriptors: list[int], server: int) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ[LAUNCHED_VARIABLE] = str(server)
    die_with_parent(server)  # also before it joins the other ranks
    name_process()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


@contextmanager
def _ended_children() -> Iterator[socket.socket]:
    """Give a socket that can be read from when a child process has ended."""
    ended, wakeup = socket.socketpair()
    with ended, wakeup:
        wakeup.setblocking(False)  # a full socket has been noticed already; waiting for room in a signal's handler would stop the server
        handler = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # Python writes only for signals that have a handler
        signal.set_wakeup_fd(wakeup.fileno())
        try:
            yield ended
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, handler)


def main() -> None:
    listening, name = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise torch would use the GPUs to find out whether there are any
    program = import_module(name)
    with suppress(ImportError):  # each rank raises the same error and reports it
        program.preload()
    order = wait_for_orders(listening)
    import torch

    if torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [*RUN_MODULE, name, *order.arguments])
    program.main(order.arguments)


if __name__ == "__main__":
    run_and_end(main)
