"""The workers of a job on a Ray cluster: one actor a device, all in one placement group, and one stream of what happens to each. Orders go
to them by way of the rendezvous.

A place keeps its number for the life of the job. When its actor is lost, another is asked for at once; Ray starts it as soon as a device
with the same labels is free, which may be now or when a node returns. Once the job runs, each node has a spare: a process that has imported
what a worker needs and holds no device. It becomes the next worker there that is asked for in the place of a lost one.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hecate.errors import UserError
from hecate.launch.local_launcher import ALLOCATOR_SETTINGS
from hecate.launch.policy.devices import Device
from hecate.launch.ray_job.order_store import Rendezvous
from hecate.launch.ray_job.worker import Event, Worker

_PING_EVERY_SECONDS = 2.0
"""an answer takes the interpreter from the training thread"""
_ANSWER_SECONDS = 30.0
"""for what Ray has said is there"""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Hired:
    """A worker that was asked for, from its actor's beginning to its end."""

    number: int
    actor: Any
    stream: Any
    """of its events"""
    orders: int = 0
    """that it was given"""
    unanswered: int = 0
    """orders that it will have carried out when it has answered the last ping; 0: it has"""
    ping_sent: float = -math.inf


@dataclass
class Place:
    """One device's place in the group."""

    index: int
    device: Device
    worker: Hired | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """of its worker; empty: it has not come up yet"""
    gpus: str | None = None
    """of its last worker, by their numbers on the node"""

    @property
    def alive(self) -> bool:
        return bool(self.facts)

    @property
    def name(self) -> str:
        """For the user."""
        return f"device {self.index} ({self.device.kind} on {self.device.address} {self.device.node_id[:8]})"


