"""The process that a node's ranks are forked from: it has imported what they need, once for all and before they are wanted.

Importing torch and transformers takes seconds, and ranks that start together do it on the same processors. A launcher starts the
server, and `forked_rank.py` where it would have started `python -m hecate`. The server runs one thread and never uses a GPU, so forking
it is safe; a rank that finds a GPU touched all the same begins as a process of its own.
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
from pathlib import Path

from hecate.ranks.launched import LAUNCHED_VARIABLE

_SERVER = (sys.executable, "-m", "hecate.launch.fork_server")
_PLAIN = (sys.executable, "-m", "hecate")
_RANK = Path(__file__).with_name("forked_rank.py")
_LONGEST_PATH = 100
"""bytes that fit a Unix socket's address everywhere"""
_WAITING = 1024
"""ranks that may ask while the server imports"""


@contextmanager
def forking(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """A command that runs `hecate`, given its arguments: the process ends, and takes signals, as a rank started plainly would.

    At the block's end, and when this process dies, all ranks are killed.

    Args:
        folder: where the server listens, closed to other users.
        environment: of the server; ranks have that of their command, but what libraries read when they are loaded they have from here.
    """
    path = folder / "ranks"
    if not sys.platform.startswith("linux") or len(os.fsencode(path)) > _LONGEST_PATH:
        yield _PLAIN
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(_WAITING)
        server = subprocess.Popen(
            [*_SERVER, str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            env=dict(environment),
            start_new_session=True,  # a terminal's signals are the launcher's business
        )
    try:
        yield (sys.executable, "-I", "-S", str(_RANK), str(path))
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


@dataclass(frozen=True)
class Order:
    """What a forked process is to be."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


def wait_for_orders(listening: socket.socket) -> Order:
    """Fork a process for each order that comes. Returns in these processes alone, each with its order carried out but for the arguments.

    The server itself leaves by SystemExit when its standard input ends, after killing them.
    """
    server = os.getpid()
    clients: dict[socket.socket, int] = {}
    """to whoever stands for a rank -> the rank's process"""
    with selectors.DefaultSelector() as selector, _ended_children() as ended:
        for source in (0, listening, ended):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if 0 in ready:
                _end(list(clients.values()))
                sys.exit(0)
            for client in [client for client in clients if client in ready]:
                if not _hand_on(client, clients[client]):
                    selector.unregister(client)
            if ended in ready:
                ended.recv(4096)
                for client in [client for client, pid in clients.items() if _report(client, pid)]:
                    if client in selector.get_map():
                        selector.unregister(client)
                    client.close()
                    del clients[client]
            if listening in ready:
                client, _ = listening.accept()
                try:
                    order, descriptors = _read_order(client)
                except (OSError, ValueError):  # it was killed while it asked
                    client.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
                clients[client] = pid
                selector.register(client, selectors.EVENT_READ)
    for other in (listening, client, *clients):
        other.close()
    _become(order, descriptors, server)
    return order


def _read_order(client: socket.socket) -> tuple[Order, list[int]]:
    size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
    text = client.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
    return Order(**json.loads(text)), descriptors


def _hand_on(client: socket.socket, pid: int) -> bool:
    """The signals that have come for a rank; False: whoever stood for it is gone, and it was killed."""
    try:
        numbers = client.recv(16)
    except ConnectionResetError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(pid, number)
    return bool(numbers)


def _report(client: socket.socket, pid: int) -> bool:
    """How a rank has ended, to whoever stands for it; False: it has not."""
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


def _become(order: Order, descriptors: list[int], server: int) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ[LAUNCHED_VARIABLE] = str(server)  # with whose death it dies
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"hecate-rank-{order.environment.get('RANK')}", encoding="ascii")


@contextmanager
def _ended_children() -> Iterator[socket.socket]:
    """Can be read from when a child has ended."""
    ended, wakeup = socket.socketpair()
    with ended, wakeup:
        wakeup.setblocking(False)
        handler = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(wakeup.fileno())
        try:
            yield ended
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, handler)


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking whether there is a GPU would touch it
    from hecate import cli

    with suppress(ImportError):  # the ranks meet it, too, and say so
        from hecate.train.preload import preload

        preload()
    order = wait_for_orders(listening)
    import torch

    if torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [*_PLAIN, *order.arguments])
    sys.argv = ["hecate", *order.arguments]
    cli.main()


if __name__ == "__main__":
    main()
