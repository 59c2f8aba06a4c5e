"""Workers without Ray: two processes, orders through the store, and what they tell of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hecate.config import load_config, to_yaml
from hecate.launch.ray_job.order_store import Rendezvous
from hecate.parallel.topology import local_topology
from hecate.parallel.topology_file import topology_text
from tests.launch.processes import OVERRIDES, losses
from tests.tiny_run import make_workshop

PROGRAM = """
import json, sys
from hecate.launch.ray_job.worker import Worker
for event in Worker(*json.loads(sys.argv[1])).events():
    print("event", json.dumps(event), flush=True)
"""
RANKS = 2
STEPS, ENDLESS = 12, 100000


class Told:
    """A worker's process, and its events in their order."""

    def __init__(self, given: list[Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, json.dumps(given)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of the kind; those before it may be of other kinds, but for errors."""
        while (event := self._events.get(timeout=90))["kind"] != kind:
            assert event["kind"] not in ("failed", "mistake"), event["text"]
        return event

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("event "):
                self._events.put(json.loads(line.removeprefix("event ")))


class Crew:
    """Workers, and the orders that a controller would give them."""

    def __init__(self, config: str) -> None:
        self.rendezvous = Rendezvous("127.0.0.1")
        given = [self.rendezvous.host, self.rendezvous.port, self.rendezvous.secret, config, 1, "127.0.0.1"]
        self.workers = [Told([number, *given]) for number in range(RANKS)]
        self._orders = [0] * RANKS

    def tell(self, number: int, method: str, *arguments: Any) -> None:
        self.rendezvous.order(number, self._orders[number], method, arguments)
        self._orders[number] += 1

    def assign(self, method: str, generation: int, numbers: list[int]) -> None:
        """Tell these workers to be the ranks of a generation."""
        topology = topology_text(local_topology(len(numbers), cuda=False))
        same = {"host": self.rendezvous.host, "port": self.rendezvous.port, "nodes": ["one"] * len(numbers), "topology": topology}
        for rank, number in enumerate(numbers):
            place = {"generation": generation, "rank": rank, "world_size": len(numbers), **same, "resume": False}
            self.tell(number, method, place)


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
        worker.process.wait()


@pytest.mark.parametrize("crew", [STEPS], indirect=True)
def test_ranks_begin_as_they_are_told_and_tell_of_every_step(crew: Crew) -> None:
    pids = [worker.until("up")["pid"] for worker in crew.workers]
    assert pids == [worker.process.pid for worker in crew.workers]
    crew.assign("begin", 0, [1, 0])
    first, second = crew.workers[1], crew.workers[0]
    begun = [worker.until("begins") for worker in (first, second)]
    assert begun[0]["rows"] == [2, 2]
    assert sum(begun[0]["owned"]) == 3 * 2, "experts times layers"
    reports = [[worker.until("report") for _ in range(STEPS)] for worker in (first, second)]
    assert [[report["step"] for report in told] for told in reports] == [list(range(1, STEPS + 1))] * 2
    assert all("loss" in report for report in reports[0])
    assert not any("loss" in report for report in reports[1]), "the first rank tells what all know"
    for worker in (first, second):
        assert worker.until("finished")["generation"] == 0


@pytest.mark.parametrize("crew", [ENDLESS], indirect=True)
def test_a_rank_left_alone_waits_with_its_state_and_goes_on(crew: Crew, workshop: Path) -> None:
    """One of two is killed. The other breaks off, tells that it waits, goes on alone without losing a step, and stops as it is told."""
    for worker in crew.workers:
        worker.until("up")
    crew.assign("begin", 0, [0, 1])
    stays, dies = crew.workers
    for _ in range(3):
        stays.until("report")
    os.kill(dies.process.pid, signal.SIGKILL)
    crew.tell(0, "interrupt", 0)
    assert stays.until("regrouping")["generation"] == 0
    crew.assign("join", 1, [0])
    again = stays.until("begins")
    for _ in range(3):
        step = stays.until("report")["step"]
    assert step > again["step"]
    crew.tell(0, "stop")
    saved = stays.until("saved")
    assert stays.until("stopped")["generation"] == 1
    steps = losses(workshop / "runs" / str(ENDLESS))
    assert saved["step"] == max(steps)
    missing = set(range(1, saved["step"] + 1)) - set(steps)
    assert len(missing) <= 1, "a step that was at its end when a rank was lost is finished, without a record"
