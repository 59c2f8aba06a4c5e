"""The process of one rank under a controller. It trains in one thread and receives orders in another.

This module does not import Ray. Events leave the process as JSON values.
"""

from __future__ import annotations

import logging
import os
import platform
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from hecate.io.terminal import show_messages
from hecate.launch.addresses import interface_of
from hecate.launch.ray_job.messages import (
    Assignment,
    Begin,
    CheckpointSaved,
    Interrupt,
    Join,
    Leave,
    LeftGeneration,
    Outcome,
    PartBuilt,
    Ping,
    Prepare,
    Prepared,
    Replan,
    StepsDone,
    StepTotals,
    Stop,
    TakeGpus,
    TrainingEnded,
    WorkerEvent,
    WorkerOrder,
    WorkerUp,
    message_json,
)
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.launcher_files import SURVIVAL_SETTINGS

if TYPE_CHECKING:  # a worker imports training in its own thread, after it has started
    import torch.distributed as dist

    from hecate.elastic.rebuild import Group
    from hecate.elastic.run_controller import BeginFacts, ReplanOrder, StepFacts
    from hecate.parallel.cluster.topology import Topology
    from hecate.ranks.ranks import Ranks

_log = logging.getLogger(__name__)

_TRACEBACK_FRAMES = 4
_CONNECTING = "ranks-connecting"
"""the key of the number of ranks that are about to connect"""
_LOOK_SECONDS = 0.02
_TOTALS_SECONDS = 1.0
"""from one event of the totals to the next: each takes Python's interpreter lock from the training thread"""


