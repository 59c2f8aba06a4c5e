"""The parts of a step's time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from hecate.parallel.loops import jit
from hecate.train.steps.step_clock import StepClock


def test_parts_add_up_and_waiting_for_machine_code_counts_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = 0.0, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(jit, "waited_seconds", lambda: waited)
    clock = StepClock(torch.device("cpu"))
    now = 10.0
    clock.begin()
    now, waited = 13.0, 2.0
    clock.ended("plan")
    for _ in range(2):
        now += 4.0
        clock.ended("forward")
        now += 8.0
        clock.ended("backward")
    now += 1.0
    clock.host_waited("waiting")
    assert clock.seconds() == {"plan": 1.0, "forward": 8.0, "backward": 16.0, "waiting": 1.0}
    clock.begin()
    assert clock.seconds() == {}


def test_on_a_gpu_the_times_are_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, for none of which the host waits."""
    recorded: list[SimpleNamespace] = []

    def event(*, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        number = len(recorded)
        one = SimpleNamespace(
            number=number,
            record=lambda: recorded.append(one),
            elapsed_time=lambda end: 500.0 * (end.number - number),
        )
        return one

    monkeypatch.setattr(torch.cuda, "Event", event)
    clock = StepClock(torch.device("cuda", 0))
    clock.begin()
    clock.ended("plan")
    clock.ended("forward")
    clock.host_waited("waiting")
    assert clock.seconds() == {"plan": 0.5, "forward": 0.5}
    assert len(recorded) == 4
