"""Where the workers of a job meet and get their orders: a store in the controller's process, so that no rank's death takes it away."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_TIMEOUT, _NEVER = timedelta(seconds=60), timedelta(days=1000)
_SIGNATURE = 64
"""characters"""


class Rendezvous:
    """The store's server, listening at one address only. Each generation of workers has a part of it to itself."""

    def __init__(self, host: str) -> None:
        listening = socket.create_server((host, 0))
        self.host, self.port = host, int(listening.getsockname()[1])
        self.secret = secrets.token_hex(32)
        """what makes an order the controller's: whoever reaches the port could leave one"""
        # Given a host alone, the store would listen on all interfaces. It owns the descriptor from here on.
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listening.detach()
        )

    def order(self, worker: int, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Leave a worker an order, a method of `Worker`. It takes them by their numbers, from 0."""
        text = json.dumps([method, arguments])
        self._store.set(_order_key(worker, number), _signature(self.secret, worker, number, text) + text)

    def carried_out(self, worker: int) -> int:
        """How many of its orders a worker has carried out."""
        key = _done_key(worker)
        return int(self._store.get(key)) if self._store.check([key]) else 0


def meet(host: str, port: int, generation: int) -> dist.Store:
    """The store of one generation, as a worker sees it. A worker of an earlier one, back from the dead, meets nobody there."""
    return dist.PrefixStore(
        f"generation-{generation}", dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    )


def orders(host: str, port: int, secret: str, worker: int) -> Iterator[tuple[str, list[Any]]]:
    """A worker's orders as they come, method and arguments; each counts as carried out when the next one is asked for. Ends when the
    controller is gone."""
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_NEVER)
    number = 0
    while True:
        key = _order_key(worker, number)
        try:
            signed = store.get(key).decode()  # the thread sleeps here, without the interpreter
            store.delete_key(key)
            signature, text = signed[:_SIGNATURE], signed[_SIGNATURE:]
            if not hmac.compare_digest(signature, _signature(secret, worker, number, text)):
                print("hecate: somebody who is not the controller left an order; it is ignored", file=sys.stderr, flush=True)
                continue
            method, arguments = json.loads(text)
            yield method, arguments
            number += 1
            store.set(_done_key(worker), str(number))
        except dist.DistError:
            return


def _signature(secret: str, worker: int, number: int, text: str) -> str:
    return hmac.new(secret.encode(), f"{worker} {number} {text}".encode(), "sha256").hexdigest()


def _order_key(worker: int, number: int) -> str:
    return f"worker-{worker}/order-{number}"


def _done_key(worker: int) -> str:
    return f"worker-{worker}/carried-out"
