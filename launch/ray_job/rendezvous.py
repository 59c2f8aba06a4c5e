"""Where the workers of a job meet and receive their orders: a key-value store in the controller's process, which outlives any rank."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from hecate.launch.ray_job.messages import WorkerOrder, message_json, order_from_json
from hecate.ranks.job_store import JobStore, StoreServer

_TIMEOUT, _NEVER = timedelta(seconds=60), timedelta(days=1000)


class Rendezvous:
    """The store's server, which listens at one address only. Each generation of ranks uses its own part of the store."""

    def __init__(self, host: str) -> None:
        self.secret = secrets.token_hex(32)
        """what the store demands of whoever connects; Ray hands it to the workers"""
        server = StoreServer(host, 0, self.secret.encode())
        self.host, self.port = server.host, server.port
        self._store = JobStore(self.host, self.port, self.secret.encode(), _TIMEOUT)

    def send(self, worker: int, number: int, order: WorkerOrder) -> None:
        """Leave an order for a worker, which takes its orders by their numbers, from 0."""
        self._store.set(_order_key(worker, number), json.dumps(message_json(order)))

    def carried_out(self, worker: int) -> int:
        """How many of its orders a worker has carried out."""
        return self._store.add(_done_key(worker), 0)


def orders(host: str, port: int, secret: str, worker: int) -> Iterator[WorkerOrder]:
    """Yield a worker's orders as they arrive, until the controller is gone.

    An order counts as carried out when the next one is requested from this iterator.
    """
    number = 0
    try:
        store = JobStore(host, port, secret.encode(), _NEVER)
        while True:
            key = _order_key(worker, number)
            text = store.get(key)
            store.delete_key(key)
            yield order_from_json(json.loads(text))
            number += 1
            store.add(_done_key(worker), 1)
    except dist.DistError:
        return


def _order_key(worker: int, number: int) -> str:
    return f"worker-{worker}/order-{number}"


def _done_key(worker: int) -> str:
    return f"worker-{worker}/carried-out"
