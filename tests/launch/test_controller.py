"""The Ray controller without Ray: workers are scripted, and what they are told is written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.launch.policy.devices import Device
from hecate.launch.ray_job import controller as under_test
from hecate.launch.ray_job.controller import Controller
from hecate.launch.ray_job.order_store import Rendezvous
from hecate.launch.ray_job.worker_group import Event, Place, WorkerGroup
from hecate.parallel.topology import local_topology
from hecate.parallel.topology_file import topology_text
from tests.tiny_run import make_workshop

VERSIONS = {"hecate": "1", "torch": "2", "python": "3"}
TOPOLOGY = topology_text(local_topology(3, cuda=False))
Step = Callable[["Scripted"], Sequence[tuple[int, Event]]]


class Scripted:
    """In a WorkerGroup's place: writes down every order; each poll plays the next step of the script; after the last the test fails."""

    def __init__(self, script: list[Step]) -> None:
        self.script = script
        self.calls: list[tuple[int, str, tuple[Any, ...]]] = []
        self.places = [Place(index, Device(f"node{index}", "127.0.0.1", "CPU", (("CPU", 1.0),), ())) for index in range(3)]
        self.dead_nodes: set[int] = set()
        self.silent: set[int] = set()
        self.closed = False

    def place(self, timeout: float) -> None: ...

    def ask_for(self, place: Place) -> None:
        self.calls.append((place.index, "ask_for", ()))

    def tell(self, place: Place, method: str, *arguments: Any) -> None:
        assert place.alive
        self.calls.append((place.index, method, arguments))

    def keep_spares(self) -> None:
        self.calls.append((-1, "keep_spares", ()))

    def ready_spares(self) -> int:
        return 0

    def poll(self, timeout: float) -> list[tuple[Place, Event]]:
        assert self.script, "the job goes on after the end of the script"
        happened = self.script.pop(0)(self)
        for index, event in happened:
            place = self.places[index]
            if event["kind"] == "up":
                place.facts = {"pid": 1, "versions": event.get("versions", VERSIONS)}
            if event["kind"] == "down":
                place.facts = {}
        return [(self.places[index], event) for index, event in happened]

    def ping(self, place: Place, now: float) -> float:
        return 100.0 if place.index in self.silent else 0.0

    def kill(self, place: Place) -> None:
        self.calls.append((place.index, "kill", ()))
        place.facts = {}

    def node_lives(self, place: Place) -> bool:
        return place.index not in self.dead_nodes

    def close(self) -> None:
        self.closed = True

    def told(self, name: str) -> list[tuple[int, tuple[Any, ...]]]:
        return [(index, arguments) for index, called, arguments in self.calls if called == name]


def each(members: Sequence[int], **event: Any) -> Step:
    return lambda _: [(index, dict(event)) for index in members]


def begins(members: Sequence[int], step: int = 0) -> Step:
    rows, owned = [2] * len(members), [4] * len(members)
    return each(members, kind="begins", step=step, max_steps=9, rows=rows, owned=owned, topology=TOPOLOGY)


def one(index: int, **event: Any) -> Step:
    return lambda _: [(index, event)]


UP = each([0, 1, 2], kind="up")
NOTHING: Step = lambda _: []  # noqa: E731 - a step like the others


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in ("_DEATH_SECONDS", "_PAUSE_SECONDS", "_LAST_WORDS_SECONDS"):
        monkeypatch.setattr(under_test, name, 0.0)
    folder = make_workshop(tmp_path)
    overrides = [f"output_dir={folder}/runs/x", "ray.min_workers=2", "ray.max_failures=1", "ray.start_timeout=30", "fssdp.redundancy=1"]
    return load_config(folder / "config.yaml", overrides)


def play(config: Config, *script: Step) -> tuple[int, Scripted, list[dict[str, Any]], list[str]]:
    """Exit status, the group, every status shown, every line said."""
    group, shown, said = Scripted(list(script)), list[dict[str, Any]](), list[str]()
    controller = Controller(
        cast(WorkerGroup, group), config, Rendezvous("127.0.0.1"), None, said.append, lambda s: shown.append(json.loads(json.dumps(s)))
    )
    try:
        status = controller.run()
    finally:
        assert group.closed, "workers are left behind"
    return status, group, shown, said


