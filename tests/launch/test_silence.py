"""How long a worker has been silent: asked now and then, and not counted while nobody was there to hear it."""

from __future__ import annotations

from typing import Any

from hecate.launch.awake_clock import AwakeClock
from hecate.launch.resource_pool import Device
from hecate.launch.worker_group import WorkerGroup


class Pinged:
    """In the place of Ray and of an actor: every question gets a number; those in `answered` have an answer."""

    def __init__(self) -> None:
        self.asked = 0
        self.answered: set[int] = set()
        self.ping = self

    def remote(self) -> int:
        self.asked += 1
        return self.asked

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        assert timeout == 0
        return [r for r in references if r in self.answered], [r for r in references if r not in self.answered]


def test_a_worker_is_asked_every_other_second_and_silent_until_it_answers() -> None:
    ray: Any = Pinged()
    group = WorkerGroup(ray, [Device("node", "127.0.0.1", "CPU", (("CPU", 1.0),), ())], config="", report_steps=1, address=None)
    place = group.places[0]
    place.actor = ray
    assert group.ping(place, 100.0) == 0.0
    assert group.ping(place, 101.0) == 1.0
    ray.answered.add(1)
    assert [group.ping(place, now) for now in (101.1, 101.9)] == [0.0, 0.0]
    assert ray.asked == 1, "an answer costs the training a moment"
    assert group.ping(place, 102.0) == 0.0
    assert ray.asked == 2
    assert group.ping(place, 113.0) == 11.0


def test_while_this_process_stands_still_nobody_is_silent() -> None:
    times = iter([50.0, 50.5, 51.0, 4000.0, 4000.5])
    clock = AwakeClock(lambda: next(times))
    assert [clock(), clock(), clock(), clock()] == [0.5, 1.0, 3.0, 3.5]
