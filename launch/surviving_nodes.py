"""Runs on several nodes that go on, or begin again, when a rank or a whole node is lost: `hecate launch --nnodes`.

Each node runs one launcher, which starts the node's ranks. The launcher of the node with the meeting point leads. It decides which ranks go
on together, by the same rules as the launcher of one machine (`SurvivingRanks`); to it the processes of other nodes are `RemoteRank`. The
others follow its orders and report. A rank reads and leaves files of its own machine only: each launcher has a folder for them, and the
launchers copy to each other what the others' ranks need (`hecate.launch.node_messages`).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from subprocess import Popen
from types import FrameType

import torch.distributed as dist

from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.io.durable import replace_file
from hecate.io.signals import on_signals
from hecate.io.strict_json import JsonError
from hecate.io.terminal import PROGRESS
from hecate.launch.addresses import Endpoint, wait_for
from hecate.launch.local_launcher import STOPPING, watch
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.node_messages import (
    JobOrders,
    JobShape,
    MemberOrder,
    MessageStore,
    NodeReport,
    read_orders,
    read_report,
)
from hecate.launch.rank_command import Beginning, RankCommand, RankProcess
from hecate.launch.stopped_ranks import StoppedRanks
from hecate.launch.surviving_ranks import SurvivingRanks
from hecate.ranks.launcher_files import error_file, mistakes, read_generation, write_generation

_log = logging.getLogger(__name__)

LOST_SECONDS = 3.0
"""how long a node may be silent before its ranks count as lost"""
_BEAT_SECONDS = 0.2
_PAUSE_SECONDS = 1.0
"""a launcher that has not looked for so long was stopped itself, or the machine was"""
_LOOK_SECONDS = 0.02
_LAST_CALL_SECONDS = 3.0
"""how long a job that may have more nodes waits for another one"""
_MEETING_SECONDS = 600.0
"""how long a job waits for its nodes"""
_LEAVING_SECONDS = 10.0
"""how long the launcher that leads stays for the others to read how the run has ended"""
_STOPPED_ELSEWHERE = "hecate: a signal to another node has stopped the job, whose ranks have saved"


def lead(own: RankCommand, job: JobShape, store: MessageStore, policy: JobPolicy) -> int:
    """Run this node's ranks and decide for all nodes; return the exit status of the run.

    Args:
        own: what starts this node's ranks.
        store: where the nodes meet, in this process.
        policy: what follows when ranks are lost. The run begins with those of `job.fewest` nodes at least.

    Raises:
        UserError: too few nodes have come in ten minutes.
    """
    nodes = _Nodes(store, job, own)
    status = 1
    try:
        nodes.wait_for_all()
        policy = replace(policy, fewest_to_begin=job.fewest * job.ranks_per_node)
        nodes.surviving = SurvivingRanks(nodes, own.store, policy)
        status = watch(nodes.surviving)
        if status == 0 and nodes.stopped:
            _log.info(_STOPPED_ELSEWHERE)
            status = 128 + signal.SIGTERM
        return status
    finally:
        nodes.end(status)


@dataclass
class _Node:
    """Another node, as the leading launcher sees it."""

    seen: float
    """the time when its report last changed"""
    text: bytes = b""
    report: NodeReport | None = None
    lost: bool = False
    slot: int | None = None
    """the node's place in the job, which says which devices are its own; None: all places are taken"""
    members: set[int] = field(default_factory=set)


