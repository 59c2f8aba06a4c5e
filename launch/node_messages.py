"""What the launchers of several nodes (`hecate.launch.surviving_nodes`) tell each other, and the key-value store through which they do.

The launcher of the node with the meeting point *leads*: it writes orders. Each other one writes reports. The store answers those alone who
hold the job's secret (`hecate.ranks.job_store`). What is read is checked all the same: no text becomes a command, a path outside the run's
folder, or code.
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from hecate.errors import UserError
from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.strict_json import JsonError, parse_json
from hecate.launch.addresses import Endpoint
from hecate.launch.rank_command import Beginning
from hecate.ranks.job_store import JobStore, StoreServer
from hecate.ranks.launcher_files import Generation

_TIMEOUT = timedelta(seconds=30)
"""how long the store may take to answer"""
_ANSWER = timedelta(seconds=5)
"""how long another launcher of this machine may take to answer"""
_NUMBER = re.compile("[0-9]{1,9}")
_OF_MEMBER = re.compile("(?:ready|here-[0-9]{1,9})-([0-9]{1,9})")
"""the name of a file that the member with this number leaves"""
_JOB_SECONDS = 5.0
"""how long a node that has connected waits to read which job meets there"""
_MOST_ARRIVALS = 10_000
_SIGNALS = 128
"""a number above those of all signals"""
_LONGEST = 4000
"""the most characters of a user error's text"""


@dataclass(frozen=True)
class JobShape:
    """What is compared when a node comes. It must be the same on all nodes, and so must the configuration."""

    name: str
    fewest: int
    """the smallest number of nodes"""
    most: int
    """the largest number of nodes"""
    ranks_per_node: int
    survives: bool
    """whether its ranks can go on without one that dies (`fssdp.redundancy`)"""
    output_dir: str
    """as the configuration has it; two jobs that are alike in all else differ in this"""

    def in_words(self) -> str:
        how = "which go on without a lost one" if self.survives else "which start again"
        nodes = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{self.name!r} of {nodes} nodes with {self.ranks_per_node} ranks each, {how}, into {self.output_dir}"


@dataclass(frozen=True)
class NodeReport:
    """What a launcher says of its node."""

    beat: int
    """a number that changes from time to time; a launcher whose beat stays the same is lost"""
    address: str
    ended: dict[str, int]
    """a member that has ended -> its exit status"""
    files: tuple[str, ...]
    """the names of the files that its members have left"""
    mistakes: dict[str, str]
    """a member -> the text of its user error"""
    stopping: bool
    """whether the launcher has received a signal to stop"""
    leaves: bool
    """whether the launcher has ended its members and ends"""


@dataclass(frozen=True)
class MemberOrder:
    """A process that a node must start, and the signals that it must have had."""

    node: int
    """the number of the node's arrival"""
    device: int
    """the number of the device on its node"""
    begins: Beginning | None
    """the process's place among those that begin the run; None: it joins a run under way"""
    signals: tuple[int, ...]


@dataclass(frozen=True)
class JobOrders:
    """What the leading launcher says to all."""

    generation: Generation | None
    """the ranks that train at present; None: the run waits for its nodes"""
    arrived: tuple[str, ...]
    """the names of the files that members leave just before they connect in this generation"""
    members: dict[str, MemberOrder]
    lost: tuple[int, ...]
    """the nodes that count as lost, by number of arrival"""
    status: int | None
    """the exit status of the run, when it has ended"""