class Worker:
    """The Ray actor of one rank. The worker group calls `events` and nothing else; orders arrive by way of the rendezvous.

    The actor stays inside `events` for all of its life. Between two calls, Ray's main thread would take Python's interpreter lock from the
    training thread a hundred times a second.
    """

    def __init__(self, number: int, host: str, port: int, secret: str, config: str, report_steps: int, address: str) -> None:
        """
        Args:
            number: this worker's number in the job.
            host: the address of the rendezvous.
            port: the port of the rendezvous.
            secret: what the rendezvous demands of whoever connects.
            config: the run's configuration, as YAML.
            report_steps: number of steps between two reports.
            address: the ranks exchange messages on the interface with this address.
        """
        show_messages()
        self._rendezvous = host, port, secret
        self._number = number
        self._config, self._report_steps = config, report_steps
        self._events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self._link: TrainingLink | None = None
        self._thread: threading.Thread | None = None
        os.environ.update(SURVIVAL_SETTINGS | os.environ)
        interface = interface_of(address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.update(gpu_allocator_defaults(os.environ))  # those of this machine, not the driver's

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all events as they happen, as JSON values. The first is `WorkerUp`, once everything that training needs is imported."""
        import torch

        import hecate
        from hecate.train.rank_main import preload

        preload()
        threading.Thread(target=self._take_orders, daemon=True).start()
        up = WorkerUp(
            pid=os.getpid(),
            host=socket.gethostname(),
            gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
            versions={"hecate": hecate.__version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        yield message_json(up)
        while True:
            yield message_json(self._events.get())

    def _take_orders(self) -> None:
        from hecate.launch.ray_job.rendezvous import orders

        for order in orders(*self._rendezvous, self._number):
            self._carry_out(order)

    def _carry_out(self, order: WorkerOrder) -> None:
        link = self._link
        match order:
            case TakeGpus():
                os.environ["CUDA_VISIBLE_DEVICES"] = order.gpus
            case Begin():
                self._start(order.assignment)
            case Prepare():
                self._start(None)
            case Join():
                if link is not None:
                    link.assignments.put(order.assignment)
            case Leave():
                if link is not None:
                    link.leaving = True
            case Interrupt():
                if link is not None:
                    link.interrupt(order.generation)
            case Replan():
                if link is not None and link.generation == order.generation:
                    link.replan = order
            case Stop():
                if link is not None:
                    link.stopping = True
            case Ping():
                pass
            case _:
                assert_never(order)

    def _start(self, assignment: Assignment | None) -> None:
        """Train in a new thread, which begins when the thread before it has ended.

        Args:
            assignment: None: prepare to join a run under way.
        """
        if self._link is not None:
            self._link.assignments.put(None)  # this ends a thread that waits to join a generation
        self._link = TrainingLink(self._events, self._report_steps, assignment, self._meet)
        self._thread = threading.Thread(target=self._train, args=(assignment, self._link, self._thread), daemon=True)
        self._thread.start()

    def _meet(self, generation: int) -> dist.Store:
        from hecate.ranks.meeting import meet

        return meet(*self._rendezvous, generation)

    def _train(self, assignment: Assignment | None, link: TrainingLink, before: threading.Thread | None) -> None:
        from hecate.errors import UserError

        if before is not None:
            before.join()
        text = ""
        try:
            outcome = Outcome.FINISHED if _run(self._config, assignment, link) else Outcome.STOPPED
        except NotNeeded:
            return
        except UserError as error:
            outcome, text = Outcome.USER_ERROR, str(error)
        except Exception:  # noqa: BLE001 - the controller decides what follows, whatever the error is
            outcome, text = Outcome.FAILED, traceback.format_exc(limit=-_TRACEBACK_FRAMES)
        self._events.put(TrainingEnded(generation=link.generation, outcome=outcome, text=text))


class NotNeeded(Exception):
    """The controller has given this worker another task while it waited to join a run. This is no failure, and makes no event."""


class TrainingLink:
    """Connects the training thread of a worker with its events and orders.

    It is the training's controller, which sums up what happens in one report every few steps, and the training's membership, which waits
    for the next generation.
    """

    def __init__(
        self,
        events: queue.SimpleQueue[WorkerEvent],
        report_steps: int,
        assignment: Assignment | None,
        meet: Callable[[int], dist.Store],
    ) -> None:
        self.meet = meet
        """gives the store where the ranks of a generation meet"""
        self.replan: Replan | None = None
        """the newest order to re-plan; None: there was none in this generation"""
        self.stopping = self.leaving = False
        self.assignments: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        """generations to join; None: the thread is not needed any more"""
        self.generation, self._rank = (-1, -1) if assignment is None else (assignment.generation, assignment.rank)
        self.ranks: Ranks | None = None
        """this process's `Ranks` in the newest generation; None: it has joined none"""
        self.sharded_layers = False
        """`model.shard_non_experts`, which the training's thread reads"""
        self._interrupted: int | None = None
        """the generation that was broken off last"""
        self._events, self._report_steps = events, report_steps
        self._dense_tokens, self._dense_seconds, self._seconds, self._steps = 0, 0.0, 0.0, 0
        self._max_steps, self._told = 0, -_TOTALS_SECONDS

    def interrupt(self, generation: int) -> None:
        """Break off the collectives of a generation, if it is the one that this process is in, or is about to join."""
        # Noted before the ranks are looked at; `connected`, in the training's thread, sets the ranks before it looks at the note. So
        # whichever comes second aborts the groups, and none goes on in a generation that is broken off.
        self._interrupted = generation
        if generation == self.generation and self.ranks is not None:
            self.ranks.abort()

    def connected(self, ranks: Ranks) -> Ranks:
        """Take over the groups that this process has just connected to. They break off at once if they were interrupted meanwhile."""
        self.ranks = ranks
        if self.interrupted:
            ranks.abort()
        return ranks

    @property
    def interrupted(self) -> bool:
        """Whether the generation that this process is in, or joins, was broken off."""
        return self._interrupted == self.generation

    def loaded(self) -> None:
        """The controller learns it from `begins`."""

    def regroup_requested(self) -> bool:
        return self.leaving

    def first_group(self) -> Group:
        group = self._join(Prepared)
        if group is None:
            raise NotNeeded
        return group

    def next_group(self) -> Group | None:
        return self._join(lambda: LeftGeneration(generation=self.generation))

    def begins(self, facts: BeginFacts) -> None:
        from hecate.parallel.cluster.topology_file import topology_text

        topology = topology_text(facts.topology)
        self._max_steps = facts.max_steps
        built = PartBuilt(step=facts.step, max_steps=facts.max_steps, sequences=facts.sequences, owned=facts.owned, topology=topology)
        self._events.put(built)

    def stepped(self, facts: StepFacts) -> None:
        self._dense_tokens += facts.dense_tokens
        self._dense_seconds += facts.dense_seconds
        self._seconds += facts.seconds
        self._steps += 1
        now = time.monotonic()
        # The last step's come whatever the time, or the status of a run that has ended would be of an earlier one.
        if self._rank == 0 and (now >= self._told + _TOTALS_SECONDS or facts.step == self._max_steps):
            self._told = now
            totals = StepTotals(
                step=facts.step,
                loss=facts.loss,
                tokens_per_s=facts.tokens / facts.seconds,
                imbalance=facts.imbalance,
                bytes_sent=facts.bytes_sent,
                loads={str(layer): load_E for layer, load_E in facts.loads.items()},
            )
            self._events.put(totals)
        if facts.step % self._report_steps:
            return
        report = StepsDone(
            step=facts.step,
            dense_tokens=self._dense_tokens,
            dense_seconds=self._dense_seconds,
            step_seconds=self._seconds / self._steps,
        )
        self._events.put(report)
        self._dense_tokens, self._dense_seconds, self._seconds, self._steps = 0, 0.0, 0.0, 0

    def saved(self, step: int, path: Path) -> None:
        self._events.put(CheckpointSaved(step=step, path=str(path)))

    def replan_order(self) -> ReplanOrder | None:
        from hecate.elastic.run_controller import ReplanOrder

        newest = self.replan
        if newest is None:
            return None
        return ReplanOrder(number=newest.number, flops=newest.flops, sequences=newest.sequences, reshard=newest.reshard)

    def stop_requested(self) -> bool:
        return self.stopping

    def _join(self, waiting: Callable[[], WorkerEvent]) -> Group | None:
        """Send the event `waiting()`, and join the generation that the controller assigns; None: this thread is not needed any more."""
        from torch import OutOfMemoryError

        from hecate.elastic.rebuild import Group
        from hecate.parallel.cluster.topology_file import parse_topology
        from hecate.ranks.backend import forget_groups
        from hecate.ranks.meeting import CONNECT_LIMIT, watched
        from hecate.ranks.ranks import connect, loss_in_words

        while True:
            self._events.put(waiting())
            assignment = self.assignments.get()
            if assignment is None:
                return None
            assert assignment.topology is not None
            self.replan, self.leaving, self.generation, self._rank = None, False, assignment.generation, assignment.rank
            try:
                store = watched(_meet_all(assignment, self), lambda: not self.interrupted)
                ranks = connect(store, assignment.rank, assignment.world_size, sharded_layers=self.sharded_layers, limit=CONNECT_LIMIT)
            except OutOfMemoryError:
                raise
            except RuntimeError as error:  # another rank was lost while the ranks connected
                where = f"rank {assignment.rank} could not connect in generation {assignment.generation}"
                _log.warning(f"hecate: {where}: {loss_in_words(error)}")
                forget_groups()
            else:
                return Group(self.connected(ranks), parse_topology(assignment.topology, "the controller's topology"))


def _run(config_text: str, assignment: Assignment | None, link: TrainingLink) -> bool:
    """Train to the end, and return True; False: training stopped before the end, as ordered."""
    import tempfile
    from dataclasses import replace

    import torch.distributed as dist

    from hecate.config import load_config
    from hecate.parallel.cluster.topology_file import parse_topology
    from hecate.ranks.backend import forget_groups
    from hecate.ranks.ranks import connect
    from hecate.train.loop import train

    with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config_text, encoding="utf-8")
        config = load_config(path, claim_output=False)
    sharded = link.sharded_layers = config.model.shard_non_experts
    try:
        if assignment is None:
            link.ranks = connect(dist.HashStore(), 0, 1, sharded_layers=sharded)
            finished = train(config, link.ranks, link, joins=True, controller=link)
        else:
            store = _meet_all(assignment, link)
            ranks = link.connected(connect(store, assignment.rank, assignment.world_size, sharded_layers=sharded))
            given = None if assignment.topology is None else parse_topology(assignment.topology, "the controller's topology")
            topology = given or _measured(ranks, assignment.nodes)
            finished = train(replace(config, resume=assignment.resume), ranks, link, topology=topology, controller=link)
        assert link.ranks is not None
        link.ranks.leave(agreed=True)
        return finished
    finally:
        if link.ranks is not None:
            # A waiting peer must see at once that this rank is gone. Dropping the groups is not enough: a traceback may keep them alive.
            link.ranks.leave()
        forget_groups()


