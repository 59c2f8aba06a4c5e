"""Orders through the store arrive in their order, and only the controller's are accepted."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from hecate.launch.ray_job.messages import Interrupt, Ping, Stop, WorkerOrder
from hecate.launch.ray_job.rendezvous import Rendezvous, orders


@pytest.fixture
def rendezvous() -> Rendezvous:
    return Rendezvous("127.0.0.1")


def stranger(rendezvous: Rendezvous) -> dist.Store:
    return dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


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


def test_an_order_of_somebody_else_is_ignored(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()  # what pytest captures can be lost while a thread writes
    monkeypatch.setattr(sys, "stderr", said)
    rendezvous.send(0, 0, Stop())
    store = stranger(rendezvous)
    given = store.get("worker-0/order-0")
    store.set("worker-0/order-1", given)  # an old order, once more
    store.set("worker-1/order-0", given)  # an order of another worker
    store.set("worker-2/order-0", b"0" * 64 + b'{"code": "stop"}')
    found = received(rendezvous, 3)
    wait_until(lambda: said.getvalue().count("ignored an order") >= 3)
    assert said.getvalue().count("ignored an order") == 3
    rendezvous.send(0, 1, Ping())
    wait_until(lambda: len(found) == 2)
    assert found == [(0, Stop()), (0, Ping())]


def test_an_order_that_a_forged_one_has_replaced_is_sent_again(rendezvous: Rendezvous) -> None:
    """Otherwise the worker would wait for this order for ever, and would carry out none of the later ones."""
    rendezvous.send(0, 0, Interrupt(generation=3))
    stranger(rendezvous).set("worker-0/order-0", b"\xff" * 64 + b'{"code": "stop"}')
    found = received(rendezvous, 1)
    rendezvous.send(0, 1, Ping())
    # The controller asks how far a worker is whenever a ping is not answered.
    wait_until(lambda: rendezvous.carried_out(0) == 2)
    assert found == [(0, Interrupt(generation=3)), (0, Ping())]