class MessageStore:
    """The store at the meeting point, seen from one launcher. Every method raises `dist.DistError` if the store is lost."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    @classmethod
    def host(cls, meeting: Endpoint, job: JobShape, secret: bytes) -> MessageStore | None:
        """Make the store in this process. It listens at the meeting point's address alone.

        Returns:
            None: another launcher of this job on this machine has done it.

        Raises:
            UserError: something else listens there, or this process cannot listen there for another reason.
        """
        try:
            server = StoreServer(meeting.host, meeting.port, secret)
        except OSError as error:
            where = f"--rdzv-endpoint {meeting.host}:{meeting.port}"
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"{where}: this node cannot listen at this address: {error.strerror}\n  give all nodes another port"
                ) from None
            try:
                cls.join(meeting, job, secret, _ANSWER)
            except dist.DistError:
                raise UserError(f"{where}: what has listened there has just ended\n  give the same command again") from None
            return None
        store = JobStore(server.host, server.port, secret, _TIMEOUT)
        store.set("job", json.dumps(to_json_values(job)))
        return cls(store)

    @classmethod
    def join(cls, meeting: Endpoint, job: JobShape, secret: bytes, timeout: timedelta = _TIMEOUT) -> MessageStore:
        """Connect to the store.

        Args:
            timeout: how long it may take to answer.

        Raises:
            UserError: another job meets there, or one with another secret.
            DistError: the node there has gone meanwhile.
        """
        deadline = time.monotonic() + _JOB_SECONDS
        try:
            store = JobStore(meeting.host, meeting.port, secret, timeout)
            while not store.check(["job"]) and time.monotonic() < deadline:
                time.sleep(0.1)
        except dist.DistStoreError as error:
            raise UserError(
                f"--rdzv-endpoint {meeting.host}:{meeting.port}: {error}\n"
                "  give all nodes the same --token-file, or the same variable HECATE_TOKEN; another program may use the port"
            ) from None
        theirs = from_json_values(JobShape, parse_json(store.get("job")))
        if theirs != job:
            raise UserError(
                f"--rdzv-endpoint {meeting.host}:{meeting.port}: another job meets there, {theirs.in_words()}\n"
                f"  this node was started for {job.in_words()}\n"
                "  give another port, or the same configuration, --rdzv-id, --nnodes and --nproc-per-node on all nodes"
            )
        return cls(store)

    def arrive(self, report: NodeReport) -> int:
        """Announce this node, and return the number of its arrival, from 1."""
        number = self._store.add("arrivals", 1)
        self.report(number, report)
        return number

    def report(self, number: int, report: NodeReport) -> None:
        self._store.set(_report_key(number), json.dumps(to_json_values(report)))

    def arrived(self, known: Collection[int]) -> list[int]:
        """The nodes that have come and left a report, by number, without those that are known."""
        count = min(self._store.add("arrivals", 0), _MOST_ARRIVALS)
        return [number for number in range(1, count + 1) if number not in known and self._store.check([_report_key(number)])]

    def reports(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """The last report of each of these nodes, as it was written."""
        asked = list(numbers)
        return dict(zip(asked, self._store.multi_get([_report_key(number) for number in asked]), strict=True)) if asked else {}

    def order(self, orders: JobOrders) -> None:
        # The orders come before their number: whoever has read the new number reads these orders, or later ones, and misses none.
        self._store.set("orders", json.dumps(to_json_values(orders)))
        self._store.add("times-ordered", 1)

    def times_ordered(self) -> int:
        """How many orders were written. Whoever waits for new ones asks for this number, since the orders themselves may be long."""
        return self._store.add("times-ordered", 0)

    def orders(self) -> bytes:
        """The last orders, as they were written."""
        return self._store.get("orders")


def read_report(text: bytes, members: Iterable[int]) -> NodeReport:
    """A node's report.

    Args:
        members: the members of this node. What it says of others is left out.

    Raises:
        JsonError: it is none.
    """
    raw = from_json_values(NodeReport, parse_json(text))
    own = {str(member) for member in members}
    if wrong := [status for status in raw.ended.values() if not -_SIGNALS < status < 256]:
        raise JsonError(f"NodeReport.ended: {wrong[0]} is no exit status")
    files = tuple(name for name in raw.files if (found := _OF_MEMBER.fullmatch(name)) and found[1] in own)
    return NodeReport(
        raw.beat,
        raw.address[:100],
        {member: status for member, status in raw.ended.items() if member in own},
        files,
        {member: said[:_LONGEST].encode(errors="replace").decode() for member, said in raw.mistakes.items() if member in own},
        raw.stopping,
        raw.leaves,
    )


def read_orders(text: bytes) -> JobOrders:
    """The orders of the launcher that leads.

    Raises:
        JsonError: it is none.
    """
    orders = from_json_values(JobOrders, parse_json(text))
    if not all(_OF_MEMBER.fullmatch(name) for name in orders.arrived) or not all(map(_NUMBER.fullmatch, orders.members)):
        raise JsonError("JobOrders: a name that no file or member has")
    return orders


def _report_key(number: int) -> str:
    return f"report-{number}"
