"""Orders through the store arrive in their order, and only the controller's are accepted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from hecate.launch.ray_job.messages import Interrupt, Ping, Stop, WorkerOrder, message_json
from hecate.launch.ray_job.rendezvous import Rendezvous, orders
from hecate.ranks.job_store import JobStore


@pytest.fixture
def rendezvous() -> Rendezvous:
    return Rendezvous("127.0.0.1")


def received(rendezvous: Rendezvous, workers: int) -> list[tuple[int, WorkerOrder]]:
    """A list of (worker, order), to which threads add what each of the workers receives from now on."""
    found: list[tuple[int, WorkerOrder]] = []

    def listen(worker: int) -> None:
        for order in orders(rendezvous.host, rendezvous.port, rendezvous.secret, worker):
            found.append((worker, order))

    for worker in range(workers):
        threading.Thread(target=listen, args=(worker,), daemon=True).start()
    return found


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_worker_gets_its_own_orders_by_their_numbers(rendezvous: Rendezvous) -> None:
    given = [Interrupt(generation=1), Ping(), Interrupt(generation=2)]
    for number, order in enumerate(given):
        rendezvous.send(2, number, order)
    rendezvous.send(1, 0, Stop())
    mine, other = (orders(rendezvous.host, rendezvous.port, rendezvous.secret, worker) for worker in (2, 1))
    assert [next(mine) for _ in range(3)] == given
    assert rendezvous.carried_out(2) == 2, "the third is under way"
    assert next(other) == Stop()
    assert rendezvous.carried_out(1) == 0


def test_an_order_of_somebody_else_is_ignored(rendezvous: Rendezvous) -> None:
    """Who reaches the port, but was not handed the job's secret by Ray, can neither leave an order nor read one."""
    order, limit = json.dumps(message_json(Stop())), timedelta(seconds=2)
    with pytest.raises(dist.DistError):
        dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False, timeout=limit).set(
            "worker-0/order-0", order
        )
    with pytest.raises(dist.DistError):
        JobStore(rendezvous.host, rendezvous.port, b"a guess" * 6, limit)
    found = received(rendezvous, 1)
    rendezvous.send(0, 0, Ping())
    wait_until(lambda: bool(found))
    assert found == [(0, Ping())]
