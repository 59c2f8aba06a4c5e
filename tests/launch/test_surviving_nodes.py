"""Launchers of several nodes: what they tell each other, which node has which place, and runs on two nodes that lose ranks or a node."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.cases.losses import problem_of
from hecate.apps.check.drill.outcome import Scope
from hecate.apps.check.drill.ranks import Started, begin_run
from hecate.apps.check.drill.run import drill_folder
from hecate.errors import UserError
from hecate.io.strict_json import JsonError
from hecate.launch import surviving_nodes
from hecate.launch.addresses import Endpoint
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.node_messages import JobOrders, JobShape, MemberOrder, MessageStore, NodeReport, read_orders, read_report
from hecate.launch.rank_command import Beginning, RankCommand
from hecate.launch.surviving_nodes import _Nodes, _OwnRanks, _waiting_text
from hecate.launch.surviving_ranks import SurvivingRanks
from hecate.ranks.launcher_files import Generation, arrival_file, error_file, read_generation, ready_file
from testing.processes import OVERRIDES, losses, read_rest, read_until, running
from testing.tiny_run import STEPS, make_workshop
from tests.launch.stand_ins import StandIn

JOB = JobShape("job", 2, 3, 2, survives=True, output_dir="runs/x")
SECRET = b"of this test" * 3
QUIET = NodeReport(beat=0, address="10.0.0.2", ended={}, files=(), mistakes={}, stopping=False, leaves=False)
ORDERS = JobOrders(generation=Generation(0, (0, 1, 2, 3), (0, 1, 2, 3)), arrived=(), members={}, lost=(), status=None)


class Words:
    """A store in this process, and what was last written to it."""

    def __init__(self) -> None:
        self.store = MessageStore(dist.HashStore())

    def orders(self) -> JobOrders:
        return read_orders(self.store.orders())


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchange messages whenever somebody asks for news, and do not wait for more nodes."""
    monkeypatch.setattr(surviving_nodes, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(surviving_nodes, "_LAST_CALL_SECONDS", 0.05)


def test_a_report_speaks_of_the_nodes_own_members_alone() -> None:
    said = replace(
        QUIET,
        ended={"2": -9, "0": 0},
        files=("here-1-2", "ready-3", "here-1-0", "generation", "../ready-2", "error-2", "here-1-2/../x"),
        mistakes={"3": "x" * 10_000, "1": "not his"},
    )
    text = json.dumps(vars(said)).encode()
    read = read_report(text, [2, 3])
    assert (read.ended, read.files, list(read.mistakes)) == ({"2": -9}, ("here-1-2", "ready-3"), ["3"])
    assert len(read.mistakes["3"]) == 4000


@pytest.mark.parametrize("text", [b"", b"[]", b'{"beat": 1}', b"\xff", b'{"__class__": "os.system"}'])
def test_what_is_no_message_is_refused(text: bytes) -> None:
    with pytest.raises(JsonError):
        read_report(text, [0])
    with pytest.raises(JsonError):
        read_orders(text)


def test_an_exit_status_that_no_process_has_is_refused() -> None:
    for status in (-99, 255, 0):
        assert read_report(json.dumps(vars(replace(QUIET, ended={"0": status}))).encode(), [0]).ended == {"0": status}
    with pytest.raises(JsonError, match="256 is no exit status"):
        read_report(json.dumps(vars(replace(QUIET, ended={"0": 256}))).encode(), [0])


def test_a_text_that_cannot_be_written_is_replaced() -> None:
    assert read_report(json.dumps(vars(replace(QUIET, mistakes={"0": "a\ud800"}))).encode(), [0]).mistakes == {"0": "a?"}


def test_orders_name_no_path() -> None:
    for bad in (replace(ORDERS, arrived=("../here-0-1",)), replace(ORDERS, members={"../1": MemberOrder(1, 0, None, ())})):
        words = Words()
        words.store.order(bad)
        with pytest.raises(JsonError, match="a name that no file or member has"):
            words.orders()


def free_endpoint() -> Endpoint:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Endpoint("127.0.0.1", server.getsockname()[1], "127.0.0.1", "lo", on_this_node=True)


def test_another_job_at_the_meeting_point_is_named() -> None:
    meeting = free_endpoint()
    host = MessageStore.host(meeting, JOB, SECRET)
    assert host is not None
    joined = MessageStore.join(meeting, JOB, SECRET)
    assert joined.arrive(QUIET) == 1
    assert host.arrived([]) == [1]
    assert host.arrived([1]) == []
    with pytest.raises(UserError, match="another job meets there, 'job' of 2 to 3 nodes with 2 ranks each") as caught:
        MessageStore.join(meeting, replace(JOB, ranks_per_node=4), SECRET)
    assert "--nproc-per-node" in str(caught.value)
    with pytest.raises(UserError, match=r"which go on without a lost one, into runs/x\n  this node was started for .* which start again"):
        MessageStore.join(meeting, replace(JOB, survives=False), SECRET)


def test_a_node_with_another_secret_is_no_member() -> None:
    meeting = free_endpoint()
    MessageStore.host(meeting, JOB, SECRET)
    with pytest.raises(UserError, match="has another secret than this process\n  give all nodes the same --token-file"):
        MessageStore.join(meeting, JOB, b"a guess" * 6)


class Leading:
    """The launcher that leads, with its messages and a run of two ranks on each of two nodes."""

    def __init__(self, folder: Path) -> None:
        self.words, self.files = Words(), folder / "store"
        own = mock.create_autospec(RankCommand, instance=True)
        own.store, own.start.side_effect = self.files, lambda *_: StandIn()
        self.nodes = _Nodes(self.words.store, JOB, own)

    def begin(self) -> SurvivingRanks:
        """Begin the run, all of whose ranks have loaded."""
        assert self.words.store.arrive(QUIET) == 1
        self.nodes.wait_for_all()
        surviving = self.nodes.surviving = SurvivingRanks(self.nodes, self.files, JobPolicy(copied=True, fewest_to_begin=4))
        for member in range(4):
            ready_file(self.files, member).touch()
        surviving.look()
        return surviving

    def orders(self) -> JobOrders:
        self.nodes.exchange()
        return self.words.orders()


def test_a_rank_of_another_node_that_dies_is_replaced_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    assert leading.orders().members == {str(rank): MemberOrder(1, rank - 2, Beginning(rank, 4, 0), ()) for rank in (2, 3)}
    leading.words.store.report(1, replace(QUIET, ended={"3": -9}, files=("here-0-2",)))
    surviving.look()
    assert read_generation(leading.files).members == (0, 1, 2)
    orders = leading.orders()
    assert orders.generation == read_generation(leading.files)
    assert orders.members["4"] == MemberOrder(1, 1, None, ())
    assert sorted(orders.members) == ["2", "4"], "nothing is left to say of the one that has ended"
    assert arrival_file(leading.files, 0, 2).exists()
    leading.words.store.report(1, replace(QUIET, beat=1, ended={"3": -9}, files=("ready-4",)))
    surviving.look()
    assert read_generation(leading.files).members == (0, 1, 2, 4)
    assert read_generation(leading.files).devices == (0, 1, 2, 3)
    arrival_file(leading.files, 2, 0).touch()
    arrival_file(leading.files, 1, 0).touch()
    assert leading.orders().arrived == ("here-2-0",)


def test_a_silent_node_is_lost_and_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once(monkeypatch)
    monkeypatch.setattr(surviving_nodes, "LOST_SECONDS", 0.2)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    surviving.look()
    assert read_generation(leading.files).members == (0, 1, 2, 3)
    deadline = time.monotonic() + 30
    while read_generation(leading.files).members != (0, 1) and time.monotonic() < deadline:  # its ranks may be found lost one by one
        time.sleep(0.01)
        surviving.look()
    assert read_generation(leading.files).members == (0, 1)
    assert "node 10.0.0.2 has not been heard of for 0 s; its 2 ranks count as killed" in capsys.readouterr().err
    assert surviving.processes[2].wait() == -signal.SIGKILL
    assert len(surviving.processes) == 4, "nobody is there to start another rank"
    assert leading.orders().lost == (1,)
    monkeypatch.setattr(surviving_nodes, "LOST_SECONDS", 60.0)
    assert leading.words.store.arrive(QUIET) == 2
    surviving.look()
    assert {member: order for member, order in leading.orders().members.items() if order.node == 2} == {
        "4": MemberOrder(2, 0, None, ()),
        "5": MemberOrder(2, 1, None, ()),
    }


def test_nothing_is_started_on_a_node_that_is_lost_while_its_processes_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    devices_before = leading.nodes.present()

    def present() -> list[int]:
        found = _Nodes.present(leading.nodes)
        monkeypatch.setattr(surviving_nodes, "LOST_SECONDS", -1.0)  # the next message finds the node lost
        return found

    monkeypatch.setattr(leading.nodes, "present", present)
    surviving.look()
    assert devices_before == [0, 1, 2, 3]
    assert read_generation(leading.files).members == (0, 1)
    assert len(surviving.processes) == 4


def test_a_launcher_that_was_stopped_itself_takes_nobody_for_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither it nor the store, which is in its process, could hear of the others."""
    at_once(monkeypatch)
    monkeypatch.setattr(surviving_nodes, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(surviving_nodes, "_PAUSE_SECONDS", 0.2)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    surviving.look()
    time.sleep(0.4)
    surviving.look()
    assert read_generation(leading.files).members == (0, 1, 2, 3)


def test_nodes_that_leave_before_the_run_begins_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    leading.words.store._store.add("arrivals", 1)  # a node that was lost before it had sent a report
    for leaves in (True, False):
        leading.words.store.arrive(replace(QUIET, leaves=leaves))
    leading.nodes.wait_for_all()
    assert leading.nodes.present() == [0, 1, 2, 3]
    assert leading.nodes.start(2, 2, None).poll() is None
    assert leading.nodes.start(4, 4, None).poll() == -signal.SIGKILL
    assert leading.orders().members == {"2": MemberOrder(3, 0, None, ())}
    leading.words.store.report(3, replace(QUIET, leaves=True))
    leading.nodes.exchange()
    assert leading.nodes.present() == [0, 1]


def test_too_few_nodes_are_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surviving_nodes, "_MEETING_SECONDS", 0.05)
    with pytest.raises(UserError, match="--nnodes 2: only 1 have come in 0 s"):
        Leading(tmp_path).nodes.wait_for_all()


def test_a_launcher_that_waits_for_nodes_says_for_how_many_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once(monkeypatch)
    monkeypatch.setattr(surviving_nodes, "_MEETING_SECONDS", 850.0)
    leading, came = Leading(tmp_path), []

    def a_node_comes(_: float) -> None:
        if len(came) == 3:
            leading.words.store.arrive(QUIET)
        came.append(time.monotonic())

    monkeypatch.setattr(surviving_nodes, "time", SimpleNamespace(monotonic=time.monotonic, sleep=a_node_comes))
    leading.nodes.wait_for_all()
    assert capsys.readouterr().out == "hecate: waiting for 1 more node (1 of 2), give up in 15 min\n", "once, and not for a third node"


@pytest.mark.parametrize(
    ("present", "fewest", "seconds", "text"),
    [
        (1, 2, 839.0, "waiting for 1 more node (1 of 2), give up in 14 min"),
        (2, 4, 31.0, "waiting for 2 more nodes (2 of 4), give up in 1 min"),
        (2, 2, 31.0, ""),
    ],
)
def test_the_words_of_a_launcher_that_waits(present: int, fewest: int, seconds: float, text: str) -> None:
    assert _waiting_text(present, fewest, seconds).removeprefix("hecate: ") == text


@pytest.mark.slow
@pytest.mark.parametrize("redundancy", [0, 1])
def test_two_launchers_on_one_machine_train_together(tmp_path: Path, redundancy: int) -> None:
    workshop, meeting = make_workshop(tmp_path), free_endpoint()
    shape = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{meeting.host}:{meeting.port}"]
    given = [str(workshop / "config.yaml"), *OVERRIDES, f"output_dir={workshop}/runs/two", f"fssdp.redundancy={redundancy}", *shape]
    command = [sys.executable, "-m", "hecate", "launch", *given]
    with running(command, tmp_path / "first", HECATE_TOKEN="x" * 32) as first:
        read_until(first, "waiting for 1 more node (1 of 2)")
        with running(command, tmp_path / "second", HECATE_TOKEN="x" * 32) as second:
            assert "this node is at the meeting point" in read_rest(second)
        assert "on rank 1" in read_rest(first)
    assert sorted(losses(workshop / "runs" / "two")) == list(range(1, STEPS + 1))


def test_more_nodes_than_the_job_takes_wait_for_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    leading.begin()
    for _ in range(2):
        leading.words.store.arrive(QUIET)
    assert leading.nodes.present() == [0, 1, 2, 3, 4, 5], "of three nodes at most"
    leading.words.store.report(1, replace(QUIET, beat=1, leaves=True))
    assert leading.nodes.present() == [0, 1, 4, 5]
    assert leading.nodes.present() == [0, 1, 2, 3, 4, 5], "the third has the place of the first"


def test_what_is_no_report_loses_its_node_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    leading.words.store._store.set("report-1", "not a report")
    surviving.look()
    assert read_generation(leading.files).members == (0, 1)
    assert "has sent what is no report" in capsys.readouterr().err


def test_a_signal_and_a_mistake_reach_the_other_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    surviving.processes[2].send_signal(signal.SIGTERM)
    surviving.processes[2].kill()
    assert leading.orders().members["2"].signals == (signal.SIGTERM, signal.SIGKILL)
    leading.words.store.report(1, replace(QUIET, ended={"3": 2}, mistakes={"3": "hecate: a mistake"}, stopping=True))
    assert surviving.processes[3].poll() == 2
    assert error_file(tmp_path, 3).read_text(encoding="utf-8") == "hecate: a mistake"
    assert surviving.stopping
    surviving.look()
    assert surviving.processes[0].poll() is None, "the training tells it"


def test_a_signal_to_a_node_that_does_not_train_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    leading = Leading(tmp_path)
    surviving = leading.begin()
    leading.words.store.arrive(replace(QUIET, stopping=True))
    surviving.look()
    assert not surviving.stopping


RANK = """
import os, signal, sys, time
from hecate.io.process_end import die_with_parent
die_with_parent(os.getppid())
given = [os.environ.get(name, "-") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HECATE_BEGINS", "HECATE_JOIN")]
open(os.environ["HECATE_ERRORS"] + "/began-" + os.environ["HECATE_MEMBER"], "w").write(" ".join(given))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(60)
"""


class Following:
    """A launcher that follows in a thread, whose ranks do nothing."""

    def __init__(self, folder: Path) -> None:
        self.words, self.files = Words(), folder / "store"
        self.follower = _OwnRanks(RankCommand((sys.executable, "-c", RANK), {}, self.files, survives=True), JOB, "10.0.0.2")
        self.status: list[int | UserError | None] = []
        self.words.store.order(ORDERS)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.until(lambda: self.words.store.arrived([]))

    def _run(self) -> None:
        try:
            self.status.append(self.follower.run(self.words.store))
        except UserError as error:
            self.status.append(error)

    def report(self) -> NodeReport:
        return read_report(self.words.store.reports([1])[1], range(10))

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline, (self.report(), self.status)
            time.sleep(0.01)

    def began(self, member: int) -> str:
        path = self.files.with_name(f"began-{member}")
        self.until(lambda: path.exists() and path.read_text(encoding="utf-8"))
        return path.read_text(encoding="utf-8")

    def end(self) -> int | UserError | None:
        self._thread.join(30)
        self.follower.end_all()
        (status,) = self.status
        return status


@contextmanager
def following(folder: Path) -> Iterator[Following]:
    made = Following(folder)
    try:
        yield made
    finally:
        made.words.store.order(replace(ORDERS, status=1))
        made.end()


def order(node: int = 1, device: int = 0, *, joins: bool = False, signals: tuple[int, ...] = ()) -> MemberOrder:
    return MemberOrder(node, device, None if joins else Beginning(2, 4, 1), signals)


def test_a_node_starts_signals_and_reports_its_own_members(tmp_path: Path) -> None:
    with following(tmp_path) as node:
        given = {"2": order(), "3": order(device=1, joins=True), "1": order(node=2)}
        node.words.store.order(replace(ORDERS, members=given, arrived=("here-0-0",)))
        assert node.began(2) == "2 0 4 1 -"
        assert node.began(3) == "3 1 4 - 1"
        assert read_generation(node.files) == ORDERS.generation
        assert arrival_file(node.files, 0, 0).exists()
        assert not node.files.with_name("began-1").exists()
        arrival_file(node.files, 0, 2).touch()
        node.until(lambda: node.report().files == ("here-0-2",))
        given["2"] = order(signals=(signal.SIGTERM,))
        given["3"] = order(device=1, joins=True, signals=(signal.SIGUSR1, signal.SIGKILL))
        error_file(tmp_path, 3).write_text("never read: it did not end with a mistake", encoding="utf-8")
        node.words.store.order(replace(ORDERS, members=given))
        node.until(lambda: node.report().ended == {"2": 0, "3": -signal.SIGKILL})
        assert node.report().mistakes == {}
        node.words.store.order(replace(ORDERS, members=given, status=0))
        assert node.end() == 0
        assert node.report().leaves


def test_a_node_reads_orders_only_when_they_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surviving_nodes, "_BEAT_SECONDS", 0.01)
    reading = mock.Mock(side_effect=MessageStore.orders, autospec=True)
    monkeypatch.setattr(MessageStore, "orders", lambda store: reading(store))
    with following(tmp_path) as node:
        for number in (1, 2):
            node.words.store.order(replace(ORDERS, arrived=(f"here-0-{number}",)))
            node.until(arrival_file(node.files, 0, number).exists)
            counts = []
            for _ in range(2):  # the orders are written before their number, so a node that has read them may read them once more
                beat = node.report().beat
                node.until(lambda beat=beat: node.report().beat > beat + 10)
                counts.append(reading.call_count)
            assert counts[0] == counts[1]


def test_a_device_is_given_to_one_member(tmp_path: Path) -> None:
    with following(tmp_path) as node:
        node.words.store.order(replace(ORDERS, members={"2": order(), "3": order()}))
        failed = node.end()
        assert isinstance(failed, UserError)
        assert "member 3 was ordered to use device 0 of this node, which is taken" in str(failed)


def test_a_node_that_counts_as_lost_ends_its_ranks(tmp_path: Path) -> None:
    with following(tmp_path) as node:
        node.words.store.order(replace(ORDERS, members={"2": order()}))
        node.began(2)
        node.words.store.order(replace(ORDERS, members={"2": order()}, lost=(1,)))
        assert node.end() is None
        assert all(process.poll() is not None for process in node.follower._processes.values())


def test_a_node_that_is_told_to_stop_leaves_when_its_ranks_have_ended(tmp_path: Path) -> None:
    with following(tmp_path) as node:
        node.words.store.order(replace(ORDERS, members={"2": order()}))
        node.began(2)
        node.follower.signals.append(signal.SIGTERM)
        node.until(lambda: node.report().stopping)
        assert not node.report().leaves
        node.follower.signal_all(signal.SIGTERM)
        assert node.end() == 0
        assert node.report().leaves
        assert node.report().ended == {"2": 0}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc and fork")
def test_a_rank_of_the_second_node_dies_and_no_step_is_lost(tmp_path: Path) -> None:
    """Two launchers on this machine, with two ranks each. The bits are those of the run that loses nobody."""
    with drill_folder() as made:
        scope = Scope(str(tmp_path), str(made.workshop), quick=True, start=made.start)
        whole = begin_run(scope, "whole", 4).end()
        dies = Injected(action="kill", place="backward", rank=3, step=2)
        run = begin_run(scope, "two", 4, injected=[dies], started=Started("two_nodes")).end()
        assert problem_of(run, whole, lost=1) == ""
    assert "rank 3 was killed by SIGKILL; 3 ranks go on" in run.log
    assert "is lost" not in run.log
    assert "last checkpoint" not in run.log


def test_a_node_that_is_told_to_stop_does_not_wait_for_ranks_that_load(tmp_path: Path) -> None:
    """They are let in no more, and would wait for that for ever."""
    with following(tmp_path) as node:
        node.words.store.order(replace(ORDERS, generation=Generation(0, (0, 1), (0, 1)), members={"2": order(joins=True)}))
        node.began(2)
        node.follower.signals.append(signal.SIGTERM)
        assert node.end() == 0
        assert node.report().leaves
