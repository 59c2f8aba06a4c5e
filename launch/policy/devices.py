"""The devices of a Ray cluster that a job can use, as values, read from what `ray.nodes()` returns. This module does not import Ray."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hecate.errors import UserError

ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ONE_OF = re.compile(r"in\((.*)\)")


@dataclass(frozen=True)
class Device:
    """One GPU, or the processors of one rank on a machine without GPUs."""

    node_id: str
    address: str
    """the address of the node"""
    kind: str
    """the accelerator type, or CPU"""
    resources: tuple[tuple[str, float], ...]
    """the resources that the job requests from Ray for this device"""
    selector: tuple[tuple[str, str], ...]
    """the labels of its node; a device that replaces it must be on a node with the same labels"""


def parse_labels(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read labels of the form KEY=VALUE or KEY=in(A,B), as key -> allowed values.

    Raises:
        UserError: a label has another form.
    """
    wanted: dict[str, tuple[str, ...]] = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not (key and equals and value):
            raise UserError(f"ray.labels: must be KEY=VALUE or KEY=in(A,B), got {label!r}")
        one_of = _ONE_OF.fullmatch(value)
        wanted[key] = tuple(part.strip() for part in one_of[1].split(",")) if one_of else (value,)
    return wanted


def devices_of(nodes: Sequence[Mapping[str, Any]], labels: Mapping[str, tuple[str, ...]], cpus_per_worker: int) -> list[Device]:
    """The devices of all living nodes that have the labels, in the order of the ranks: equal nodes, and a node's devices, are neighbours.

    If one of these nodes has a GPU, only GPUs are devices.

    Args:
        nodes: what `ray.nodes()` returns.
    """
    fitting = [node for node in nodes if node["Alive"] and _has_labels(node, labels)]
    on_gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in fitting)
    devices = []
    for node in fitting:
        cpus = int(node["Resources"].get("CPU", 0))
        if on_gpus:
            number = int(node["Resources"].get("GPU", 0))
            resources: tuple[tuple[str, float], ...] = (("CPU", float(min(cpus_per_worker, cpus // max(number, 1)))), ("GPU", 1.0))
        else:
            number, resources = cpus // cpus_per_worker, (("CPU", float(cpus_per_worker)),)
        its_labels = node.get("Labels") or {}
        kind = its_labels.get(ACCELERATOR_LABEL, "GPU" if on_gpus else "CPU")
        selector = {key: its_labels[key] for key in (*labels, ACCELERATOR_LABEL) if key in its_labels}
        device = Device(node["NodeID"], node["NodeManagerAddress"], kind, resources, tuple(sorted(selector.items())))
        devices += [device] * number
    return sorted(devices, key=lambda device: (device.selector, device.node_id))


def choose_devices(devices: Sequence[Device], wanted: int | None, fewest: int) -> list[Device]:
    """Choose the first `wanted` devices, or all if it is None. If there are fewer, choose those that there are, but at least `fewest`.

    Raises:
        UserError: there are fewer than `fewest`.
    """
    if len(devices) < max(1, fewest):
        kinds = ", ".join(f"{sum(d.kind == kind for d in devices)} {kind}" for kind in sorted({d.kind for d in devices})) or "none"
        raise UserError(
            f"not enough devices: the job needs {max(1, fewest)}, the cluster has {len(devices)} that fit ({kinds})\n"
            "  add nodes, lower ray.min_workers or ray.cpus_per_worker, or require fewer labels (ray.labels)"
        )
    return list(devices[: wanted or len(devices)])


def one_machine(devices: Sequence[Device], nodes: Iterable[Mapping[str, Any]] = ()) -> bool:
    """Whether all devices are on one machine, which is that of all living nodes, the driver's among them: nothing needs to listen beyond
    loopback then."""
    return len({device.address for device in devices} | {node["NodeManagerAddress"] for node in nodes if node["Alive"]}) == 1


def _has_labels(node: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> bool:
    labels = node.get("Labels") or {}
    return all(labels.get(key) in values for key, values in wanted.items())
