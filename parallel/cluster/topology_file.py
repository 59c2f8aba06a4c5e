"""Read and write topologies as YAML files. docs/use/topology.md gives their keys and units; configs/topologies/ has presets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hecate.errors import UserError
from hecate.io.durable import replace_output
from hecate.io.plain_files import read_plain_text
from hecate.io.strict_yaml import MOST_BYTES, YamlError, parse_yaml
from hecate.parallel.cluster.topology import Link, Topology

_NEEDED = ("devices", "flops", "memory")
_OPTIONAL = ("ranks", "port", "uplink", "nic", "memory_bandwidth", "price_per_hour", "card")
_TOP = ("nodes", "intra_node", "inter_node", "overlap_slowdown", "planning_slowdown", "measured")
_FIELD_OF_KEY = {"port": "port_bandwidth", "uplink": "uplink_bandwidth", "nic": "nic_bandwidth", "memory_bandwidth": "memory_bandwidth"}
_PRICE = "price_per_hour"
_LONGEST, _MOST_DEVICES = 200, 1 << 16


def load_topology(path: Path) -> Topology:
    """Read a topology from YAML.

    Raises:
        UserError: the file cannot be read, or a key is missing, unknown or out of range.
    """
    try:
        text = read_plain_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a topology: {error}") from error
    return parse_topology(text, str(path))


def parse_topology(text: str, path: str) -> Topology:
    """Return the topology in a YAML text. Error texts name `path` as its file.

    Raises:
        UserError: a key is missing, unknown or out of range.
    """
    raw, nodes = _checked(text, path)
    intra = _link(raw["intra_node"], f"{path}: intra_node")
    inter = _link(raw["inter_node"], f"{path}: inter_node") if "inter_node" in raw else intra
    if len(nodes) > 1 and "inter_node" not in raw:
        raise UserError(f"{path}: {len(nodes)} nodes need `inter_node`: {{bandwidth, latency}}")

    world = sum(node["devices"] for node in nodes)
    if world > _MOST_DEVICES:
        raise UserError(f"{path}: has {world} devices, more than {_MOST_DEVICES}")
    ranks_of_node = _ranks_of_nodes(nodes, path)

    def by_rank(key: str, default: Sequence[float] = ()) -> tuple[float, ...]:
        """Return the values of a node's key by rank, [ranks], with `default` for nodes that lack it."""
        values = list(default) or [0.0] * world
        for number, (node, ranks) in enumerate(zip(nodes, ranks_of_node, strict=True)):
            if key in node:
                for rank, value in zip(ranks, _per_device(node[key], len(ranks), f"{path}: nodes[{number}].{key}"), strict=True):
                    values[rank] = value
        return tuple(values)

    node_of_rank = [0] * world
    for number, ranks in enumerate(ranks_of_node):
        for rank in ranks:
            node_of_rank[rank] = number
    plain = Topology(tuple(node_of_rank), by_rank("flops"), by_rank("memory"), intra, inter)
    uplinks = tuple(
        _number(node["uplink"], f"{path}: nodes[{n}].uplink") if "uplink" in node else inter.bandwidth for n, node in enumerate(nodes)
    )
    priced, named = (_all_or_none(nodes, key, path) for key in (_PRICE, "card"))
    cards: dict[int, str] = {}
    for number, (node, ranks) in enumerate(zip(nodes, ranks_of_node, strict=True)):
        if named:
            cards |= zip(ranks, _cards(node["card"], len(ranks), f"{path}: nodes[{number}].card"), strict=True)
    if type(measured := raw.get("measured", False)) is not bool:
        raise UserError(f"{path}: measured must be true or false, got {repr(measured)[:60]}")
    slowdown = _number(raw.get("overlap_slowdown", 1.0), f"{path}: overlap_slowdown")
    if not 1 <= slowdown <= 2:
        raise UserError(f"{path}: overlap_slowdown must be from 1 (overlapping is free) to 2 (it gains nothing), got {slowdown}")
    planning = _number(raw.get("planning_slowdown", 1.0), f"{path}: planning_slowdown")
    return replace(
        plain,
        port_bandwidth=by_rank("port", plain.port_bandwidth),
        uplink_bandwidth=uplinks,
        nic_bandwidth=by_rank("nic", tuple(uplinks[node] for node in node_of_rank)),
        memory_bandwidth=by_rank("memory_bandwidth", plain.memory_bandwidth),
        overlap_slowdown=slowdown,
        planning_slowdown=planning,
        price_per_hour=by_rank(_PRICE) if priced else (),
        card=tuple(cards[rank] for rank in range(world)) if named else (),
        measured=measured,
    )


