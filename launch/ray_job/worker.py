"""One rank's process under a controller: it trains in a thread, tells of it, and takes orders in another. Knows no Ray; JSON values go in
and out."""

from __future__ import annotations

import os
import platform
import queue
import socket
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.launch.addresses import interface_of

Event = dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """A worker's place in a generation."""

    generation: int
    rank: int
    world_size: int
    host: str
    port: int
    """of the rendezvous"""
    nodes: tuple[str, ...]
    """name of each rank's node"""
    topology: str | None
    """YAML; None: the ranks are to measure it"""
    resume: bool


class Worker:
    """Whoever has made it calls `events`, and nothing else. The other methods are orders, which come by way of the rendezvous.

    As a Ray actor it is in `events` for all of its life: between two calls Ray's main thread would ask for the interpreter a hundred
    times a second, and each time the training thread would have to give it up.
    """

    def __init__(self, number: int, host: str, port: int, secret: str, config: str, report_steps: int, address: str) -> None:
        """
        Args:
            number: of this worker, with the host, port and secret of the rendezvous.
            config: the run's configuration, as YAML.
            address: to whose interface the ranks' messages are bound.
        """
        self._place_of_orders = host, port, secret, number
        self._config, self._report_steps = config, report_steps
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._line: _Line | None = None
        self._thread: threading.Thread | None = None
        interface = interface_of(address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)

    def events(self) -> Iterator[Event]:
        """What happens, as it happens, without end. First of all `up`, with who and what this process is, when it has imported all that the
        training needs."""
        import torch

        import hecate
        from hecate.train.preload import preload

        preload()
        threading.Thread(target=self._take_orders, daemon=True).start()
        yield {
            "kind": "up",
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "versions": {"hecate": hecate.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        while True:
            yield self._events.get()

    def take(self, gpus: str) -> None:
        """Be the worker of these GPUs, by their numbers on the node; of a process that has touched none yet."""
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus

    def begin(self, assignment: dict[str, Any]) -> None:
        """Begin a run as this rank, from the last checkpoint or from nothing, in a new thread."""
        self._start(_place(assignment))

    def prepare(self) -> None:
        """Load what a rank needs, in a new thread, to join a run under way: `join` lets it in."""
        self._start(None)

    def join(self, assignment: dict[str, Any]) -> None:
        """Go on in the next generation, as the training thread waits to do."""
        if self._line is not None:
            self._line.assignments.put(_place(assignment))

    def regroup(self) -> None:
        """Leave the generation after the step under way, for the next one."""
        if self._line is not None:
            self._line.regrouping = True

    def interrupt(self, generation: int) -> None:
        """Break off what the training waits for: a rank of its generation is lost, of which no message may ever tell."""
        line = self._line
        if line is not None and line.generation == generation and line.ranks is not None:
            line.ranks.abort()

    def order(self, generation: int, order: dict[str, Any]) -> None:
        """See `hecate.elastic.observer.Order`."""
        from hecate.elastic.observer import Order

        flops, rows = (None if order[key] is None else tuple(order[key]) for key in ("flops", "rows"))
        if self._line is not None and self._line.generation == generation:
            self._line.newest = Order(number=order["number"], flops=flops, rows=rows, reshard=order["reshard"])

    def stop(self) -> None:
        """Save and end after the step under way."""
        if self._line is not None:
            self._line.stopping = True

    def ping(self) -> None:
        """That it was carried out is the answer."""

    def _take_orders(self) -> None:
        from hecate.launch.ray_job.order_store import orders

        for method, arguments in orders(*self._place_of_orders):
            getattr(self, method)(*arguments)

    def _start(self, place: Assignment | None) -> None:
        if self._line is not None:
            self._line.assignments.put(None)  # one that waits is not needed as it is
        self._line = _Line(self._events, self._report_steps, place)
        self._thread = threading.Thread(target=self._train, args=(place, self._line, self._thread), daemon=True)
        self._thread.start()

    def _train(self, place: Assignment | None, line: _Line, before: threading.Thread | None) -> None:
        from hecate.errors import UserError

        if before is not None:
            before.join()
        try:
            ended = {"kind": "finished" if _run(self._config, place, line) else "stopped"}
        except UserError as error:
            ended = {"kind": "mistake", "text": str(error)}
        except Exception:  # noqa: BLE001 - whatever it was, the controller decides what follows
            ended = {"kind": "failed", "text": traceback.format_exc(limit=-4)}
        self._events.put({**ended, "generation": line.generation})


class _Line:
    """The training's line to the outside: its `Observer`, which gathers what happens into one message every so many steps, and its
    `Controller`, which waits for the next generation."""

    def __init__(self, events: queue.SimpleQueue[Event], report_steps: int, place: Assignment | None) -> None:
        self.newest: Any = None
        self.stopping = self.regrouping = False
        self.assignments: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self.generation, self._rank = (-1, -1) if place is None else (place.generation, place.rank)
        self.ranks: Any = None
        """those of the newest generation"""
        self._events, self._report_steps = events, report_steps
        self._dense_tokens, self._dense_seconds, self._seconds, self._steps, self._tokens = 0, 0.0, 0.0, 0, 0

    def wants_regroup(self) -> bool:
        return self.regrouping

    def first_group(self) -> Any:
        group = self._wait("prepared")
        if group is None:
            raise RuntimeError("was not needed")
        return group

    def next_group(self) -> Any:
        return self._wait("regrouping")

    def _wait(self, kind: str) -> Any:
        import torch.distributed as dist

        from hecate.elastic.rebuild import Group
        from hecate.launch.ray_job.order_store import meet
        from hecate.parallel.topology_file import parse_topology
        from hecate.ranks.ranks import connect

        while True:
            self._events.put({"kind": kind, "generation": self.generation})
            place = self.assignments.get()
            if place is None:
                return None
            assert place.topology is not None
            self.newest, self.regrouping, self.generation, self._rank = None, False, place.generation, place.rank
            try:
                self.ranks = connect(meet(place.host, place.port, place.generation), place.rank, place.world_size)
            except RuntimeError:  # another was lost on the way
                if dist.is_initialized():
                    dist.destroy_process_group()
            else:
                return Group(self.ranks, parse_topology(place.topology, "the controller's topology"))

    def begins(self, facts: dict[str, Any]) -> None:
        self._events.put({"kind": "begins", **facts})

    def stepped(self, facts: Any) -> None:
        self._dense_tokens += facts.dense_tokens
        self._dense_seconds += facts.dense_seconds
        self._seconds += facts.seconds
        self._tokens += facts.tokens
        self._steps += 1
        if facts.step % self._report_steps:
            return
        report = {
            "kind": "report",
            "step": facts.step,
            "dense_tokens": self._dense_tokens,
            "dense_seconds": self._dense_seconds,
            "step_seconds": self._seconds / self._steps,
        }
        if self._rank == 0:  # what all ranks know alike
            report |= {
                "loss": facts.loss,
                "tokens_per_s": self._tokens / self._seconds,
                "imbalance": facts.imbalance,
                "bytes_sent": facts.bytes_sent,
                "loads": {str(layer): load_E for layer, load_E in facts.loads.items()},
            }
        self._events.put(report)
        self._dense_tokens, self._dense_seconds, self._seconds, self._steps, self._tokens = 0, 0.0, 0.0, 0, 0

    def saved(self, step: int, path: Path) -> None:
        self._events.put({"kind": "saved", "step": step, "path": str(path)})

    def order(self) -> Any:
        return self.newest

    def wants_stop(self) -> bool:
        return self.stopping


def _place(assignment: dict[str, Any]) -> Assignment:
    return Assignment(**{**assignment, "nodes": tuple(assignment["nodes"])})


def _run(config_text: str, place: Assignment | None, line: _Line) -> bool:
    import tempfile
    from dataclasses import replace

    import torch.distributed as dist

    from hecate.config import load_config
    from hecate.launch.ray_job.order_store import meet
    from hecate.parallel.topology_file import parse_topology
    from hecate.ranks.ranks import connect
    from hecate.train.loop import train

    with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config_text, encoding="utf-8")
        config = load_config(path, claim_output=False)
    try:
        if place is None:
            line.ranks = connect(dist.HashStore(), 0, 1)
            return train(config, line.ranks, line, joins=True, observer=line)
        ranks = line.ranks = connect(meet(place.host, place.port, place.generation), place.rank, place.world_size)
        known = None if place.topology is None else parse_topology(place.topology, "the controller's topology")
        topology = known or _measured(ranks, place.nodes)
        return train(replace(config, resume=place.resume), ranks, line, topology=topology, observer=line)
    finally:
        if line.ranks is not None and dist.is_initialized():
            # Not only forgotten: a peer that waits for this rank must see it at once, though a traceback may still hold the groups.
            line.ranks.leave()


def _measured(ranks: Any, nodes: tuple[str, ...]) -> Any:
    """The topology of the ranks. Every rank must call it."""
    from hecate.profile.fit import nodes_of_hosts, topology_from
    from hecate.profile.probe import device_name, quick_sizes
    from hecate.profile.run import all_texts, measure

    kinds = tuple(all_texts(device_name(ranks.device), ranks))
    return topology_from(measure(ranks, nodes_of_hosts(nodes), kinds, quick_sizes(ranks.device)))