def states(shown: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for status in shown:
        if not found or found[-1] != status["state"]:
            found.append(status["state"])
    return found


def test_a_job_from_its_first_worker_to_its_end(config: Config) -> None:
    status, group, shown, _ = play(config, UP, begins([0, 1, 2]), each([0, 1, 2], kind="finished", generation=0))
    assert status == 0
    assert states(shown) == ["placing", "starting", "running", "finished"]
    begun = group.told("begin")
    assert [index for index, _ in begun] == [0, 1, 2]
    assert [(a["rank"], a["world_size"], a["resume"], a["topology"]) for _, (a,) in begun] == [(rank, 3, False, None) for rank in range(3)]


def test_a_dead_process_is_left_out_where_others_have_copies_until_another_has_loaded(config: Config) -> None:
    smaller = (each([0, 2], kind="regrouping", generation=0), begins([0, 2], 5))
    back = (one(1, kind="up"), one(1, kind="prepared", generation=-1))
    larger = (each([0, 2], kind="regrouping", generation=1), begins([0, 1, 2], 7))
    end = each([0, 1, 2], kind="finished", generation=2)
    status, group, _, said = play(config, UP, begins([0, 1, 2]), one(1, kind="down", text="gone"), *smaller, *back, *larger, end)
    assert status == 0
    assert [(index, a["generation"], a["world_size"]) for index, (a,) in group.told("join")] == [
        (0, 1, 2), (2, 1, 2), (0, 2, 3), (1, 2, 3), (2, 2, 3),
    ]  # fmt: skip
    assert any("the worker's process died" in line and "shrink" in line for line in said)


def test_a_dead_process_is_waited_for_where_nobody_has_copies(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "latest_good", lambda _: Path("checkpoint-3"))
    config = replace(config, fssdp=replace(config.fssdp, redundancy=0))
    waits = each([0, 2], kind="regrouping", generation=0)
    back = (one(1, kind="up"), one(1, kind="prepared", generation=-1))
    end = each([0, 1, 2], kind="finished", generation=1)
    status, group, shown, said = play(
        config, UP, begins([0, 1, 2]), one(1, kind="down", text="gone"), waits, *back, begins([0, 1, 2], 5), end
    )
    assert status == 0
    assert states(shown) == ["placing", "starting", "running", "recovering", "starting", "running", "finished"]
    assert [index for index, _ in group.told("interrupt")] == [0, 2], "no message may tell them"
    assert [index for index, _ in group.told("join")] == [0, 1, 2]
    assert group.told("prepare") == [(1, ())]
    assert any("the worker's process died" in line and "replace" in line for line in said)
    assert [line.split(";")[0] for line in said if line.startswith("generation")] == [
        "generation 0: 3 ranks from step 0", "generation 1: 3 ranks from step 5",
    ]  # fmt: skip


def test_a_second_loss_at_once_is_waited_for(config: Config) -> None:
    """It may have had the only copies of what the first owned."""
    config = replace(config, ray=replace(config.ray, min_workers=1, max_failures=2))
    both = lambda _: [(1, {"kind": "down", "text": "gone"}), (2, {"kind": "down", "text": "gone"})]  # noqa: E731
    waits = one(0, kind="regrouping", generation=0)
    back = (one(2, kind="up"), one(2, kind="prepared", generation=-1))
    end = each([0, 2], kind="finished", generation=1)
    status, group, _, said = play(config, UP, begins([0, 1, 2]), both, waits, *back, begins([0, 2], 5), end)
    assert status == 0
    assert [(index, a["world_size"]) for index, (a,) in group.told("join")] == [(0, 2), (2, 2)]
    assert [word for line in said for word in ("shrink", "replace") if word in line] == ["shrink", "replace"]


def test_a_lost_node_is_left_out_and_another_joins_when_it_comes(config: Config) -> None:
    def dies(group: Scripted) -> Sequence[tuple[int, Event]]:
        group.dead_nodes.add(1)
        return [(1, {"kind": "down", "text": "gone"})]

    smaller = (each([0, 2], kind="regrouping", generation=0), begins([0, 2], 5))
    comes = (one(1, kind="up"), one(1, kind="prepared", generation=-1))
    larger = (each([0, 2], kind="regrouping", generation=1), begins([0, 1, 2], 7))
    end = each([0, 1, 2], kind="finished", generation=2)
    status, group, shown, _ = play(config, UP, begins([0, 1, 2]), dies, *smaller, *comes, *larger, end)
    assert status == 0
    assert states(shown).count("resizing") == 1
    assert [(index, a["generation"], a["world_size"]) for index, (a,) in group.told("join")] == [
        (0, 1, 2), (2, 1, 2), (0, 2, 3), (1, 2, 3), (2, 2, 3),
    ]  # fmt: skip
    assert [index for index, _ in group.told("regroup")] == [0, 2]


def test_too_few_are_left_and_the_job_waits(config: Config) -> None:
    def two_die(group: Scripted) -> Sequence[tuple[int, Event]]:
        group.dead_nodes.update({1, 2})
        return [(1, {"kind": "down", "text": "gone"})]

    def second(group: Scripted) -> Sequence[tuple[int, Event]]:
        return [(2, {"kind": "down", "text": "gone"}), (0, {"kind": "regrouping", "generation": 0})]

    patient = replace(config, ray=replace(config.ray, max_failures=2))
    comes = (one(2, kind="up"), one(2, kind="prepared", generation=-1))
    end = each([0, 2], kind="finished", generation=1)
    status, _, shown, _ = play(patient, UP, begins([0, 1, 2]), two_die, second, NOTHING, *comes, begins([0, 2], 5), end)
    assert status == 0
    assert "waiting" in states(shown)


def test_a_silent_worker_is_ended_by_name(config: Config) -> None:
    def falls_silent(group: Scripted) -> Sequence[tuple[int, Event]]:
        group.silent.add(2)
        return []

    smaller = (each([0, 1], kind="regrouping", generation=0), begins([0, 1], 5))
    status, group, _, said = play(config, UP, begins([0, 1, 2]), falls_silent, *smaller, each([0, 1], kind="finished", generation=1))
    assert status == 0
    assert (2, ()) in group.told("kill")
    assert any("device 2" in line and "did not answer" in line for line in said)


def test_an_error_is_tried_again_and_then_given_up(config: Config) -> None:
    fails = [each([0, 1, 2], kind="failed", generation=g, text="Traceback\nValueError: boom") for g in range(2)]
    status, _, shown, said = play(config, UP, begins([0, 1, 2]), fails[0], NOTHING, begins([0, 1, 2]), fails[1], NOTHING)
    assert status == 1
    assert states(shown)[-1] == "failed"
    assert "ValueError: boom" in said[-1]


def test_a_step_in_between_forgives(config: Config) -> None:
    fails = [each([0, 1, 2], kind="failed", generation=g, text="ValueError: boom") for g in range(2)]
    report = {"kind": "report", "step": 5, "dense_tokens": 10, "dense_seconds": 1.0, "step_seconds": 1.0}
    works = one(1, **report)
    end = each([0, 1, 2], kind="finished", generation=2)
    script = (UP, begins([0, 1, 2]), fails[0], NOTHING, begins([0, 1, 2]), works, fails[1], NOTHING, begins([0, 1, 2]), end)
    assert play(config, *script)[0] == 0


def test_a_mistake_ends_the_job_with_its_text(config: Config) -> None:
    with pytest.raises(UserError, match="no such model"):
        play(config, UP, one(0, kind="mistake", generation=0, text="no such model"))


def test_a_node_with_another_version_is_named(config: Config) -> None:
    with pytest.raises(UserError, match=r"different versions of torch: 2 on device 0 .*, 3 on device 2"):
        play(config, each([0, 1], kind="up"), one(2, kind="up", versions={**VERSIONS, "torch": "3"}))


def test_a_straggler_is_named_and_rows_are_dealt_anew(config: Config) -> None:
    def window(step: int) -> Step:
        return lambda _: [
            (index, {"kind": "report", "step": step, "dense_tokens": 100 if index else 30, "dense_seconds": 1.0, "step_seconds": 1.0})
            for index in range(3)
        ]

    end = each([0, 1, 2], kind="finished", generation=0)
    status, group, _, said = play(config, UP, begins([0, 1, 2]), window(10), window(20), window(30), end)
    assert status == 0
    (index, (generation, order)), *more = group.told("order")
    assert (index, generation, order["number"], order["rows"], order["reshard"]) == (0, 0, 1, [0, 3, 3], True)
    assert order["flops"] == [pytest.approx(0.3 * 5e10), 5e10, 5e10]
    assert not more, "under the new plan the speeds are as planned"
    assert any("straggler: device 0" in line and "2:2:2 become 0:3:3" in line for line in said)
