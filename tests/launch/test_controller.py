"""The Ray controller without Ray: workers are scripted, and the orders that they receive are recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import cast

import pytest

from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.launch.policy.devices import Device
from hecate.launch.ray_job import controller as under_test
from hecate.launch.ray_job.controller import Controller
from hecate.launch.ray_job.messages import (
    Begin,
    CheckpointSaved,
    Interrupt,
    Join,
    Leave,
    LeftGeneration,
    Outcome,
    PartBuilt,
    Prepare,
    Prepared,
    Replan,
    StepsDone,
    StepTotals,
    TrainingEnded,
    WorkerEvent,
    WorkerLost,
    WorkerOrder,
    WorkerUp,
)
from hecate.launch.ray_job.status import JobStatus, read_status, write_status
from hecate.launch.ray_job.worker_group import JobDevice, WorkerGroup
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cluster.topology_file import topology_text
from testing.tiny_run import make_workshop

VERSIONS = {"hecate": "1", "torch": "2", "python": "3"}
TOPOLOGY = topology_text(local_topology(3, cuda=False))
Step = Callable[["Scripted"], Sequence[tuple[int, WorkerEvent]]]


class Scripted:
    """In a WorkerGroup's place: writes down every order; each poll plays the next step of the script; after the last the test fails."""

    def __init__(self, script: list[Step]) -> None:
        self.script = script
        self.sent: list[tuple[int, WorkerOrder]] = []
        self.killed: list[int] = []
        self.devices = [JobDevice(index, Device(f"node{index}", "127.0.0.1", "CPU", (("CPU", 1.0),), ())) for index in range(3)]
        self.dead_nodes: set[int] = set()
        self.silent: set[int] = set()
        self.halted: dict[int, float] = {}
        """device -> how long its worker has been stopped"""
        self.closed = False
        self.controller: Controller | None = None

    def reserve(self, timeout: float) -> None: ...

    def request_worker(self, device: JobDevice) -> None: ...

    def send(self, device: JobDevice, order: WorkerOrder) -> None:
        assert device.alive
        self.sent.append((device.index, order))

    def keep_spares(self) -> None: ...

    def ready_spares(self) -> int:
        return 0

    def poll(self, timeout: float) -> list[tuple[JobDevice, WorkerEvent]]:
        assert self.script, "the job goes on after the end of the script"
        happened = self.script.pop(0)(self)
        for index, event in happened:
            if isinstance(event, WorkerUp):
                self.devices[index].up = event
            if isinstance(event, WorkerLost):
                self.devices[index].up = None
        return [(self.devices[index], event) for index, event in happened]

    def ping(self, device: JobDevice, now: float) -> float:
        return 100.0 if device.index in self.silent else 0.0

    def stopped(self) -> list[tuple[JobDevice, float]]:
        return [(self.devices[index], seconds) for index, seconds in self.halted.items() if self.devices[index].alive]

    def kill(self, device: JobDevice) -> None:
        self.killed.append(device.index)
        device.up = None

    def node_lives(self, device: JobDevice) -> bool:
        return device.index not in self.dead_nodes

    def close(self) -> None:
        self.closed = True

    def receivers(self, kind: type) -> list[int]:
        """The devices that were sent an order of this kind, in the order of sending."""
        return [index for index, order in self.sent if isinstance(order, kind)]

    def joined(self) -> list[tuple[int, int, int]]:
        """(device, generation, world size) of all orders to join."""
        return [(i, order.assignment.generation, order.assignment.world_size) for i, order in self.sent if isinstance(order, Join)]


def each(members: Sequence[int], event: WorkerEvent) -> Step:
    return lambda _: [(index, event) for index in members]


def begins(members: Sequence[int], step: int = 0) -> Step:
    sequences, owned = (2,) * len(members), (4,) * len(members)
    return each(members, PartBuilt(step=step, max_steps=100, sequences=sequences, owned=owned, topology=TOPOLOGY))


def one(index: int, event: WorkerEvent) -> Step:
    return each([index], event)


def up(**versions: str) -> WorkerUp:
    return WorkerUp(pid=1, host="h", gpus=None, versions={**VERSIONS, **versions})


def left(generation: int) -> LeftGeneration:
    return LeftGeneration(generation=generation)


