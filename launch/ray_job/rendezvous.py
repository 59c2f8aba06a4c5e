"""Where the workers of a job meet and receive their orders: a key-value store in the controller's process, which outlives any rank."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from hecate.launch.ray_job.messages import WorkerOrder, order_from_json, to_json

_TIMEOUT, _NEVER = timedelta(seconds=60), timedelta(days=1000)
_SIGNATURE = 64
"""number of characters of a signature, which stand before the order's text"""


class Rendezvous:
    """The store's server, which listens at one address only. Each generation of ranks uses its own part of the store."""

    def __init__(self, host: str) -> None:
        listening = socket.create_server((host, 0))
        self.host, self.port = host, int(listening.getsockname()[1])
        self.secret = secrets.token_hex(32)
        """The key that orders are signed with. Without signatures, anybody who reaches the port could write an order."""
        # With a host alone, the store would listen on all interfaces. The store owns the descriptor from now on.
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listening.detach()
        )
        self._not_carried_out: dict[int, dict[int, str]] = {}
        """worker -> number of an order -> the signed order"""

    def send(self, worker: int, number: int, order: WorkerOrder) -> None:
        """Leave an order for a worker, which takes its orders by their numbers, from 0."""
        text = json.dumps(to_json(order))
        signed = _signature(self.secret, worker, number, text) + text
        self._not_carried_out.setdefault(worker, {})[number] = signed
        self._store.set(_order_key(worker, number), signed)

    def carried_out(self, worker: int) -> int:
        """How many of its orders a worker has carried out. Sends an order again if the worker has asked for that."""
        key, again = _done_key(worker), _again_key(worker)
        done = int(self._store.get(key)) if self._store.check([key]) else 0
        waiting = self._not_carried_out[worker] = {n: text for n, text in self._not_carried_out.get(worker, {}).items() if n >= done}
        if self._store.check([again]):
            number = int(self._store.get(again))
            self._store.delete_key(again)
            if number in waiting:
                self._store.set(_order_key(worker, number), waiting[number])
        return done


def orders(host: str, port: int, secret: str, worker: int) -> Iterator[WorkerOrder]:
    """Yield a worker's orders as they arrive, until the controller is gone.

    An order counts as carried out when the next one is requested from this iterator. An order with a wrong signature is reported and
    ignored. It may have replaced the controller's order with the same number, so the worker requests that order again.
    """
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_NEVER)
    number = 0
    while True:
        key = _order_key(worker, number)
        try:
            signed = store.get(key).decode(errors="replace")  # the thread waits in C++, without Python's interpreter lock
            store.delete_key(key)
            signature, text = signed[:_SIGNATURE], signed[_SIGNATURE:]
            if not hmac.compare_digest(signature.encode(), _signature(secret, worker, number, text).encode()):
                print("hecate: ignored an order that the controller did not sign", file=sys.stderr, flush=True)
                store.set(_again_key(worker), str(number))
                continue
            yield order_from_json(json.loads(text))
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


def _again_key(worker: int) -> str:
    return f"worker-{worker}/send-again"
