"""The silence of a worker is checked at intervals, and times in which the controller itself was stopped do not count."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from hecate.launch.policy.devices import Device
from hecate.launch.ray_job.controller import AwakeClock
from hecate.launch.ray_job.messages import Interrupt, Ping
from hecate.launch.ray_job.rendezvous import Rendezvous, orders
from hecate.launch.ray_job.worker import Worker
from hecate.launch.ray_job.worker_group import WorkerGroup, WorkerHandle, WorkerSettings


def test_a_worker_is_asked_every_other_second_and_silent_until_it_answers() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    nobody: Any = None
    settings = WorkerSettings(config="", report_steps=1, worker=Worker, node="node", address=None)
    group = WorkerGroup(nobody, [Device("node", "127.0.0.1", "CPU", (("CPU", 1.0),), ())], rendezvous, settings)
    device = group.devices[0]
    worker = device.worker = WorkerHandle(7, nobody, nobody)
    mine = orders(rendezvous.host, rendezvous.port, rendezvous.secret, 7)
    assert group.ping(device, 100.0) == 0.0
    assert group.ping(device, 101.0) == 1.0
    assert next(mine) == Ping()
    assert group.ping(device, 101.1) == pytest.approx(1.1), "it has begun with it, no more"
    group.send(device, Interrupt(generation=3))
    assert next(mine) == Interrupt(generation=3)
    assert [group.ping(device, now) for now in (101.2, 101.9)] == [0.0, 0.0]
    assert worker.orders == 2, "an answer costs the training a moment"
    assert group.ping(device, 102.0) == 0.0
    assert worker.orders == 3
    assert group.ping(device, 113.0) == 11.0


def test_while_this_process_stands_still_nobody_is_silent() -> None:
    times = iter([50.0, 50.5, 51.0, 4000.0, 4000.5])
    clock = AwakeClock(lambda: next(times))
    assert [clock(), clock(), clock(), clock()] == [0.5, 1.0, 3.0, 3.5]


def test_a_device_that_comes_back_is_asked_for_its_gpus_anew() -> None:
    """It may be on another node, whose GPUs have other numbers; a spare of its node takes those that it had there."""
    nobody, rendezvous = mock.MagicMock(), Rendezvous("127.0.0.1")
    settings = WorkerSettings(config="", report_steps=1, worker=Worker, node="node", address=None)
    group = WorkerGroup(nobody, [Device("node", "127.0.0.1", "GPU", (("GPU", 1.0),), ())], rendezvous, settings)
    device = group.devices[0]
    device.gpus = "3"
    group.request_worker(device)
    assert device.gpus is None
