"""Workers without Ray: two processes receive orders through the store and report events."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate.config import load_config, to_yaml
from hecate.elastic.run_controller import BeginFacts, StepFacts
from hecate.launch.ray_job import worker as worker_module
from hecate.launch.ray_job.messages import (
    Assignment,
    Begin,
    CheckpointSaved,
    Interrupt,
    Join,
    LeftGeneration,
    Outcome,
    PartBuilt,
    Prepared,
    StepsDone,
    StepTotals,
    Stop,
    TrainingEnded,
    WorkerEvent,
    WorkerOrder,
    WorkerUp,
    event_from_json,
)
from hecate.launch.ray_job.rendezvous import Rendezvous
from hecate.launch.ray_job.worker import TrainingLink, Worker
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cluster.topology_file import topology_text
from hecate.ranks import ranks as ranks_module
from hecate.ranks.ranks import Ranks
from testing.processes import OVERRIDES, losses
from testing.ranks import fork_server_process
from testing.tiny_run import make_workshop

RANKS = 2
STEPS, ENDLESS = 12, 100000


E = TypeVar("E", bound=WorkerEvent)


def work(given: list[Any], events: Connection) -> None:
    """Run a worker, and send each of its events."""
    torch.set_num_threads(1)
    for event in Worker(*given).events():
        events.send(event)


class Told:
    """A worker's process, and its events in the order in which they arrive."""

    def __init__(self, given: list[Any]) -> None:
        self._receiver, sender = Pipe(duplex=False)
        self.process = fork_server_process(work, (given, sender))
        self.process.start()
        sender.close()
        self._events: queue.Queue[WorkerEvent] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def until(self, kind: type[E]) -> E:
        """The next event of a kind. Events of other kinds are skipped, except errors."""
        while not isinstance(event := self._events.get(timeout=90), kind):
            assert not isinstance(event, TrainingEnded), event
        return event

    def _read(self) -> None:
        with suppress(EOFError):
            while True:
                self._events.put(event_from_json(self._receiver.recv()))


class Crew:
    """Workers, and the orders that a controller would give them."""

    def __init__(self, config: str) -> None:
        self.rendezvous = Rendezvous("127.0.0.1")
        given = [self.rendezvous.host, self.rendezvous.port, self.rendezvous.secret, config, 1, "127.0.0.1"]
        self.workers = [Told([number, *given]) for number in range(RANKS)]
        self._orders = [0] * RANKS

    def send(self, number: int, order: WorkerOrder) -> None:
        self.rendezvous.send(number, self._orders[number], order)
        self._orders[number] += 1

    def assign(self, kind: type[Begin] | type[Join], generation: int, numbers: list[int]) -> None:
        """Order these workers to be the ranks of a generation."""
        for rank, number in enumerate(numbers):
            assignment = Assignment(
                generation=generation,
                rank=rank,
                world_size=len(numbers),
                nodes=("one",) * len(numbers),
                topology=topology_text(local_topology(len(numbers), cuda=False)),
                resume=False,
            )
            self.send(number, kind(assignment=assignment))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def crew(workshop: Path, request: pytest.FixtureRequest) -> Iterator[Crew]:
    overrides = [*OVERRIDES, f"output_dir={workshop}/runs/{request.param}", "fssdp.redundancy=1", f"max_steps={request.param}"]
    made = Crew(to_yaml(replace(load_config(workshop / "config.yaml", overrides), topology="auto")))
    yield made
    for worker in made.workers:
        worker.process.kill()
        worker.process.join()


@pytest.mark.parametrize("crew", [STEPS], indirect=True)
def test_ranks_begin_as_they_are_told_and_tell_of_every_step(crew: Crew) -> None:
    pids = [worker.until(WorkerUp).pid for worker in crew.workers]
    assert pids == [worker.process.pid for worker in crew.workers]
    crew.assign(Begin, 0, [1, 0])
    first, second = crew.workers[1], crew.workers[0]
    begun = [worker.until(PartBuilt) for worker in (first, second)]
    assert begun[0].sequences == (2, 2)
    assert sum(begun[0].owned) == 3 * 2, "experts times layers"
    reports = [[worker.until(StepsDone) for _ in range(STEPS)] for worker in (first, second)]
    assert [[report.step for report in told] for told in reports] == [list(range(1, STEPS + 1))] * 2
    for worker in (first, second):
        assert worker.until(TrainingEnded) == TrainingEnded(generation=0, outcome=Outcome.FINISHED)