class WorkerGroup:
    """Asks Ray for workers and listens to them. Decides nothing."""

    def __init__(
        self, ray: Any, devices: Sequence[Device], rendezvous: Rendezvous, *, config: str, report_steps: int, address: str | None
    ) -> None:
        """
        Args:
            rendezvous: through which orders go.
            address: to whose interface all workers bind their messages; None: each to its node's.
        """
        self._ray, self._rendezvous = ray, rendezvous
        self._config, self._report_steps, self._address = config, report_steps, address
        self._hired = 0
        self.places = [Place(index, device) for index, device in enumerate(devices)]
        self._placement: Any = None
        self._spares: dict[str, Hired] = {}
        """by the id of a node"""

    def place(self, timeout: float) -> None:
        """Reserve all devices.

        Raises:
            UserError: the cluster does not give them in time.
        """
        from ray.util.placement_group import placement_group

        self._placement = placement_group(
            [dict(place.device.resources) for place in self.places],
            strategy="PACK",
            bundle_label_selector=[dict(place.device.selector) for place in self.places],
        )
        try:
            self._ray.get(self._placement.ready(), timeout=timeout)
        except self._ray.exceptions.GetTimeoutError:
            wanted = ", ".join(f"{count} x {what}" for what, count in _counted(self.places).items())
            raise UserError(
                f"the cluster did not give the devices within {timeout:.0f} s (ray.start_timeout): {wanted}.\n"
                "  does another job hold them? `ray status` tells"
            ) from None
        self._read_nodes()

    def ask_for(self, place: Place) -> None:
        """A worker for a place that has none. It comes up in its own time; `poll` tells."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        spare = self._spares.pop(place.device.node_id, None)
        if spare is not None and self.node_lives(place):
            place.worker = spare
            if place.gpus is not None:
                self.tell(place, "take", place.gpus)
            return
        resources = dict(place.device.resources)
        place.worker = self._hire(
            place,
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=place.index),
        )

    def tell(self, place: Place, method: str, *arguments: Any) -> None:
        """Give a place's worker an order, a method of `Worker`; it gets them in this order."""
        assert place.worker is not None
        self._rendezvous.order(place.worker.number, place.worker.orders, method, arguments)
        place.worker.orders += 1

    def keep_spares(self) -> None:
        """A spare for each node that has a worker and no spare. A lost worker's devices stay the job's, so that a spare may take them."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for place in self.places:
            if place.alive and place.device.node_id not in self._spares:
                strategy = NodeAffinitySchedulingStrategy(place.device.node_id, soft=False)
                self._spares[place.device.node_id] = self._hire(place, num_cpus=0, num_gpus=0, scheduling_strategy=strategy)

    def ready_spares(self) -> int:
        """That have imported all and only wait."""
        coming = [spare.stream for spare in self._spares.values()]
        return len(self._ray.wait(coming, num_returns=len(coming), timeout=0)[0]) if coming else 0

    def _hire(self, place: Place, **options: Any) -> Hired:
        cpus = int(dict(place.device.resources).get("CPU", 1))
        environment = {
            **ALLOCATOR_SETTINGS,
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": str(max(1, cpus)),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else asking whether there is a GPU would settle, for a spare, that there is none
        }
        described = self._ray.remote(Worker).options(max_restarts=0, runtime_env={"env_vars": environment}, **options)
        number, self._hired = self._hired, self._hired + 1
        actor = described.remote(
            number,
            self._rendezvous.host,
            self._rendezvous.port,
            self._rendezvous.secret,
            self._config,
            self._report_steps,
            self._address or place.device.address,
        )
        return Hired(number, actor, actor.events.options(num_returns="streaming").remote())

    def poll(self, timeout: float) -> list[tuple[Place, Event]]:
        """What has happened; waits `timeout` seconds at most. Beside what workers tell: `down`, with the cause as `text`, of one that was
        lost or could not start."""
        waiting = {place.worker.stream: place for place in self.places if place.worker is not None}
        if not waiting:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:  # and whatever else is there
            ready, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        return [(waiting[reference], self._read(waiting[reference], reference)) for reference in ready]

    def ping(self, place: Place, now: float) -> float:
        """Seconds since a place's worker was asked something that it has not answered; 0 if it has. To be called often; it asks now and
        then."""
        worker = place.worker
        assert worker is not None
        if worker.unanswered and self._rendezvous.carried_out(worker.number) < worker.unanswered:
            return now - worker.ping_sent
        worker.unanswered = 0
        if now - worker.ping_sent >= _PING_EVERY_SECONDS:
            self.tell(place, "ping")
            worker.unanswered, worker.ping_sent = worker.orders, now
        return 0.0

    def kill(self, place: Place) -> None:
        """End a place's worker, or stop asking for one."""
        if place.worker is not None:
            self._ray.kill(place.worker.actor, no_restart=True)
        self._clear(place)

    def node_lives(self, place: Place) -> bool:
        return any(node["NodeID"] == place.device.node_id and node["Alive"] for node in self._ray.nodes())

    def close(self) -> None:
        """End all workers. Their devices are free when this process leaves the cluster."""
        for place in self.places:
            self.kill(place)
        for spare in self._spares.values():
            self._ray.kill(spare.actor, no_restart=True)

    def _read(self, place: Place, reference: Any) -> Event:
        try:
            item = next(reference, None)
            if item is None:  # the actor could not even be made; this raises why
                assert place.worker is not None
                item = place.worker.actor.__ray_ready__.remote()
            event = dict(self._ray.get(item, timeout=_ANSWER_SECONDS))
        except (self._ray.exceptions.RayError, ImportError) as error:
            self._clear(place)
            return {"kind": "down", "text": _cause(error)}
        if event["kind"] == "up":
            place.facts = event
            place.gpus = place.gpus or event["gpus"]
            self._read_nodes()
        return event

    def _clear(self, place: Place) -> None:
        place.worker, place.facts = None, {}

    def _read_nodes(self) -> None:
        """Ray decides which of several equal nodes a place is on."""
        from dataclasses import replace

        from ray.util.placement_group import placement_group_table

        nodes = placement_group_table(self._placement)["bundles_to_node_id"]
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        for place in self.places:
            node_id = nodes.get(place.index)
            if node_id:
                place.device = replace(place.device, node_id=node_id, address=address.get(node_id, place.device.address))


def check_versions(places: Sequence[Place]) -> None:
    """Raises UserError unless all workers that are up run the same versions."""
    up = [place for place in places if place.facts]
    for place in up[1:]:
        versions, others = up[0].facts["versions"], place.facts["versions"]
        for name in versions:
            if versions[name] != others[name]:
                raise UserError(
                    f"the nodes have different versions of {name}: {versions[name]} on {up[0].name}, {others[name]} on {place.name}\n"
                    "  install the same on all nodes"
                )


def _counted(places: Sequence[Place]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for place in places:
        what = place.device.kind + "".join(f" {key}={value}" for key, value in place.device.selector)
        counts[what] = counts.get(what, 0) + 1
    return counts


def _cause(error: BaseException) -> str:
    """One line. Ray wraps what went wrong on a worker in a traceback, in colours."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    missing = [line for line in lines if line.startswith(("ModuleNotFoundError:", "ImportError:"))]
    if missing:
        return missing[-1][:300]
    return (lines[-1] if "Traceback" in str(error) and lines else " ".join(lines))[:300] or type(error).__name__