class _Nodes:
    """The nodes of a run (`Machines`). Whoever asks for news of one of their processes has the messages of all nodes exchanged."""

    def __init__(self, store: MessageStore, job: JobShape, own: RankCommand) -> None:
        self._store, self._job, self._own, self._files = store, job, own, own.store
        self._nodes: dict[int, _Node] = {}
        self._orders: dict[str, MemberOrder] = {}
        self._ended: dict[int, int] = {}
        self._last = 0.0
        """the time when messages were exchanged last"""
        self._status: int | None = None
        self._busy = False
        self._written: JobOrders | None = None
        self._complete = False
        """whether all nodes that the run begins with have come"""
        self.stopped = False
        """whether a signal to another node has stopped the run"""
        self.surviving: SurvivingRanks | None = None

    def wait_for_all(self) -> None:
        """Wait for the nodes that the run begins with, and give each its place.

        Raises:
            UserError: too few have come.
        """
        began = last = time.monotonic()
        present: list[_Node] = []
        said = ""
        while 1 + len(present) < self._job.most:
            self.exchange()
            before, present = len(present), [node for node in self._nodes.values() if not node.lost]
            if len(present) != before:
                last = time.monotonic()
            elif 1 + len(present) >= self._job.fewest and time.monotonic() - last > _LAST_CALL_SECONDS:
                break
            elif time.monotonic() - began > _MEETING_SECONDS:
                raise UserError(
                    f"--nnodes {self._job.fewest}: only {1 + len(present)} have come in {_MEETING_SECONDS:.0f} s\n"
                    "  each node must be started with the same --nnodes, --rdzv-endpoint and --rdzv-id"
                )
            waiting = _waiting_text(1 + len(present), self._job.fewest, began + _MEETING_SECONDS - time.monotonic())
            if waiting and waiting != said:
                PROGRESS.info(said := waiting)
            time.sleep(_LOOK_SECONDS)
        for slot, node in enumerate(present[: self._job.most - 1], start=1):
            node.slot = slot
        self._complete = True

    def start(self, member: int, device: int, begins: Beginning | None) -> RankProcess:
        """Start a member, or have the node in whose place the device is start it. If the place is empty, the member has ended at once."""
        slot, local = divmod(device, self._job.ranks_per_node)
        if slot == 0:
            return self._own.start(member, local, begins)
        number = self._in_place(slot)
        if number is None:
            self._ended[member] = -int(signal.SIGKILL)
        else:
            self._nodes[number].members.add(member)
            self._orders[str(member)] = MemberOrder(number, local, begins, ())
        return RemoteRank(self, member)

    def present(self) -> list[int]:
        self.exchange()
        slots = [slot for slot in range(self._job.most) if slot == 0 or self._in_place(slot) is not None]
        return [device for slot in slots for device in range(slot * self._job.ranks_per_node, (slot + 1) * self._job.ranks_per_node)]

    def _in_place(self, slot: int) -> int | None:
        """The number of the node in a place; None: the place is empty."""
        return next((number for number, node in self._nodes.items() if node.slot == slot and not node.lost), None)

    def status_of(self, member: int) -> int | None:
        self.exchange()
        return self._ended.get(member)

    def signal(self, member: int, number: int) -> None:
        given = self._orders[str(member)]
        self._orders[str(member)] = replace(given, signals=(*given.signals, number))

    def end(self, status: int) -> None:
        """Say how the run has ended, and stay until the others have read it."""
        self._status = status
        deadline = time.monotonic() + _LEAVING_SECONDS
        while time.monotonic() < deadline:
            self.exchange()
            if all(node.lost for node in self._nodes.values()):
                return
            time.sleep(_LOOK_SECONDS)

    def exchange(self) -> None:
        """Read what is new in the reports, and write orders. Soon after the last time it does nothing."""
        now = time.monotonic()
        if self._busy or now < self._last + _LOOK_SECONDS:  # busy: a signal's handler has asked in the midst of it
            return
        self._busy = True
        try:
            for node in self._nodes.values() if now > self._last + _PAUSE_SECONDS else ():
                node.seen = now  # this process stood still, and could not have heard of them
            self._greet()
            present = [number for number, node in self._nodes.items() if not node.lost]
            for number, text in self._store.reports(present).items():
                self._read(number, text)
            self._write()
        finally:
            self._busy = False
            self._last = time.monotonic()

    def _greet(self) -> None:
        self._nodes |= {number: _Node(time.monotonic()) for number in self._store.arrived(self._nodes)}
        if not self._complete:
            return
        free = [slot for slot in range(1, self._job.most) if self._in_place(slot) is None]
        waiting = [node for node in self._nodes.values() if node.slot is None and not node.lost]
        for slot, node in zip(free, waiting, strict=False):
            node.slot = slot

    def _read(self, number: int, text: bytes) -> None:
        node, now = self._nodes[number], time.monotonic()
        if text == node.text:
            if now - node.seen > LOST_SECONDS:
                self._lose(number, f"has not been heard of for {LOST_SECONDS:.0f} s")
            return
        node.text, node.seen = text, now
        try:
            report = node.report = read_report(text, node.members)
        except JsonError as error:
            self._lose(number, f"has sent what is no report: {error}")
            return
        for name in report.files:
            self._files.with_name(name).touch()
        for member, said in report.mistakes.items():
            replace_file(error_file(self._files.parent, int(member)), [said.encode()], durable=False)
        self._ended |= {int(member): status for member, status in report.ended.items() if int(member) not in self._ended}
        if report.stopping and self.surviving is not None and node.members & set(self.surviving.members):
            self.surviving.stopping = self.surviving.stops_by_itself = self.stopped = True
        if report.leaves:
            self._lose(number, None if self._status is not None else "has left")

    def _lose(self, number: int, why: str | None) -> None:
        node = self._nodes[number]
        node.lost = True
        left = [member for member in sorted(node.members) if member not in self._ended]
        self._ended |= dict.fromkeys(left, -int(signal.SIGKILL))
        if why is not None and (left or not node.members):
            address = "" if node.report is None else f" {node.report.address}"
            _log.info(f"hecate: node{address} {why}; its {len(left)} ranks count as killed")

    def _write(self) -> None:
        generation = read_generation(self._files) if self.surviving is not None else None
        number = -1 if generation is None else generation.number
        arrived = tuple(sorted(path.name for path in self._files.parent.glob(f"here-{number}-*")))
        lost = tuple(number for number, node in self._nodes.items() if node.lost)
        members = {name: order for name, order in self._orders.items() if int(name) not in self._ended}
        orders = JobOrders(generation, arrived, members, lost, self._status)
        if orders != self._written:
            self._store.order(orders)
            self._written = orders