def totals_told(rank: int, seconds: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of which a rank sends the totals, where it reports each tenth step, of a run whose steps end at these moments."""
    clock = iter(seconds)
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    begins = Assignment(generation=0, rank=rank, world_size=2, nodes=("a", "a"), topology=None, resume=False)
    link = TrainingLink(events, 10, begins, lambda _: dist.HashStore())
    topology = local_topology(2, cuda=False)
    link.begins(BeginFacts(step=0, max_steps=len(seconds), sequences=(1, 1), owned=(1, 1), topology=topology))
    for step in range(1, len(seconds) + 1):
        facts = StepFacts(
            step=step, seconds=0.5, dense_tokens=1, dense_seconds=0.1, loss=1.0, tokens=8, imbalance=1.0, bytes_sent=0, loads={}
        )
        link.stepped(facts)
    told = [events.get() for _ in range(events.qsize())]
    assert all(one.tokens_per_s == 16 for one in told if isinstance(one, StepTotals))
    return [one.step for one in told if isinstance(one, StepTotals)]


def test_the_first_rank_tells_its_step_once_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert totals_told(0, [10.0, 10.4, 11.1, 11.2, 11.3], monkeypatch) == [1, 3, 5]
    assert totals_told(0, [10.0, 12.0, 14.0], monkeypatch) == [1, 2, 3], "slow steps are told one by one"
    assert totals_told(1, [10.0, 12.0, 14.0], monkeypatch) == [], "the first rank tells what all know"


@pytest.mark.parametrize("crew", [ENDLESS], indirect=True)
def test_a_rank_left_alone_waits_with_its_state_and_goes_on(crew: Crew, workshop: Path) -> None:
    """One of two workers is killed. The other breaks off, reports that it waits, goes on without losing a step, and stops as ordered."""
    for worker in crew.workers:
        worker.until(WorkerUp)
    crew.assign(Begin, 0, [0, 1])
    stays, dies = crew.workers
    for _ in range(3):
        stays.until(StepsDone)
    os.kill(dies.process.pid, signal.SIGKILL)
    crew.send(0, Interrupt(generation=0))
    assert stays.until(LeftGeneration).generation == 0
    crew.assign(Join, 1, [0])
    again = stays.until(PartBuilt)
    for _ in range(3):
        step = stays.until(StepsDone).step
    assert step > again.step
    crew.send(0, Stop())
    saved = stays.until(CheckpointSaved)
    assert stays.until(TrainingEnded) == TrainingEnded(generation=1, outcome=Outcome.STOPPED)
    steps = losses(workshop / "runs" / str(ENDLESS))
    assert saved.step == max(steps)
    missing = set(range(1, saved.step + 1)) - set(steps)
    assert len(missing) <= 1, "a step that was at its end when a rank was lost is finished, without a record"


class Joining:
    """A worker in this process whose new rank is let into generations, and a stand-in for what connects it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranks = mock.create_autospec(Ranks, instance=True)
        self.connect = mock.Mock(return_value=self.ranks)
        self.others = 1
        """how many other ranks are about to connect in each generation"""
        monkeypatch.setattr(ranks_module, "connect", self.connect)
        with mock.patch.dict(os.environ):
            self.worker = Worker(0, "127.0.0.1", 1, "secret", "", 1, "127.0.0.1")
        self.events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self.worker._link = self.link = TrainingLink(self.events, 1, None, lambda _: self._store())

    def _store(self) -> dist.Store:
        made = dist.HashStore()
        made.add("ranks-connecting", self.others)
        return made

    def order_to_join(self, generation: int) -> None:
        topology = topology_text(local_topology(2, cuda=False))
        assignment = Assignment(generation=generation, rank=1, world_size=2, nodes=("one", "one"), topology=topology, resume=False)
        self.worker._carry_out(Join(assignment=assignment))


def test_a_rank_interrupted_while_it_connects_breaks_off_when_it_has_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining(monkeypatch)
    joining.order_to_join(3)
    joining.connect.side_effect = lambda *_, **__: (joining.worker._carry_out(Interrupt(generation=3)), mock.DEFAULT)[1]
    assert joining.link.first_group().ranks is joining.ranks
    joining.ranks.abort.assert_called_once_with()


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "comes"])
def test_a_rank_does_not_connect_in_vain(monkeypatch: pytest.MonkeyPatch, *, waits: bool) -> None:
    """It is interrupted while it waits for a rank that never comes, or before it comes itself."""
    joining = Joining(monkeypatch)
    joining.order_to_join(3)
    joining.order_to_join(4)
    joining.others = 0 if waits else 1

    def is_interrupted(_: float = 0) -> None:
        joining.others = 1
        joining.worker._carry_out(Interrupt(generation=3))

    monkeypatch.setattr(worker_module.time, "sleep", mock.Mock(side_effect=is_interrupted))
    if not waits:
        is_interrupted()
    joining.link.first_group()
    assert (joining.connect.call_count, joining.link.generation) == (1, 4)
    joining.ranks.abort.assert_not_called()


def test_an_interrupt_of_an_earlier_generation_breaks_off_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining(monkeypatch)
    joining.worker._carry_out(Interrupt(generation=2))
    joining.order_to_join(3)
    joining.link.first_group()
    joining.ranks.abort.assert_not_called()


def test_why_a_rank_could_not_connect_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    joining = Joining(monkeypatch)
    for generation in (3, 4):
        joining.order_to_join(generation)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5555")
    joining.connect.side_effect = [lost, joining.ranks]
    joining.link.first_group()
    assert capsys.readouterr().err == "hecate: rank 1 could not connect in generation 3: another rank closed its connection\n"
    assert [type(joining.events.get(timeout=1)) for _ in range(2)] == [Prepared, Prepared], "it waits for the next generation"


def test_too_little_memory_to_connect_is_no_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining(monkeypatch)
    joining.order_to_join(3)
    joining.link.assignments.put(None)
    joining.connect.side_effect = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        joining.link.first_group()
