"""The same loss has the same answer under each launcher: on one machine (files), on two nodes (messages), and on Ray.

Processes, nodes and actors are stand-ins, which do at once what they are told. Each job has four devices, two on each node.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast
from unittest import mock

import pytest
import torch.distributed as dist

from hecate.config import Config, load_config
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.launch import local_launcher, surviving_nodes
from hecate.launch.local_launcher import watch
from hecate.launch.membership.job_policy import JobPolicy, Limits
from hecate.launch.membership.job_states import State
from hecate.launch.node_messages import JobShape, MessageStore, NodeReport, read_orders
from hecate.launch.policy.devices import Device
from hecate.launch.rank_command import RankCommand
from hecate.launch.ray_job import controller
from hecate.launch.ray_job.controller import Controller
from hecate.launch.ray_job.messages import (
    Begin,
    Interrupt,
    Join,
    Leave,
    LeftGeneration,
    Outcome,
    PartBuilt,
    Prepare,
    Prepared,
    Stop,
    TrainingEnded,
    WorkerEvent,
    WorkerLost,
    WorkerOrder,
    WorkerUp,
)
from hecate.launch.ray_job.worker_group import JobDevice, WorkerGroup
from hecate.launch.surviving_nodes import _Nodes
from hecate.launch.surviving_ranks import SurvivingRanks
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cluster.topology_file import topology_text
from hecate.ranks.launcher_files import error_file, ready_file
from testing.tiny_run import make_workshop
from tests.launch.stand_ins import StandIn, StandInMachines

ALL = (0, 1, 2, 3)
OF_NODE = {0: (0, 1), 1: (2, 3)}


class Job(Protocol):
    """A job under one of the launchers. What is to happen to it is given before it runs: each act comes when nothing else is under way."""

    trained: list[tuple[int, ...]]
    """the devices of each generation"""

    def run(self, acts: Sequence[Callable[[Job], None]]) -> int: ...
    def die(self, *devices: int) -> None: ...
    def halt(self, device: int) -> None: ...
    def lose_second_node(self) -> None: ...
    def get_second_node(self) -> None: ...
    def mistake(self, device: int) -> None: ...
    def stop(self) -> None: ...
    def finish(self) -> None: ...


class OnMachine:
    """A job of the launcher of one machine. Another node is so many devices that are gone."""

    def __init__(self, folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.trained = folder / "store", list[tuple[int, ...]]()
        self.policy = JobPolicy(copied=config.fssdp.redundancy > 0, fewest_to_begin=2, limits=Limits(end=0.0, cause=0.0, wait=60.0))
        self.acts: list[Callable[[Job], None]] = []
        self.monkeypatch = monkeypatch
        self.halted: set[int] = set()
        self.quiet, self.seen = 0, -1
        self.ranks = self.begin()
        monkeypatch.setattr(local_launcher, "time", SimpleNamespace(sleep=self.go_on))
        monkeypatch.setattr(self.ranks._stopped, "look", self.halted_of)

    def begin(self) -> SurvivingRanks:
        self.machines = StandInMachines(4)
        return SurvivingRanks(self.machines, self.store, self.policy)

    def halted_of(self, pid_of: dict[int, int]) -> dict[int, float]:
        return {device: 2.0 for device in pid_of if self.ranks.member_on[device] in self.halted}

    def run(self, acts: Sequence[Callable[[Job], None]]) -> int:
        self.acts = list(acts)
        return watch(self.ranks)

    def process(self, device: int) -> Any:
        return self.ranks.processes[self.ranks.member_on[device]]

    def go_on(self, _: float) -> None:
        """In place of a moment's sleep: everybody does what he is told; if nobody has anything to do, the next act comes."""
        now = tuple(sorted(self.ranks.state.generation.members))
        quiet = self.ranks.state.generation.number == self.seen
        if not quiet:
            self.trained.append(now)
            self.seen = self.ranks.state.generation.number
        for device, member in self.ranks.member_on.items():
            if self.process(device).poll() is None and not ready_file(self.store, member).exists():
                ready_file(self.store, member).touch()
                (self.store.parent / f"pid-{member}").write_text(str(2**22 + member))
                quiet = False
        self.quiet = self.quiet + 1 if quiet else 0
        if self.quiet == 2 and self.acts:
            self.acts.pop(0)(self)
            self.quiet = 0
        assert self.quiet < 20, "the job goes on after the end of the script"

    def die(self, *devices: int) -> None:
        for device in devices:
            self.process(device).returncode = -signal.SIGKILL

    def halt(self, device: int) -> None:
        self.halted = {self.ranks.member_on[device]}

    def lose_second_node(self) -> None:
        self.machines.gone = set(OF_NODE[1])
        self.die(*OF_NODE[1])

    def get_second_node(self) -> None:
        for device in self.ranks.state.generation.members:
            self.process(device).saves = True
        self.machines.gone = set()

    def mistake(self, device: int) -> None:
        error_file(self.store.parent, self.ranks.member_on[device]).write_text("hecate: no such model")
        self.process(device).returncode = 2

    def stop(self) -> None:
        for device in self.ranks.state.generation.members:
            self.process(device).saves = True
        self.ranks.stopping = True

    def finish(self) -> None:
        for device in self.ranks.state.generation.members:
            self.process(device).returncode = 0


