"""Where the workers of a job meet and get their orders: a store in the controller's process, so that no rank's death takes it away."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_TIMEOUT, _NEVER = timedelta(seconds=60), timedelta(days=1000)


class Rendezvous:
    """The store's server, listening at one address only. Each generation of workers has a part of it to itself."""

    def __init__(self, host: str) -> None:
        listening = socket.create_server((host, 0))
        self.host, self.port = host, int(listening.getsockname()[1])
        # Given a host alone, the store would listen on all interfaces. It owns the descriptor from here on.
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listening.detach()
        )

    def order(self, worker: int, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Leave a worker an order, a method of `Worker`. It takes them by their numbers, from 0."""
        self._store.set(_order_key(worker, number), json.dumps([method, arguments]))

    def carried_out(self, worker: int) -> int:
        """Of a worker's orders the number."""
        key = _done_key(worker)
        return int(self._store.get(key)) if self._store.check([key]) else 0


def meet(host: str, port: int, generation: int) -> dist.Store:
    """The store of one generation, as a worker sees it. A worker of an earlier one, back from the dead, meets nobody there."""
    return dist.PrefixStore(
        f"generation-{generation}", dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    )


def orders(host: str, port: int, worker: int) -> Iterator[tuple[str, list[Any]]]:
    """A worker's orders as they come, method and arguments; each counts as carried out when the next one is asked for. Ends when the
    controller is gone.
    """
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_NEVER)
    number = 0
    while True:
        key = _order_key(worker, number)
        try:
            method, arguments = json.loads(store.get(key))  # the thread sleeps here, without the interpreter
            store.delete_key(key)
            yield method, arguments
            number += 1
            store.set(_done_key(worker), str(number))
        except dist.DistError:
            return


def _order_key(worker: int, number: int) -> str:
    return f"worker-{worker}/order-{number}"


def _done_key(worker: int) -> str:
    return f"worker-{worker}/carried-out"