def _meet_all(assignment: Assignment, link: TrainingLink) -> dist.Store:
    """Wait until all ranks of a generation are about to connect, and return the store where they meet.

    Without this a rank that connects would wait minutes for one that is lost, since gloo cannot be interrupted meanwhile.

    Raises:
        RuntimeError: the generation was broken off meanwhile.
    """
    store = link.meet(assignment.generation)
    broken_off = RuntimeError("the controller broke the generation off, because another rank was lost")
    if link.interrupted:
        raise broken_off
    store.add(_CONNECTING, 1)
    while store.add(_CONNECTING, 0) < assignment.world_size:
        if link.interrupted:
            if store.add(_CONNECTING, -1) < assignment.world_size - 1:
                raise broken_off
            store.add(_CONNECTING, 1)  # all had come for a moment, so others may connect to this rank by now; it breaks off afterwards
            break
        time.sleep(_LOOK_SECONDS)
    return store


def _measured(ranks: Ranks, nodes: tuple[str, ...]) -> Topology:
    """Measure the topology of the ranks. Every rank must call it."""
    from hecate.launch.profile.fit import topology_from
    from hecate.launch.profile.probe import device_name, quick_sizes
    from hecate.launch.profile.run import measure
    from hecate.parallel.cluster.topology import nodes_of_hosts
    from hecate.ranks.devices import gather_texts

    kinds = tuple(gather_texts(device_name(ranks.device), ranks))
    return topology_from(measure(ranks, nodes_of_hosts(nodes), kinds, quick_sizes(ranks.device)))
