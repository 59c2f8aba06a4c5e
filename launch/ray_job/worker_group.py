"""The workers of a job on a Ray cluster: one actor for each device, all in one placement group.

Each worker has a stream of events to the controller. Orders go to the workers by way of the rendezvous (`rendezvous.py`).

A device keeps its number for the life of the job. When its worker is lost, another one is requested at once. Ray starts it as soon as a
device with the same labels is free, which may be when a node returns. Once the job runs, each node has a spare worker: a process that has
imported everything that a worker needs and holds no device. It replaces the next worker of its node that is lost.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hecate.errors import UserError
from hecate.launch.foreign_texts import worker_failure
from hecate.launch.local_launcher import RANK_SETTINGS
from hecate.launch.policy.devices import Device
from hecate.launch.ray_job.messages import Ping, TakeGpus, WorkerEvent, WorkerLost, WorkerOrder, WorkerUp, event_from_json
from hecate.launch.ray_job.node_watch import NodeWatches
from hecate.launch.ray_job.rendezvous import Rendezvous
from hecate.launch.ray_job.worker import Worker
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE

_PING_EVERY_SECONDS = 2.0
"""Pings are rare because each answer takes Python's interpreter lock from the training thread."""
_ANSWER_SECONDS = 30.0
"""limit for reading an event that Ray reports as ready"""


@dataclass
class WorkerHandle:
    """The controller's end of one worker, from the request for its actor to the actor's end."""

    number: int
    actor: Any
    stream: Any
    """the stream of the worker's events, as Ray gives it"""
    orders: int = 0
    """the number of orders sent to the worker"""
    unanswered: int = 0
    """the number of orders that the worker has carried out once it has answered the last ping; 0: it has answered"""
    ping_sent: float = -math.inf


@dataclass(eq=False)
class JobDevice:
    """One device of the job, and its present worker."""

    index: int
    spec: Device
    worker: WorkerHandle | None = None
    up: WorkerUp | None = None
    """the worker's first event; None: the worker has not started yet"""
    gpus: str | None = None
    """the GPUs of its last worker, by their numbers on the node"""

    @property
    def alive(self) -> bool:
        return self.up is not None

    @property
    def name(self) -> str:
        """The device in words, for messages."""
        return f"device {self.index} ({self.spec.kind} on {self.spec.address} {self.spec.node_id[:8]})"


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that every worker of a job is started with."""

    config: str
    """the run's configuration, as YAML"""
    report_steps: int
    """the number of steps between two reports"""
    worker: type[Worker]
    """the class of the actors"""
    node: str
    """the id of the controller's node"""
    address: str | None
    """the address of the interface on which all workers send and receive; None: each uses that of its node's address"""