def _waiting_text(present: int, fewest: int, seconds: float) -> str:
    """The line of a launcher that waits for nodes, which changes every minute; empty once enough have come."""
    if (more := fewest - present) <= 0:
        return ""
    return (
        f"hecate: waiting for {more} more node{'s' if more > 1 else ''} ({present} of {fewest}), give up in {math.ceil(seconds / 60)} min"
    )


class RemoteRank:
    """The process of a rank on another node."""

    def __init__(self, nodes: _Nodes, member: int) -> None:
        self._nodes, self._member = nodes, member
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nodes.status_of(self._member)
        return self.returncode

    def wait(self) -> int:
        """Wait until its node has reported its end, or is lost."""
        while (status := self.poll()) is None:
            time.sleep(_LOOK_SECONDS)
        return status

    def send_signal(self, number: int, /) -> None:
        self._nodes.signal(self._member, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def follow(own: RankCommand, job: JobShape, meeting: Endpoint, secret: bytes) -> int:
    """Run this node's ranks as the leading launcher orders, and return the exit status.

    A node that was taken for lost, as after a broken network, ends its ranks and comes again as a new one.

    Raises:
        UserError: nobody answers at the meeting point, or another job meets there.
    """
    wait_for(meeting)
    ranks = _OwnRanks(own, job, meeting.local_address)

    def stop(number: int, _frame: FrameType | None) -> None:
        ranks.signals.append(number)
        if len(ranks.signals) == 1:  # not print, which the signal may have interrupted
            with suppress(OSError):
                os.write(2, STOPPING.encode())
        ranks.signal_all(signal.SIGTERM if len(ranks.signals) == 1 else signal.SIGKILL)

    try:
        with on_signals(stop):
            store = MessageStore.join(meeting, job, secret)
            while (status := ranks.run(store)) is None:
                _log.info("hecate: the job has gone on without this node, which comes again")
    except dist.DistError:
        _log.info(
            f"hecate: the meeting point of the nodes, {meeting.host}:{meeting.port}, is lost, and no node goes on without it\n"
            "  when the node that hosts it is back, start all nodes again with resume=true"
        )
        return 1
    finally:
        ranks.end_all()
    if ranks.signals and (status == 0 or status > 128):
        return 128 + ranks.signals[0]
    if status == USER_ERROR_EXIT and (found := mistakes(own.store.parent)):
        _log.info(found[0].read_text(encoding="utf-8"))
    elif status > 128:
        _log.info(_STOPPED_ELSEWHERE)
    elif status:
        _log.info(f"hecate: the job is over; what the node at {meeting.host} has printed says why")
    return status


class _OwnRanks:
    """A node's processes, and what is said of them."""

    def __init__(self, own: RankCommand, job: JobShape, address: str) -> None:
        self._own, self._job, self._address, self._files = own, job, address, own.store
        self._processes: dict[int, Popen[bytes]] = {}
        self._devices: dict[int, int] = {}
        self._delivered: dict[int, int] = {}
        """a member -> how many of the ordered signals it has had"""
        self._stopped = StoppedRanks()
        self.signals: list[int] = []
        """the signals that the launcher itself has received"""

    def run(self, store: MessageStore) -> int | None:
        """Follow until the run has ended, and return its exit status; None: this node has been taken for lost."""
        self.end_all()
        self._processes, self._devices, self._delivered = {}, {}, {}
        said, times_read = self._report(), 0
        number = store.arrive(said)
        PROGRESS.info("hecate: this node is at the meeting point; its ranks start once all nodes are there")
        while True:
            if (times := store.times_ordered()) != times_read:
                orders, times_read = read_orders(store.orders()), times
                if number in orders.lost:
                    return None
                self._carry_out(number, orders)
                if orders.status is not None:
                    self.end_all()
                    store.report(number, self._report(leaves=True))
                    return orders.status
            if self._processes:
                self._stopped.end_members(read_generation(self._files).members, self._processes, self._files.parent)
            leaves = len(self.signals) > 1 or (bool(self.signals) and not self._train())
            if (report := self._report(leaves=leaves)) != said:
                store.report(number, report)
                said = report
            if leaves:
                return 0
            time.sleep(_LOOK_SECONDS)

    def _train(self) -> bool:
        """Whether a process of this node trains. Those that still load would be waited for in vain once the run is to stop."""
        members = read_generation(self._files).members if self._processes else ()
        return any(member in members and process.poll() is None for member, process in self._processes.items())

    def signal_all(self, number: int) -> None:
        for process in list(self._processes.values()):
            if process.poll() is None:
                process.send_signal(number)

    def end_all(self) -> None:
        self.signal_all(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def _carry_out(self, number: int, orders: JobOrders) -> None:
        if orders.generation is None:
            return
        for name in orders.arrived:
            self._files.with_name(name).touch()
        write_generation(self._files, orders.generation)
        for name, order in orders.members.items():
            member = int(name)
            if order.node != number:
                continue
            if member not in self._processes:
                self._start(member, order)
            for ordered in order.signals[self._delivered[member] :]:
                # No other signal is ever ordered; what comes over the network could otherwise send any to this machine's processes.
                if ordered in (signal.SIGTERM, signal.SIGKILL) and self._processes[member].poll() is None:
                    self._processes[member].send_signal(ordered)
            self._delivered[member] = len(order.signals)

    def _start(self, member: int, order: MemberOrder) -> None:
        taken = {self._devices[other] for other, process in self._processes.items() if process.poll() is None}
        if order.device in taken or not 0 <= order.device < self._job.ranks_per_node:
            raise UserError(f"member {member} was ordered to use device {order.device} of this node, which is taken or does not exist")
        self._processes[member] = self._own.start(member, order.device, order.begins)
        self._devices[member], self._delivered[member] = order.device, 0
        if self.signals:  # one that came while the process was started has not reached it
            self._processes[member].send_signal(signal.SIGTERM)

    def _report(self, *, leaves: bool = False) -> NodeReport:
        ended = {member: status for member, process in self._processes.items() if (status := process.poll()) is not None}
        folder = self._files.parent
        own = {str(member) for member in self._processes}
        names = [name for name in os.listdir(folder) if name.startswith(("here-", "ready-")) and name.rpartition("-")[2] in own]
        return NodeReport(
            beat=int(time.monotonic() / _BEAT_SECONDS),
            address=self._address,
            ended={str(member): status for member, status in ended.items()},
            files=tuple(sorted(names)),
            mistakes={
                str(member): error_file(folder, member).read_text(encoding="utf-8")
                for member, status in ended.items()
                if status == USER_ERROR_EXIT and error_file(folder, member).exists()
            },
            stopping=bool(self.signals),
            leaves=leaves,
        )