def _checked(text: str, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A topology's mapping and its nodes, whose keys are known. Raises UserError otherwise."""
    try:
        raw = parse_yaml(text)
    except YamlError as error:
        raise UserError(f"{path}: cannot be read as a topology: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a topology is a mapping with the keys nodes, intra_node and inter_node")
    unknown = sorted(str(key) for key in raw if key not in _TOP)
    nodes = raw.get("nodes")
    if unknown or not isinstance(nodes, list) or not nodes or "intra_node" not in raw:
        raise UserError(
            f"{path}: needs `nodes` (a list) and `intra_node`, may have {', '.join(_TOP[2:])}; "
            f"unknown: {', '.join(unknown)[:_LONGEST] or 'none'}"
        )
    for number, node in enumerate(nodes):
        _check_node(node, f"{path}: nodes[{number}]")
    return raw, nodes


def _all_or_none(nodes: list[dict[str, Any]], key: str, path: str) -> bool:
    """Whether nodes have a key. Raises UserError: some have, and some have not."""
    having = [number for number, node in enumerate(nodes) if key in node]
    if having and len(having) < len(nodes):
        lacking = next(number for number in range(len(nodes)) if number not in having)
        raise UserError(f"{path}: nodes[{lacking}] has no {key}, but nodes[{having[0]}] has; give it for all nodes, or for none")
    return bool(having)


def _cards(value: Any, devices: int, where: str) -> list[str]:
    names = value if isinstance(value, list) else [value] * devices
    if len(names) != devices or not all(isinstance(name, str) and 1 <= len(name) <= _LONGEST for name in names):
        raise UserError(f"{where}: must be the name of the devices, such as H100 80GB HBM3, or a list of {devices}, got {repr(value)[:60]}")
    return names


def save_topology(topology: Topology, path: Path, comment: str = "") -> None:
    """Write `topology`, with `comment` above it, so that `load_topology` reads back an equal one. An existing file is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    check_writable(path)
    try:
        replace_output(path, [topology_text(topology, comment).encode()])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def check_writable(path: Path) -> None:
    """Create the folder of `path` and check that a file can be written in it, before a long computation whose result goes there.

    Raises:
        UserError: the folder cannot be created, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: its folder cannot be created: {error}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written: {'it is a folder' if path.is_dir() else 'permission denied'}")


def topology_text(topology: Topology, comment: str = "") -> str:
    """Return `topology` as YAML. Keys with their default value are left out. Numbers are exact."""
    plain = Topology(topology.node_of_rank, topology.flops, topology.memory, topology.intra_node, topology.inter_node)
    plain_nic = tuple(topology.uplink_bandwidth[node] for node in topology.node_of_rank)
    default = {field: getattr(plain, field) for field in _FIELD_OF_KEY.values()} | {"nic_bandwidth": plain_nic}
    keys = [key for key, field in _FIELD_OF_KEY.items() if getattr(topology, field) != default[field]]
    ordered = list(topology.node_of_rank) == sorted(topology.node_of_rank)

    lines = [f"# {line}".rstrip() for line in comment.splitlines()] + ["nodes:"]
    for node in range(topology.num_nodes):
        ranks = topology.ranks_of_node(node)
        entries = {"devices": str(len(ranks))}
        if not ordered:
            entries["ranks"] = str(ranks)
        for key in ("flops", "memory", *keys):
            values = getattr(topology, _FIELD_OF_KEY.get(key, key))
            entries[key] = _text(values[node]) if key == "uplink" else _texts([values[rank] for rank in ranks])
        if topology.price_per_hour:
            entries[_PRICE] = _texts([topology.price_per_hour[rank] for rank in ranks])
        if topology.card:
            names = [topology.card[rank] for rank in ranks]
            entries["card"] = json.dumps(names if len(set(names)) > 1 else names[0])
        lines.append("  - " + _mapping(entries))
    lines.append(f"intra_node: {_link_text(topology.intra_node)}")
    if topology.num_nodes > 1 or topology.inter_node != topology.intra_node:
        lines.append(f"inter_node: {_link_text(topology.inter_node)}")
    if topology.overlap_slowdown != 1:
        lines.append(f"overlap_slowdown: {float(topology.overlap_slowdown)!r}")
    if topology.planning_slowdown != 1:
        lines.append(f"planning_slowdown: {float(topology.planning_slowdown)!r}")
    if topology.measured:
        lines.append("measured: true")
    return "\n".join(lines) + "\n"


def _check_node(node: Any, where: str) -> None:
    keys = set(node) if isinstance(node, dict) else set()
    wrong = sorted(str(key) for key in keys - {*_NEEDED, *_OPTIONAL})
    if wrong or not keys.issuperset(_NEEDED):
        unknown = ", ".join(wrong)[:_LONGEST] or "none"
        raise UserError(f"{where}: a node has the keys {', '.join(_NEEDED)} and may have {', '.join(_OPTIONAL)}; unknown: {unknown}")
    if type(node["devices"]) is not int or not 1 <= node["devices"] <= _MOST_DEVICES:
        raise UserError(f"{where}: devices must be an integer from 1 to {_MOST_DEVICES}, got {repr(node['devices'])[:60]}")


def _ranks_of_nodes(nodes: Sequence[Mapping[str, Any]], path: str) -> list[list[int]]:
    """Return the ranks of each node. Unless the file lists them, ranks are numbered in the order of the nodes."""
    given = [node["ranks"] for node in nodes if "ranks" in node]
    world = sum(node["devices"] for node in nodes)
    if not given:
        ends = np.cumsum([node["devices"] for node in nodes]).tolist()
        return [list(range(end - node["devices"], end)) for node, end in zip(nodes, ends, strict=True)]
    lists_fit = len(given) == len(nodes) and all(
        isinstance(ranks, list) and len(ranks) == node["devices"] and all(type(rank) is int for rank in ranks)
        for node, ranks in zip(nodes, given, strict=True)
    )
    if not lists_fit or sorted(rank for ranks in given for rank in ranks) != list(range(world)):
        raise UserError(
            f"{path}: `ranks` must list one rank per device in every node, and each of 0..{world - 1} once; or leave it out of all nodes"
        )
    return given


def _number(value: Any, where: str, *, positive: bool = True) -> float:
    # PyYAML reads 1e9 (without a dot or a sign) as a string, but users expect a number.
    try:
        number = float("no number" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: must be a number, got {repr(value)[:60]}") from None
    if not (np.isfinite(number) and (number > 0 if positive else number >= 0)):
        raise UserError(f"{where}: must be finite and {'positive' if positive else 'not negative'}, got {repr(value)[:60]}")
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


def _mapping(entries: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in entries.items()) + "}"


def _link_text(link: Link) -> str:
    return _mapping({"bandwidth": _text(link.bandwidth), "latency": _text(link.latency)})


def _texts(values: Sequence[float]) -> str:
    """Return one number if all devices of a node have the same, and a list otherwise."""
    return _text(values[0]) if len(set(values)) == 1 else "[" + ", ".join(map(_text, values)) + "]"


def _text(value: float) -> str:
    """Return the shortest text that is read back as the same float, in the only scientific notation that YAML reads as a number."""
    return np.format_float_scientific(value, trim="0", exp_digits=1)