class OnNodes(OnMachine):
    """A job of the launchers of two nodes, of which the second is a stand-in that follows orders."""

    def begin(self) -> SurvivingRanks:
        own = mock.create_autospec(RankCommand, instance=True)
        own.store, own.start.side_effect = self.store, lambda *_: StandIn()
        job = JobShape("job", 1, 2, 2, survives=self.policy.copied, output_dir="x")
        self.monkeypatch.setattr(surviving_nodes, "_LOOK_SECONDS", 0.0)
        waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: self.follow())
        self.monkeypatch.setattr(surviving_nodes, "time", waiting)
        self.words, self.number, self.beat = MessageStore(dist.HashStore()), 0, 0
        self.there: dict[int, StandIn] = {}
        self.nodes = _Nodes(self.words, job, own)
        self.get_second_node()
        self.nodes.wait_for_all()
        self.nodes.surviving = SurvivingRanks(self.nodes, self.store, self.policy)
        return self.nodes.surviving

    def follow(self, *, leaves: bool = False) -> None:
        """Do what the orders say, and report."""
        self.nodes.exchange()
        for name, order in read_orders(self.words.orders()).members.items():
            if order.node == self.number:
                process = self.there.setdefault(int(name), StandIn())
                for one in order.signals:
                    process.send_signal(one)
        ended = {str(member): process.returncode for member, process in self.there.items() if process.returncode is not None}
        files = tuple(f"ready-{member}" for member in self.there)
        mistakes = {member: "hecate: no such model" for member, status in ended.items() if status == 2}
        self.beat += 1
        self.words.report(self.number, NodeReport(self.beat, "10.0.0.2", ended, files, mistakes, stopping=False, leaves=leaves))
        self.nodes.exchange()

    def process(self, device: int) -> Any:
        member = self.ranks.member_on[device]
        return self.there.get(member) or self.ranks.processes[member]

    def go_on(self, seconds: float) -> None:
        if self.number:
            self.follow()
        super().go_on(seconds)

    def die(self, *devices: int) -> None:
        super().die(*devices)
        self.follow()

    def halt(self, device: int) -> None:
        self.die(device) if device in OF_NODE[1] else super().halt(device)  # the second node's launcher looks at its own

    def lose_second_node(self) -> None:
        self.follow(leaves=True)
        self.number = 0

    def get_second_node(self) -> None:
        if self.number == 0 and hasattr(self, "ranks"):
            for device in self.ranks.state.generation.members:
                self.process(device).saves = True
        self.there = {}
        self.number = self.words.arrive(NodeReport(0, "10.0.0.2", {}, (), {}, stopping=False, leaves=False))


class OnRay:
    """A job of the Ray controller, in place of whose actors and cluster is this object (a `WorkerGroup`)."""

    def __init__(self, _: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[int, ...]] = []
        self.devices = [JobDevice(one, Device(f"node{one // 2}", "127.0.0.1", "CPU", (("CPU", 1.0),), ())) for one in ALL]
        self.events: list[tuple[JobDevice, WorkerEvent]] = []
        self.quiet = 0
        self.gone: set[int] = set()
        self.requested: set[int] = set()
        self.halted: set[int] = set()
        self.generation: dict[int, int] = {}
        monkeypatch.setattr(controller, "_DEATH_SECONDS", 0.0)
        monkeypatch.setattr(controller, "_PAUSE_SECONDS", 0.0)
        monkeypatch.setattr(controller, "_LAST_OUTPUT_SECONDS", 0.0)
        monkeypatch.setattr(controller, "latest_good", lambda _: Path("checkpoint-3"))
        self.controller = Controller(cast(WorkerGroup, self), config, local_topology(4, cuda=False), lambda _: None, lambda _: None)

    def run(self, acts: Sequence[Callable[[Job], None]]) -> int:
        self.acts = list(acts)
        return self.controller.run()

    def reserve(self, timeout: float) -> None: ...
    def keep_spares(self) -> None: ...
    def close(self) -> None: ...

    def ready_spares(self) -> int:
        return 0

    def ping(self, device: JobDevice, now: float) -> float:
        return 0.0

    def node_lives(self, device: JobDevice) -> bool:
        return device.index not in self.gone

    def stopped(self) -> list[tuple[JobDevice, float]]:
        return [(self.devices[one], 2.0) for one in self.halted if self.devices[one].alive]

    def request_worker(self, device: JobDevice) -> None:
        if device.index in self.gone:
            self.requested.add(device.index)
        else:
            up = WorkerUp(pid=1, host="h", gpus=None, versions={"hecate": "1"})
            self.events.append((device, up))

    def kill(self, device: JobDevice) -> None:
        device.up = None
        self.halted.discard(device.index)
        self.events = [(one, event) for one, event in self.events if one is not device]

    def poll(self, timeout: float) -> list[tuple[JobDevice, WorkerEvent]]:
        self.quiet = 0 if self.events or self.controller.shown.state is not State.RUNNING else self.quiet + 1
        if self.quiet > 1:
            self.acts.pop(0)(self)
        events, self.events = self.events, []
        for device, event in events:
            if isinstance(event, WorkerUp):
                device.up = event
            if isinstance(event, WorkerLost):
                device.up = None
        return events

    def send(self, device: JobDevice, order: WorkerOrder) -> None:
        number = self.generation.get(device.index, -1)
        match order:
            case Begin() | Join():
                given = order.assignment
                if given.rank == 0:
                    self.trained.append(tuple(sorted(self.controller._state.generation.members)))
                self.generation[device.index] = given.generation
                topology, alike = topology_text(local_topology(given.world_size, cuda=False)), (2,) * given.world_size
                self.events.append((device, PartBuilt(step=0, max_steps=9, sequences=alike, owned=alike, topology=topology)))
            case Prepare():
                self.events.append((device, Prepared()))
            case Interrupt() | Leave():
                self.events.append((device, LeftGeneration(generation=number)))
            case Stop():
                self.events.append((device, TrainingEnded(generation=number, outcome=Outcome.STOPPED)))

    def die(self, *devices: int) -> None:
        self.events += [(self.devices[one], WorkerLost(text="gone")) for one in devices]

    def halt(self, device: int) -> None:
        self.halted = {device}

    def lose_second_node(self) -> None:
        self.gone = set(OF_NODE[1])
        self.die(*OF_NODE[1])

    def get_second_node(self) -> None:
        self.gone, requested, self.requested = set(), self.requested, set()
        for device in sorted(requested):
            self.request_worker(self.devices[device])

    def mistake(self, device: int) -> None:
        end = TrainingEnded(generation=self.generation[device], outcome=Outcome.USER_ERROR, text="no such model")
        self.events.append((self.devices[device], end))

    def stop(self) -> None:
        self.controller.stop_wanted = True

    def finish(self) -> None:
        for device in self.controller._state.generation.members:
            end = TrainingEnded(generation=self.generation[device], outcome=Outcome.FINISHED)
            self.events.append((self.devices[device], end))