class WorkerGroup:
    """Requests workers from Ray, sends them orders and receives their events. What to order is the controller's decision."""

    def __init__(self, ray: Any, devices: Sequence[Device], rendezvous: Rendezvous, settings: WorkerSettings) -> None:
        self._ray, self._rendezvous, self._settings = ray, rendezvous, settings
        self._requested = 0
        self.devices = [JobDevice(index, device) for index, device in enumerate(devices)]
        self._placement: Any = None
        self._spares: dict[str, WorkerHandle] = {}
        """a node's id -> its spare worker"""
        self._watches = NodeWatches(ray, settings.node)

    def reserve(self, timeout: float) -> None:
        """Reserve all devices.

        Raises:
            UserError: the cluster does not provide them in time.
        """
        from ray.util.placement_group import placement_group

        self._placement = placement_group(
            [dict(device.spec.resources) for device in self.devices],
            strategy="PACK",
            bundle_label_selector=[dict(device.spec.selector) for device in self.devices],
        )
        try:
            self._ray.get(self._placement.ready(), timeout=timeout)
        except self._ray.exceptions.GetTimeoutError:
            needed = ", ".join(f"{count} x {what}" for what, count in _counted(self.devices).items())
            raise UserError(
                f"the cluster did not provide the devices within {timeout:.0f} s (ray.start_timeout): {needed}\n"
                "  another job may hold them; `ray status` shows it"
            ) from None
        self._read_nodes()

    def request_worker(self, device: JobDevice) -> None:
        """Request a worker for a device that has none. The worker's first event, `WorkerUp`, arrives when it has started."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        spare = self._spares.pop(device.spec.node_id, None)
        if spare is not None and self.node_lives(device):
            device.worker = spare
            if device.gpus is not None:
                self.send(device, TakeGpus(gpus=device.gpus))
            return
        device.gpus = None  # those of the actor that comes, which may be on another node
        resources = dict(device.spec.resources)
        device.worker = self._start_actor(
            device,
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=device.index),
        )

    def send(self, device: JobDevice, order: WorkerOrder) -> None:
        """Send a device's worker an order. It carries out its orders one after the other."""
        assert device.worker is not None
        self._rendezvous.send(device.worker.number, device.worker.orders, order)
        device.worker.orders += 1  # the next order's number: the worker takes them in this order, and waits for one that is missing

    def keep_spares(self) -> None:
        """Start a spare on each node that has a worker and no spare. A lost worker's devices stay reserved: a spare may use them."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for device in self.devices:
            if device.alive and device.spec.node_id not in self._spares:
                strategy = NodeAffinitySchedulingStrategy(device.spec.node_id, soft=False)
                self._spares[device.spec.node_id] = self._start_actor(device, num_cpus=0, num_gpus=0, scheduling_strategy=strategy)

    def ready_spares(self) -> int:
        """The number of spares that have imported everything."""
        streams = [spare.stream for spare in self._spares.values()]
        return len(self._ray.wait(streams, num_returns=len(streams), timeout=0)[0]) if streams else 0

    def poll(self, timeout: float) -> list[tuple[JobDevice, WorkerEvent]]:
        """The events since the last call, each with its device. If there is none, wait for one for at most `timeout` seconds.

        A worker that was lost or could not start gives the event `WorkerLost`.
        """
        waiting = {device.worker.stream: device for device in self.devices if device.worker is not None}
        if not waiting:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:  # one is ready: take all that are
            ready, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        return [(waiting[reference], self._read(waiting[reference], reference)) for reference in ready]

    def ping(self, device: JobDevice, now: float) -> float:
        """Seconds since a device's worker was sent a ping that it has not answered; 0 if it has answered all pings.

        It must be called often. It sends a new ping at most every other second.
        """
        worker = device.worker
        assert worker is not None
        if worker.unanswered and self._rendezvous.carried_out(worker.number) < worker.unanswered:
            return now - worker.ping_sent
        worker.unanswered = 0
        if now - worker.ping_sent >= _PING_EVERY_SECONDS:
            self.send(device, Ping())
            worker.unanswered, worker.ping_sent = worker.orders, now
        return 0.0

    def stopped(self) -> list[tuple[JobDevice, float]]:
        """The devices whose workers' processes have been stopped, as by SIGSTOP, and for how many seconds. It must be called often."""
        pid_of: dict[str, dict[int, int]] = {}
        for device in self.devices:
            if device.worker is not None and device.up is not None:
                pid_of.setdefault(device.spec.node_id, {})[device.worker.number] = device.up.pid
        found = self._watches.look(pid_of)
        return [(device, found[device.worker.number]) for device in self.devices if device.worker and device.worker.number in found]

    def kill(self, device: JobDevice) -> None:
        """End a device's worker, even if it is stopped, or withdraw the request for one."""
        if device.worker is not None:
            self._watches.end(device.worker.number)
            self._ray.kill(device.worker.actor, no_restart=True)
        _clear(device)

    def node_lives(self, device: JobDevice) -> bool:
        return any(node["NodeID"] == device.spec.node_id and node["Alive"] for node in self._ray.nodes())

    def close(self) -> None:
        """End all workers. Their devices are free when this process leaves the cluster."""
        for device in self.devices:
            self.kill(device)
        for spare in self._spares.values():
            self._ray.kill(spare.actor, no_restart=True)
        self._watches.close()

    def _start_actor(self, device: JobDevice, **options: Any) -> WorkerHandle:
        cpus = int(dict(device.spec.resources).get("CPU", 1))
        environment = {
            **RANK_SETTINGS,
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": str(max(1, cpus)),
            **({COLLECTIVES_VARIABLE: os.environ[COLLECTIVES_VARIABLE]} if COLLECTIVES_VARIABLE in os.environ else {}),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # otherwise a spare that asks whether there is a GPU would never see one afterwards
        }
        described = self._ray.remote(self._settings.worker).options(max_restarts=0, runtime_env={"env_vars": environment}, **options)
        number, self._requested = self._requested, self._requested + 1
        actor = described.remote(
            number,
            self._rendezvous.host,
            self._rendezvous.port,
            self._rendezvous.secret,
            self._settings.config,
            self._settings.report_steps,
            self._settings.address or device.spec.address,
        )
        return WorkerHandle(number, actor, actor.events.options(num_returns="streaming").remote())

    def _read(self, device: JobDevice, reference: Any) -> WorkerEvent:
        try:
            item = next(reference, None)
            if item is None:  # the actor could not be made; this call raises the reason
                assert device.worker is not None
                item = device.worker.actor.__ray_ready__.remote()
            event = event_from_json(self._ray.get(item, timeout=_ANSWER_SECONDS))
        except (self._ray.exceptions.RayError, ImportError) as error:
            _clear(device)
            failure = worker_failure(error)
            return WorkerLost(text=failure.text, cannot_import=failure.cannot_import)
        if isinstance(event, WorkerUp):
            device.up = event
            device.gpus = device.gpus or event.gpus
            self._read_nodes()
        return event

    def _read_nodes(self) -> None:
        """Read the node and address of each device from Ray, which decides on which of several equal nodes a device is."""
        from ray.util.placement_group import placement_group_table

        nodes = placement_group_table(self._placement)["bundles_to_node_id"]
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        for device in self.devices:
            node_id = nodes.get(device.index)
            if node_id:
                device.spec = replace(device.spec, node_id=node_id, address=address.get(node_id, device.spec.address))


def check_versions(devices: Sequence[JobDevice]) -> None:
    """Check that all workers that have started run the same versions of hecate, torch and Python.

    Raises:
        UserError: two workers differ.
    """
    started = [(device, device.up.versions) for device in devices if device.up is not None]
    for device, versions in started[1:]:
        first, expected = started[0]
        for name in expected:
            if versions[name] != expected[name]:
                raise UserError(
                    f"the nodes have different versions of {name}: {expected[name]} on {first.name}, {versions[name]} on {device.name}\n"
                    "  install the same version on all nodes"
                )


def _clear(device: JobDevice) -> None:
    device.worker, device.up = None, None


def _counted(devices: Sequence[JobDevice]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for device in devices:
        what = device.spec.kind + "".join(f" {key}={value}" for key, value in device.spec.selector)
        counts[what] = counts.get(what, 0) + 1
    return counts