def finished(generation: int) -> TrainingEnded:
    return TrainingEnded(generation=generation, outcome=Outcome.FINISHED)


def failed(generation: int, text: str) -> TrainingEnded:
    return TrainingEnded(generation=generation, outcome=Outcome.FAILED, text=text)


def stopped(generation: int) -> TrainingEnded:
    return TrainingEnded(generation=generation, outcome=Outcome.STOPPED)


def stop_is_asked_for(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
    assert group.controller is not None
    group.controller.stop_wanted = True
    return []


def steps(step: int, tokens: int) -> StepsDone:
    return StepsDone(step=step, dense_tokens=tokens, dense_seconds=1.0, step_seconds=1.0)


def totals(step: int, loss: float = 1.0) -> StepTotals:
    return StepTotals(step=step, loss=loss, tokens_per_s=9.0, imbalance=1.0, bytes_sent=0, loads={})


GONE = WorkerLost(text="gone")
UP = each([0, 1, 2], up())
NOTHING: Step = lambda _: []  # noqa: E731 - a step like the others


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in ("_DEATH_SECONDS", "_PAUSE_SECONDS", "_LAST_OUTPUT_SECONDS"):
        monkeypatch.setattr(under_test, name, 0.0)
    folder = make_workshop(tmp_path)
    overrides = [f"output_dir={folder}/runs/x", "ray.min_workers=2", "ray.max_failures=1", "ray.start_timeout=30", "fssdp.redundancy=1"]
    return load_config(folder / "config.yaml", overrides)


class SteppedClock:
    """In an AwakeClock's place: time passes only as a step of the script says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Step:
        def step(_: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
            self.now += seconds
            return []

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SteppedClock:
    made = SteppedClock()
    monkeypatch.setattr(under_test, "AwakeClock", lambda: made)
    return made


def play(config: Config, *script: Step) -> tuple[int, Scripted, list[JobStatus], list[str]]:
    """Exit status, the group, every status shown, every line said."""
    group, shown, said = Scripted(list(script)), list[JobStatus](), list[str]()
    group.controller = controller = Controller(cast(WorkerGroup, group), config, None, said.append, shown.append)
    try:
        status = controller.run()
    finally:
        assert group.closed, "workers are left behind"
    return status, group, shown, said


def states(shown: list[JobStatus]) -> list[str]:
    return [state for state, _ in groupby(status.state.value for status in shown)]


def test_a_job_from_its_first_worker_to_its_end(config: Config) -> None:
    status, group, shown, _ = play(config, UP, begins([0, 1, 2]), each([0, 1, 2], finished(0)))
    assert status == 0
    assert states(shown) == ["placing", "starting", "running", "finished"]
    begun = [(index, order.assignment) for index, order in group.sent if isinstance(order, Begin)]
    assert [index for index, _ in begun] == [0, 1, 2]
    assert [(a.rank, a.world_size, a.resume, a.topology) for _, a in begun] == [(rank, 3, False, None) for rank in range(3)]


def test_a_dead_process_is_left_out_where_others_have_copies_until_another_has_loaded(config: Config) -> None:
    smaller = (each([0, 2], left(0)), begins([0, 2], 5))
    back = (one(1, up()), one(1, Prepared()))
    larger = (each([0, 2], left(1)), begins([0, 1, 2], 7))
    end = each([0, 1, 2], finished(2))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), one(1, GONE), *smaller, *back, *larger, end)
    assert status == 0
    assert group.joined() == [
        (0, 1, 2), (2, 1, 2), (0, 2, 3), (1, 2, 3), (2, 2, 3),
    ]  # fmt: skip
    assert any("the worker's process died" in line and "the others go on" in line for line in said)


def test_a_dead_process_is_waited_for_where_nobody_has_copies(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "latest_good", lambda _: Path("checkpoint-3"))
    config = replace(config, fssdp=replace(config.fssdp, redundancy=0))
    waits = each([0, 2], left(0))
    back = (one(1, up()), one(1, Prepared()))
    end = each([0, 1, 2], finished(1))
    status, group, shown, said = play(config, UP, begins([0, 1, 2]), one(1, GONE), waits, *back, begins([0, 1, 2], 5), end)
    assert status == 0
    assert states(shown) == ["placing", "starting", "running", "recovering", "starting", "running", "finished"]
    assert group.receivers(Interrupt) == [0, 2], "no message may tell them"
    assert group.receivers(Join) == [0, 1, 2]
    assert group.receivers(Prepare) == [1]
    assert any("the worker's process died" in line and "all wait for another rank" in line for line in said)
    assert [line.split(";")[0] for line in said if line.startswith("generation")] == [
        "generation 0: 3 ranks from step 0", "generation 1: 3 ranks from step 5",
    ]  # fmt: skip


def test_a_second_loss_at_once_is_waited_for(config: Config) -> None:
    """It may have had the only copies of what the first owned."""
    config = replace(config, ray=replace(config.ray, min_workers=1, max_failures=2))
    both = lambda _: [(1, GONE), (2, GONE)]  # noqa: E731
    waits = one(0, left(0))
    back = (one(2, up()), one(2, Prepared()))
    end = each([0, 2], finished(1))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), both, waits, *back, begins([0, 2], 5), end)
    assert status == 0
    assert group.joined() == [(0, 1, 2), (2, 1, 2)]
    assert [word for line in said for word in ("others go on", "all wait") if word in line] == ["others go on", "all wait"]


def test_a_lost_node_is_left_out_and_another_joins_when_it_comes(config: Config) -> None:
    def dies(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.dead_nodes.add(1)
        return [(1, GONE)]

    smaller = (each([0, 2], left(0)), begins([0, 2], 5))
    comes = (one(1, up()), one(1, Prepared()))
    larger = (each([0, 2], left(1)), begins([0, 1, 2], 7))
    end = each([0, 1, 2], finished(2))
    status, group, shown, _ = play(config, UP, begins([0, 1, 2]), dies, *smaller, *comes, *larger, end)
    assert status == 0
    assert states(shown).count("resizing") == 1
    assert group.joined() == [
        (0, 1, 2), (2, 1, 2), (0, 2, 3), (1, 2, 3), (2, 2, 3),
    ]  # fmt: skip
    assert group.receivers(Leave) == [0, 2]


def test_too_few_are_left_and_the_job_waits(config: Config) -> None:
    def two_die(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.dead_nodes.update({1, 2})
        return [(1, GONE)]

    def second(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        return [(2, GONE), (0, left(0))]

    patient = replace(config, ray=replace(config.ray, max_failures=2))
    comes = (one(2, up()), one(2, Prepared()))
    end = each([0, 2], finished(1))
    status, _, shown, _ = play(patient, UP, begins([0, 1, 2]), two_die, second, NOTHING, *comes, begins([0, 2], 5), end)
    assert status == 0
    assert "waiting" in states(shown)


def test_a_stopped_worker_is_ended_by_name_and_the_others_go_on(config: Config) -> None:
    def is_stopped(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.halted[2] = 1.6
        return []

    smaller = (each([0, 1], left(0)), begins([0, 1], 5))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), is_stopped, *smaller, each([0, 1], finished(1)))
    assert status == 0
    assert group.killed == [2]
    assert group.receivers(Interrupt) == [0, 1], "their connections to it stay open"
    assert any("(rank 2): the worker was stopped (for 1.6 s, as by SIGSTOP); the others go on" in line for line in said)


def test_a_rank_that_is_stopped_while_another_is_mourned_is_ended_too(config: Config) -> None:
    config = replace(config, ray=replace(config.ray, min_workers=1))

    def is_stopped(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.halted[2] = 1.6
        return [(1, GONE)]

    waits = one(0, left(0))
    back = (one(2, up()), one(2, Prepared()))
    calm: Step = lambda group: group.halted.clear() or []  # type: ignore[func-returns-value]  # noqa: E731
    end = each([0, 2], finished(1))
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), is_stopped, calm, waits, *back, begins([0, 2], 5), end)
    assert status == 0
    assert group.joined() == [(0, 1, 2), (2, 1, 2)]


def test_a_silent_worker_is_ended_by_name(config: Config) -> None:
    def falls_silent(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.silent.add(2)
        return []

    smaller = (each([0, 1], left(0)), begins([0, 1], 5))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), falls_silent, *smaller, each([0, 1], finished(1)))
    assert status == 0
    assert 2 in group.killed
    assert any("device 2" in line and "did not answer" in line for line in said)


def test_ranks_that_answer_may_load_or_save_for_long_before_they_notice_a_loss(config: Config, clock: SteppedClock) -> None:
    smaller = (clock.passes(20), clock.passes(9), each([0, 2], left(0)), begins([0, 2], 5))
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), one(1, GONE), *smaller, each([0, 2], finished(1)))
    assert status == 0
    assert group.killed == [1]


def test_a_rank_that_falls_silent_while_another_is_mourned_is_ended(config: Config, clock: SteppedClock) -> None:
    def falls_silent(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.silent.add(2)
        return []

    config = replace(config, ray=replace(config.ray, min_workers=1))
    end = (one(0, left(0)), begins([0], 5), one(0, finished(1)))
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), one(1, GONE), falls_silent, *end)
    assert status == 0
    assert group.killed == [1, 2]


def test_of_ranks_that_do_not_end_in_time_one_is_ended_and_the_others_have_as_long_again(config: Config, clock: SteppedClock) -> None:
    hangs = (clock.passes(31), clock.passes(29), one(2, left(0)))
    back = (clock.passes(29), one(0, up()), one(0, Prepared()), begins([0, 2], 5))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), one(1, GONE), *hangs, *back, each([0, 2], finished(1)))
    assert status == 0
    assert group.killed == [1, 0]
    assert any("it went on for 30 s without the others (ray.start_timeout)" in line for line in said)


def test_a_new_worker_that_dies_while_it_loads_interrupts_nobody(config: Config) -> None:
    smaller = (each([0, 2], left(0)), begins([0, 2], 5))
    end = each([0, 2], finished(1))
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), one(1, GONE), *smaller, one(1, up()), one(1, GONE), NOTHING, end)
    assert status == 0
    assert group.receivers(Interrupt) == [0, 2], "for the first loss alone"


def test_a_new_rank_that_could_not_connect_waits_for_the_next_generation(config: Config) -> None:
    config = replace(config, ray=replace(config.ray, max_failures=2))
    smaller = (each([0, 2], left(0)), begins([0, 2], 5))
    larger = (one(1, up()), one(1, Prepared()), each([0, 2], left(1)))
    broken = (one(2, GONE), one(0, left(2)), one(1, Prepared()))
    end = (begins([0, 1], 5), each([0, 1], finished(3)))
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), one(1, GONE), *smaller, *larger, *broken, *end)
    assert status == 0
    assert group.joined()[-2:] == [(0, 3, 2), (1, 3, 2)]


def test_the_ranks_of_a_lost_node_are_one_failure(config: Config) -> None:
    def node_dies(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.dead_nodes.update({1, 2})
        return [(1, GONE), (2, GONE)]

    config = replace(config, ray=replace(config.ray, min_workers=1))
    script = (UP, begins([0, 1, 2]), node_dies, one(0, left(0)), begins([0], 5))
    assert play(config, *script, one(0, finished(1)))[0] == 0


def test_ranks_that_are_to_stop_may_step_and_save_for_long(config: Config, clock: SteppedClock) -> None:
    ends = (one(1, stopped(0)), one(1, GONE), each([0, 2], stopped(0)))
    status, group, shown, _ = play(config, UP, begins([0, 1, 2]), stop_is_asked_for, clock.passes(1000), NOTHING, *ends)
    assert status == 0
    assert states(shown)[-1] == "stopped"
    assert group.killed == []
    assert group.receivers(Interrupt) == [], "the rank that died had saved its part"


def test_ranks_that_are_to_stop_break_off_when_one_is_lost(config: Config, clock: SteppedClock) -> None:
    stops = (UP, begins([0, 1, 2]), stop_is_asked_for, one(1, GONE))
    status, group, shown, said = play(config, *stops, NOTHING, each([0, 2], left(0)))
    assert status == 0
    assert states(shown)[-1] == "stopped"
    assert group.receivers(Interrupt) == [0, 2]
    assert any("(rank 1): the worker's process died (gone); the job stops without it" in line for line in said)
    assert any("no checkpoint" in line for line in said)
    status, _, _, said = play(config, *stops, clock.passes(31))
    assert status == 1
    assert "did not stop in time" in said[-1]


def test_a_rank_that_falls_silent_while_it_is_to_stop_is_ended(config: Config, clock: SteppedClock) -> None:
    def falls_silent(group: Scripted) -> Sequence[tuple[int, WorkerEvent]]:
        group.silent.add(2)
        return []

    status, group, _, _ = play(config, UP, begins([0, 1, 2]), stop_is_asked_for, falls_silent, NOTHING, each([0, 1], left(0)))
    assert status == 0
    assert group.killed == [2]
    assert group.receivers(Interrupt) == [0, 1]


def test_a_stop_that_comes_in_the_last_step_finishes_the_job(config: Config) -> None:
    status, _, shown, _ = play(config, UP, begins([0, 1, 2]), stop_is_asked_for, each([0, 1, 2], finished(0)))
    assert status == 0
    assert states(shown)[-2:] == ["stopping", "finished"]


def test_a_replacement_that_dies_again_and_again_fails_the_job(config: Config) -> None:
    config = replace(config, fssdp=replace(config.fssdp, redundancy=0))
    dies = (one(1, up()), one(1, GONE))
    status, _, _, said = play(config, UP, begins([0, 1, 2]), one(1, GONE), each([0, 2], left(0)), *dies, *dies)
    assert status == 1
    assert "did not come up in time, 2 times in a row" in said[-1]


def test_an_error_is_tried_again_and_then_given_up(config: Config) -> None:
    fails = [each([0, 1, 2], failed(g, "Traceback\nValueError: boom")) for g in range(2)]
    status, _, shown, said = play(config, UP, begins([0, 1, 2]), fails[0], NOTHING, begins([0, 1, 2]), fails[1], NOTHING)
    assert status == 1
    assert states(shown)[-1] == "failed"
    assert "ValueError: boom" in said[-1]


def test_a_rank_whose_training_has_raised_an_error_loads_anew_and_joins(config: Config) -> None:
    fails = (one(1, failed(0, "OSError: boom")), each([0, 2], left(0)), NOTHING)
    smaller, comes = begins([0, 2], 5), one(1, Prepared())
    larger = (each([0, 2], left(1)), begins([0, 1, 2], 7))
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), *fails, smaller, comes, *larger, each([0, 1, 2], finished(2)))
    assert status == 0
    assert group.receivers(Prepare) == [1]
    assert group.joined() == [(0, 1, 2), (2, 1, 2), (0, 2, 3), (1, 2, 3), (2, 2, 3)]


def test_after_an_error_all_begin_again_where_the_others_are_too_few(config: Config) -> None:
    config = replace(config, ray=replace(config.ray, min_workers=3))
    fails = (one(1, failed(0, "OSError: boom")), each([0, 2], left(0)), NOTHING)
    status, group, _, _ = play(config, UP, begins([0, 1, 2]), *fails, begins([0, 1, 2], 5), each([0, 1, 2], finished(1)))
    assert status == 0
    assert group.receivers(Begin) == [0, 1, 2, 0, 1, 2]


def test_a_worker_that_is_lost_while_all_load_is_waited_for(config: Config) -> None:
    """Otherwise the others would measure a topology without it, with which it could never join."""
    fails = each([0, 2], failed(0, "a message among the ranks failed"))
    status, group, _, said = play(
        config, UP, one(1, GONE), fails, one(1, up()), one(1, Prepared()), begins([0, 1, 2]), each([0, 1, 2], finished(1))
    )
    assert status == 0
    assert group.receivers(Begin)[3:] == [0, 1, 2]
    assert any("the worker's process died" in line and "all wait for another rank" in line for line in said)


def test_a_step_in_between_forgives(config: Config) -> None:
    fails = [each([0, 1, 2], failed(g, "ValueError: boom")) for g in range(2)]
    works = one(1, steps(5, tokens=10))
    end = each([0, 1, 2], finished(2))
    script = (UP, begins([0, 1, 2]), fails[0], NOTHING, begins([0, 1, 2]), works, fails[1], NOTHING, begins([0, 1, 2]), end)
    assert play(config, *script)[0] == 0


def test_a_loss_that_is_not_finite_does_not_end_the_job(config: Config, tmp_path: Path) -> None:
    reported = one(0, totals(5, loss=float("nan")))
    status, _, shown, _ = play(config, UP, begins([0, 1, 2]), reported, each([0, 1, 2], finished(0)))
    assert status == 0
    assert (shown[-1].step, shown[-1].loss, shown[-1].tokens_per_s) == (5, None, 9.0)
    write_status(tmp_path, shown[-1])
    assert read_status(tmp_path) == shown[-1]


def test_the_status_has_the_newest_step_whether_it_was_told_or_saved(config: Config) -> None:
    script = (UP, begins([0, 1, 2]), one(0, totals(3)), one(0, CheckpointSaved(step=6, path="/runs/x/checkpoint-6")))
    _, _, shown, _ = play(config, *script, each([0, 1, 2], finished(0)))
    assert [step for step, _ in groupby(status.step for status in shown)] == [0, 6]
    late = one(0, CheckpointSaved(step=6, path="/runs/x/checkpoint-6"))  # written beside the steps
    _, _, shown, _ = play(config, UP, begins([0, 1, 2]), one(0, totals(8)), late, each([0, 1, 2], finished(0)))
    assert shown[-1].step == 8


def test_the_step_of_an_earlier_generation_is_none_of_this_one(config: Config) -> None:
    smaller = (each([0, 2], left(0)), one(1, totals(50)), begins([0, 2], 5))
    back = (one(1, up()), one(1, Prepared()), each([0, 2], left(1)), begins([0, 1, 2], 7))
    _, _, shown, _ = play(config, UP, begins([0, 1, 2]), one(1, GONE), *smaller, *back, each([0, 1, 2], finished(2)))
    assert shown[-1].step == 7


def test_a_package_that_a_node_lacks_is_the_users_to_mend(config: Config) -> None:
    lost = WorkerLost(text="ModuleNotFoundError: No module named 'hecate'", cannot_import=True)
    with pytest.raises(UserError, match=r"device 1 .*: hecate cannot be imported there: ModuleNotFoundError"):
        play(config, each([0, 2], up()), one(1, lost))


def test_a_mistake_ends_the_job_with_its_text(config: Config) -> None:
    with pytest.raises(UserError, match="no such model"):
        play(config, UP, one(0, TrainingEnded(generation=0, outcome=Outcome.USER_ERROR, text="no such model")))


def test_a_node_with_another_version_is_named(config: Config) -> None:
    with pytest.raises(UserError, match=r"different versions of torch: 2 on device 0 .*, 3 on device 2"):
        play(config, each([0, 1], up()), one(2, up(torch="3")))


@pytest.mark.parametrize(
    ("back", "said"),
    [
        ([one(1, up(torch="3"))], "different versions of torch"),
        ([one(1, WorkerLost(text="ModuleNotFoundError: No module named 'hecate'", cannot_import=True))], "cannot be imported there"),
        ([one(1, WorkerLost(text="no shared disk"))] * 2, "left out, because it cannot start"),
    ],
)
def test_a_device_that_comes_back_and_cannot_start_ends_no_healthy_job(config: Config, back: list[Step], said: str) -> None:
    smaller = (each([0, 2], left(0)), begins([0, 2], 5))
    status, group, _, lines = play(config, UP, begins([0, 1, 2]), one(1, GONE), *smaller, *back, each([0, 2], finished(1)))
    assert status == 0
    assert any(said in line for line in lines)
    assert 1 in group.killed


def test_a_straggler_is_named_and_rows_are_dealt_anew(config: Config) -> None:
    def window(step: int) -> Step:
        return lambda _: [(index, steps(step, tokens=100 if index else 30)) for index in range(3)]

    end = each([0, 1, 2], finished(0))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), window(10), window(20), window(30), end)
    assert status == 0
    (index, order), *more = [(index, order) for index, order in group.sent if isinstance(order, Replan)]
    assert (index, order.generation, order.number, order.sequences, order.reshard) == (0, 0, 1, (0, 3, 3), True)
    assert order.flops == (pytest.approx(0.3 * 5e10), 5e10, 5e10)
    assert not more, "under the new plan the speeds are as planned"
    assert any("straggler: device 0" in line and "2:2:2 become 0:3:3" in line for line in said)
