"""The machines a job runs on, as a value: devices, their speed and memory, the links between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hecate.errors import UserError


@dataclass(frozen=True)
class Link:
    """One direction of a link between two devices."""

    bandwidth: float
    """bytes per second"""
    latency: float
    """seconds"""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and np.isfinite(self.bandwidth)):
            raise UserError(f"link bandwidth must be a positive number of bytes/s, got {self.bandwidth}")
        if not (self.latency >= 0 and np.isfinite(self.latency)):
            raise UserError(f"link latency must be a non-negative number of seconds, got {self.latency}")


@dataclass(frozen=True)
class Topology:
    """Ranks, grouped into nodes. Rank r is device r; ranks of one node need not be adjacent.

    Devices, nodes and links may all differ. Traffic is limited where it enters and leaves: at a rank's port inside its node, at a
    rank's NIC and its node's uplink between nodes; each direction on its own.
    """

    node_of_rank: tuple[int, ...]
    """node index of each rank, nodes numbered 0..N-1"""
    flops: tuple[float, ...]
    """sustained FLOP/s of each rank's device in the training dtype"""
    memory: tuple[float, ...]
    """bytes each rank's device may use"""
    intra_node: Link
    inter_node: Link
    port_bandwidth: tuple[float, ...] = ()
    """bytes/s of each rank inside its node; empty: `intra_node`'s"""
    uplink_bandwidth: tuple[float, ...] = ()
    """bytes/s of each node to the others, shared by its ranks; empty: `inter_node`'s"""
    nic_bandwidth: tuple[float, ...] = ()
    """bytes/s of each rank to other nodes; empty: its node's uplink's"""
    memory_bandwidth: tuple[float, ...] = ()
    """bytes/s of each device's memory; empty: one byte for 150 FLOPs, as on the GPUs of the last ten years"""
    overlap_slowdown: float = 1.0
    """factor by which computing and communicating slow each other down while both run; 2: nothing is gained by overlapping"""

    def __post_init__(self) -> None:
        world = len(self.node_of_rank)
        if world == 0:
            raise UserError("a topology needs at least one device")
        if len(self.flops) != world or len(self.memory) != world:
            raise UserError(f"topology: {world} ranks, but {len(self.flops)} rates and {len(self.memory)} memories")
        if set(self.node_of_rank) != set(range(max(self.node_of_rank) + 1)):
            raise UserError(f"topology: nodes must be numbered 0..N-1 without gaps, got {sorted(set(self.node_of_rank))}")
        node = np.asarray(self.node_of_rank)
        defaults: dict[str, tuple[float, ...]] = {
            "port_bandwidth": (self.intra_node.bandwidth,) * world,
            "uplink_bandwidth": (self.inter_node.bandwidth,) * self.num_nodes,
            "memory_bandwidth": tuple(rate / 150 for rate in self.flops),
        }
        for name, values in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or values)
        if not self.nic_bandwidth:
            object.__setattr__(self, "nic_bandwidth", tuple(self.uplink_bandwidth[n] for n in node))
        for name in ("flops", "memory", *defaults, "nic_bandwidth"):
            values = getattr(self, name)
            if len(values) != (self.num_nodes if name == "uplink_bandwidth" else world):
                raise UserError(f"topology: {world} ranks on {self.num_nodes} nodes, but {len(values)} values of {name}")
            if not all(np.isfinite(v) and v > 0 for v in values):
                raise UserError(f"topology: every {name} must be positive and finite, got {values}")
        if not 1 <= self.overlap_slowdown <= 2:
            raise UserError(f"topology: overlap_slowdown must be from 1 to 2, got {self.overlap_slowdown}")

    @property
    def world_size(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1

    @property
    def slowest_link(self) -> Link:
        """The link that bounds a collective over all ranks."""
        if self.num_nodes == 1:
            return Link(min(self.port_bandwidth), self.intra_node.latency)
        return Link(min(*self.uplink_bandwidth, *self.nic_bandwidth), self.inter_node.latency)

    def ranks_of_node(self, node: int) -> list[int]:
        return [rank for rank, n in enumerate(self.node_of_rank) if n == node]

    def same_node(self) -> np.ndarray:
        """bool [ranks, ranks]: do two ranks share a node?"""
        node = np.asarray(self.node_of_rank)
        return node[:, None] == node[None, :]


def uniform_topology(
    nodes: int,
    devices_per_node: int,
    *,
    flops: float,
    memory: float,
    intra_node: Link,
    inter_node: Link | None = None,
) -> Topology:
    """`nodes` x `devices_per_node` equal devices; ranks fill node 0 first."""
    world = nodes * devices_per_node
    return Topology(
        node_of_rank=tuple(rank // devices_per_node for rank in range(world)),
        flops=(flops,) * world,
        memory=(memory,) * world,
        intra_node=intra_node,
        inter_node=inter_node or intra_node,
    )


def local_topology(world_size: int, *, cuda: bool) -> Topology:
    """This machine, one node, with round figures: enough to plan with when nobody has measured."""
    if cuda:
        return uniform_topology(1, world_size, flops=4e14, memory=80e9, intra_node=Link(2e11, 1e-5))
    return uniform_topology(1, world_size, flops=5e10, memory=8e9, intra_node=Link(1e9, 2e-4))


def load_topology(path: Path) -> Topology:
    """Read a topology from YAML.

    Keys: `nodes`: a list of `{devices: int, flops: FLOP/s, memory: bytes}` (rates and memories may be lists, one entry a
    device), `intra_node` and `inter_node`: `{bandwidth: bytes/s, latency: s}`. See configs/topologies/.

    Raises:
        UserError: the file cannot be read, or a key is missing, unknown or out of range.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a topology: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a topology is a mapping with the keys nodes, intra_node and inter_node")
    unknown = sorted(str(key) for key in raw if key not in ("nodes", "intra_node", "inter_node"))
    if unknown or not isinstance(raw.get("nodes"), list) or not raw["nodes"] or "intra_node" not in raw:
        raise UserError(f"{path}: needs `nodes` (a list) and `intra_node`, may have `inter_node`; unknown: {', '.join(unknown) or 'none'}")
    node_of_rank: list[int] = []
    flops: list[float] = []
    memory: list[float] = []
    for number, node in enumerate(raw["nodes"]):
        where = f"{path}: nodes[{number}]"
        if not isinstance(node, dict) or set(node) != {"devices", "flops", "memory"}:
            raise UserError(f"{where}: a node has exactly the keys devices, flops and memory")
        if type(node["devices"]) is not int or node["devices"] < 1:
            raise UserError(f"{where}: devices must be an integer >= 1, got {node['devices']!r}")
        node_of_rank += [number] * node["devices"]
        flops += _per_device(node["flops"], node["devices"], f"{where}.flops")
        memory += _per_device(node["memory"], node["devices"], f"{where}.memory")
    intra = _link(raw["intra_node"], f"{path}: intra_node")
    inter = _link(raw["inter_node"], f"{path}: inter_node") if "inter_node" in raw else intra
    if len(raw["nodes"]) > 1 and "inter_node" not in raw:
        raise UserError(f"{path}: {len(raw['nodes'])} nodes need `inter_node`: {{bandwidth, latency}}")
    return Topology(tuple(node_of_rank), tuple(flops), tuple(memory), intra, inter)


def _number(value: Any, where: str, *, positive: bool = True) -> float:
    # PyYAML reads 1e9 (no dot, no sign) as a string, which users rightly expect to be a number.
    try:
        number = float("no number" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: must be a number, got {value!r}") from None
    if not (np.isfinite(number) and (number > 0 if positive else number >= 0)):
        raise UserError(f"{where}: must be finite and {'positive' if positive else 'not negative'}, got {value!r}")
    return number


def _per_device(value: Any, devices: int, where: str) -> list[float]:
    values = value if isinstance(value, list) else [value] * devices
    if len(values) != devices:
        raise UserError(f"{where}: {devices} devices, but {len(values)} values")
    return [_number(v, where) for v in values]


def _link(value: Any, where: str) -> Link:
    if not isinstance(value, dict) or set(value) != {"bandwidth", "latency"}:
        raise UserError(f"{where}: a link has exactly the keys bandwidth (bytes/s) and latency (seconds)")
    return Link(_number(value["bandwidth"], f"{where}.bandwidth"), _number(value["latency"], f"{where}.latency", positive=False))
