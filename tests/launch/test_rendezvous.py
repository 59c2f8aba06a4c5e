"""Orders through the store: in their order, the controller's alone."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from hecate.launch.ray_job.order_store import Rendezvous, orders


@pytest.fixture
def rendezvous() -> Rendezvous:
    return Rendezvous("127.0.0.1")


def stranger(rendezvous: Rendezvous) -> dist.Store:
    return dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def test_each_worker_gets_its_own_orders_by_their_numbers(rendezvous: Rendezvous) -> None:
    for number, arguments in enumerate([(1, {"rows": None}), (), ("x",)]):
        rendezvous.order(2, number, f"second-{number}", arguments)
    rendezvous.order(1, 0, "first", ())
    mine, other = (orders(rendezvous.host, rendezvous.port, rendezvous.secret, worker) for worker in (2, 1))
    assert [next(mine) for _ in range(3)] == [("second-0", [1, {"rows": None}]), ("second-1", []), ("second-2", ["x"])]
    assert rendezvous.carried_out(2) == 2, "the third is under way"
    assert next(other) == ("first", [])
    assert rendezvous.carried_out(1) == 0


def test_an_order_of_somebody_else_is_ignored(rendezvous: Rendezvous, capfd: pytest.CaptureFixture[str]) -> None:
    rendezvous.order(0, 0, "stop", ())
    store = stranger(rendezvous)
    given = store.get("worker-0/order-0")
    found: list[Any] = []
    store.set("worker-0/order-1", given)  # an old one once more
    store.set("worker-1/order-0", given)  # another worker's
    store.set("worker-2/order-0", b"0" * 64 + b'["stop", []]')

    def listen(worker: int) -> None:
        for order in orders(rendezvous.host, rendezvous.port, rendezvous.secret, worker):
            found.append((worker, order))

    for worker in range(3):
        threading.Thread(target=listen, args=(worker,), daemon=True).start()
    deadline, said = time.monotonic() + 20, ""
    while said.count("it is ignored") < 3 and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.02)
    assert said.count("it is ignored") == 3
    rendezvous.order(0, 1, "ping", ())
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == [(0, ("stop", [])), (0, ("ping", []))]
