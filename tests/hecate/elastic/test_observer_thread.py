"""Whatever an observer does, who tells it something never waits, and the user knows what it was not told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hecate.elastic import observer_thread
from hecate.elastic.observer import BeginFacts, StepFacts
from hecate.elastic.observer_thread import ObserverThread
from hecate.parallel.cluster.topology import local_topology
from hecate.report.tracking.call_thread import CallThread

BEGUN = BeginFacts(step=0, max_steps=9, sequences=(1,), owned=(3,), topology=local_topology(1, cuda=False))


def facts(step: int) -> StepFacts:
    figures = {"seconds": 1.0, "dense_seconds": 0.5, "loss": 1.0, "imbalance": 1.0}
    return StepFacts(step=step, dense_tokens=4, tokens=4, bytes_sent=0, loads={}, **figures)


class Slow:
    """Writes down what it is told, and at a step waits until it is released, or raises."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.at, self.error = at, error
        self.reached, self.released, self.caught_up = threading.Event(), threading.Event(), threading.Event()
        self.told: list[object] = []

    def begins(self, facts: BeginFacts) -> None:
        self.told.append(facts)

    def stepped(self, facts: StepFacts) -> None:
        if facts.step == self.at:
            self.reached.set()
            if self.error is not None:
                raise self.error
            assert self.released.wait(60)
        self.told.append(facts.step)
        if facts.step == 5:
            self.caught_up.set()

    def saved(self, step: int, path: Path) -> None:
        self.told.append((step, path))


@pytest.fixture
def hanging() -> Iterator[Slow]:
    """One that hangs at step 2 and is released after the test at the latest."""
    observer = Slow(at=2)
    yield observer
    observer.released.set()


def test_events_arrive_whole_and_in_their_order() -> None:
    observer, said = Slow(), list[str]()
    with ObserverThread(observer, said.append) as thread:
        thread.begins(BEGUN)
        for step in range(1, 50):
            thread.stepped(facts(step))
            thread.saved(step, Path(f"checkpoint-{step}"))
    assert observer.told == [BEGUN, *(one for step in range(1, 50) for one in (step, (step, Path(f"checkpoint-{step}"))))]
    assert said == []


def test_what_an_observer_that_hangs_is_not_told_is_counted(hanging: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_thread, "MOST_WAITING", 3)
    said: list[str] = []
    thread = ObserverThread(hanging, said.append)
    thread.stepped(facts(1))
    thread.stepped(facts(2))
    assert hanging.reached.wait(60)
    for step in range(3, 10):
        thread.stepped(facts(step))
    assert said == ["the run's observer is 3 events behind; it is not told of further ones while it has no room"]
    monkeypatch.setattr(observer_thread, "PATIENCE", 0.0)
    thread.stepped(facts(10))
    thread.stepped(facts(11))
    assert said[1:] == ["the run's observer has not answered for 0 s; the run goes on without waiting for it"]
    monkeypatch.setattr(observer_thread, "PATIENCE", 60.0)
    hanging.released.set()
    assert hanging.caught_up.wait(60)
    thread.stepped(facts(12))
    assert len(said) == 2, "it is named once, and all others are counted"
    monkeypatch.setattr(observer_thread, "LAST_SECONDS", 60.0)
    thread.close()
    assert hanging.told == [1, 2, 3, 4, 5, 12]
    assert said[2:] == ["the run's observer was not told of so many events, because it was behind: 6"]


def test_the_end_of_a_run_waits_a_bounded_time(hanging: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_thread, "LAST_SECONDS", 0.05)
    said: list[str] = []
    with ObserverThread(hanging, said.append) as thread:
        thread.stepped(facts(2))
        assert hanging.reached.wait(60)
        thread.stepped(facts(3))
    thread.close()
    assert said == [
        "the run ends without its observer, which has not returned from what it was told last",
        "the run's observer was not told of so many events, because it was behind: 1",
    ]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit("over\nand out")], ids=lambda one: type(one).__name__)
def test_an_observer_that_raises_is_named_once_and_told_no_more(error: BaseException) -> None:
    observer, said = Slow(at=2, error=error), list[str]()
    with ObserverThread(observer, said.append) as thread:
        for step in range(1, 6):
            thread.stepped(facts(step))
    assert observer.told == [1]
    reason = "over and out" if isinstance(error, SystemExit) else "[Errno 28] No space left on device"
    assert said == [f"the run's observer failed: {reason}; the run goes on without it"]


def test_calls_are_made_one_after_another_until_one_raises() -> None:
    thread, made = CallThread("calls", 10), list[int]()

    def fail() -> None:
        raise KeyError("gone")

    assert all(thread.hand_over(call) for call in (lambda: made.append(1), lambda: made.append(2), fail, lambda: made.append(3)))
    thread.end()
    assert thread.wait(60)
    assert (made, thread.error, thread.silent_for) == ([1, 2], "'gone'", 0.0)