Act = Callable[[Job], None]
FINISH: Act = lambda job: job.finish()  # noqa: E731 - an act like the others
LOSE: Act = lambda job: job.lose_second_node()  # noqa: E731
GET: Act = lambda job: job.get_second_node()  # noqa: E731
STOP: Act = lambda job: job.stop()  # noqa: E731


def dies(*devices: int) -> Act:
    return lambda job: job.die(*devices)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("kind", [OnMachine, OnNodes, OnRay])
@pytest.mark.parametrize(
    ("copies", "acts", "trained", "status"),
    [
        (True, [FINISH], [ALL], 0),
        (True, [STOP], [ALL], 0),
        (True, [dies(1), FINISH], [ALL, (0, 2, 3), ALL], 0),
        (True, [dies(0), FINISH], [ALL, (1, 2, 3), ALL], 0),
        (True, [dies(3), dies(2), FINISH], [ALL, (0, 1, 2), ALL, (0, 1, 3), ALL], 0),
        (True, [lambda job: job.halt(1), FINISH], [ALL, (0, 2, 3), ALL], 0),
        (True, [lambda job: job.halt(3), FINISH], [ALL, (0, 1, 2), ALL], 0),
        (True, [LOSE, FINISH], [ALL, (0, 1)], 0),
        (True, [LOSE, GET, FINISH], [ALL, (0, 1), ALL], 0),
        (False, [dies(1), FINISH], [ALL, ALL], 0),
        (False, [lambda job: job.halt(1), FINISH], [ALL, ALL], 0),
        (False, [dies(1), dies(3), FINISH], [ALL, ALL, ALL], 0),
        (False, [LOSE, FINISH], [ALL, (0, 1)], 0),
        (False, [LOSE, GET, FINISH], [ALL, (0, 1), ALL], 0),
        (False, [dies(*ALL), FINISH], [ALL, ALL], 0),
        (False, [LOSE, GET, STOP], [ALL, (0, 1), ALL], 0),
        (True, [lambda job: job.mistake(2)], [ALL], 2),
        (False, [lambda job: job.mistake(0)], [ALL], 2),
        (False, [dies(1)] * 4, [ALL] * 4, 1),
    ],
)
def test_the_three_answer_alike(
    kind: type[Any],
    copies: bool,
    acts: list[Act],
    trained: list[tuple[int, ...]],
    status: int,
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The devices of all generations and the exit status are the same, whatever the ranks live in."""
    overrides = [f"output_dir={tmp_path}/runs/x", "ray.min_workers=2", "ray.max_failures=3", f"fssdp.redundancy={int(copies)}"]
    job = kind(tmp_path, load_config(workshop / "config.yaml", overrides), monkeypatch)
    found = exit_status(lambda: job.run(acts))
    assert (job.trained, found) == (trained, status)


def exit_status(run: Callable[[], int]) -> int:
    """As `hecate` has it."""
    try:
        return run()
    except UserError:
        return USER_ERROR_EXIT
