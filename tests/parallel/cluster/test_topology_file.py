"""Topology files: what is read, what is refused, and that written files are read back; and the presets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cluster.topology_file import load_topology, save_topology, topology_text

PRESETS = Path(__file__).resolve().parents[3] / "configs" / "topologies"

GOOD = """\
nodes:
  - {devices: 2, flops: 1e12, memory: 8.0e+9}
  - {devices: 3, flops: [1.0, 2, 3e3], memory: [4, 5, 6]}
intra_node: {bandwidth: 1e10, latency: 1e-5}
inter_node: {bandwidth: 2.5e+8, latency: 0}
"""
IN_NODE = "devices: 1, flops: 1, memory: 1"
NODE = f"{{{IN_NODE}}}"
LINK = "{bandwidth: 1, latency: 0}"


def write(folder: Path, text: str) -> Path:
    path = folder / "machines.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file(tmp_path: Path) -> None:
    topology = load_topology(write(tmp_path, GOOD))
    assert topology.node_of_rank == (0, 0, 1, 1, 1)
    assert topology.flops == (1e12, 1e12, 1.0, 2.0, 3000.0)
    assert topology.memory == (8e9, 8e9, 4.0, 5.0, 6.0)
    assert topology.intra_node == Link(1e10, 1e-5)
    assert topology.inter_node == Link(2.5e8, 0.0)
    assert (topology.world_size, topology.num_nodes) == (5, 2)
    assert topology.ranks_of_node(1) == [2, 3, 4]
    assert topology.slowest_link == topology.inter_node


def test_one_node_needs_no_inter_node_link(tmp_path: Path) -> None:
    topology = load_topology(write(tmp_path, f"nodes: [{NODE}]\nintra_node: {LINK}\n"))
    assert topology.slowest_link == topology.intra_node == Link(1.0, 0.0)


BAD = {
    "nodes missing": (f"intra_node: {LINK}", "nodes"),
    "nodes empty": (f"nodes: []\nintra_node: {LINK}", "nodes"),
    "nodes not a list": (f"nodes: 3\nintra_node: {LINK}", "nodes"),
    "intra_node missing": (f"nodes: [{NODE}]", "intra_node"),
    "inter_node missing": (f"nodes: [{NODE}, {NODE}]\nintra_node: {LINK}", "inter_node"),
    "unknown key": (f"nodes: [{NODE}]\nintra_node: {LINK}\nintre_node: {LINK}", "intre_node"),
    "node not a mapping": (f"nodes: [{NODE}, 4]\nintra_node: {LINK}\ninter_node: {LINK}", r"nodes\[1\]"),
    "node key missing": (f"nodes: [{{devices: 1, flops: 1}}]\nintra_node: {LINK}", r"nodes\[0\].*memory"),
    "node key unknown": (f"nodes: [{{devices: 1, flops: 1, memory: 1, gpu: 1}}]\nintra_node: {LINK}", r"nodes\[0\]"),
    "no devices": (f"nodes: [{{devices: 0, flops: 1, memory: 1}}]\nintra_node: {LINK}", r"nodes\[0\].*devices"),
    "devices no integer": (f"nodes: [{{devices: 1.5, flops: 1, memory: 1}}]\nintra_node: {LINK}", r"nodes\[0\].*devices"),
    "flops no number": (f"nodes: [{{devices: 1, flops: fast, memory: 1}}]\nintra_node: {LINK}", r"nodes\[0\]\.flops.*fast"),
    "too few rates": (f"nodes: [{{devices: 2, flops: [1], memory: 1}}]\nintra_node: {LINK}", r"nodes\[0\]\.flops"),
    "too many memories": (f"nodes: [{{devices: 2, flops: 1, memory: [1, 2, 3]}}]\nintra_node: {LINK}", r"nodes\[0\]\.memory"),
    "flops negative": (f"nodes: [{{devices: 1, flops: -1, memory: 1}}]\nintra_node: {LINK}", "flops"),
    "memory zero": (f"nodes: [{{devices: 1, flops: 1, memory: 0}}]\nintra_node: {LINK}", "memory"),
    "memory not a number": (f"nodes: [{{devices: 1, flops: 1, memory: .nan}}]\nintra_node: {LINK}", "memory"),
    "link not a mapping": (f"nodes: [{NODE}]\nintra_node: 5", "intra_node"),
    "link key missing": (f"nodes: [{NODE}]\nintra_node: {{bandwidth: 1}}", "intra_node.*latency"),
    "bandwidth zero": (f"nodes: [{NODE}]\nintra_node: {{bandwidth: 0, latency: 0}}", "intra_node.*bandwidth"),
    "latency negative": (f"nodes: [{NODE}]\nintra_node: {{bandwidth: 1, latency: -1}}", "intra_node.*latency"),
    "bandwidth no number": (f"nodes: [{NODE}]\nintra_node: {{bandwidth: [1], latency: 0}}", "intra_node"),
    "not a mapping": ("- 1\n- 2", "mapping"),
    "empty": ("", "mapping"),
    "unknown keys of two types": (f"nodes: [{NODE}]\nintra_node: {LINK}\n5: a\nfive: a", "five"),
    "devices a boolean": (f"nodes: [{{devices: true, flops: 1, memory: 1}}]\nintra_node: {LINK}", r"nodes\[0\].*devices"),
    "flops a boolean": (f"nodes: [{{devices: 1, flops: true, memory: 1}}]\nintra_node: {LINK}", r"nodes\[0\]\.flops"),
    "optional key on top": (f"nodes: [{NODE}]\nintra_node: {LINK}\nnic: 5", "nic"),
    "too few ports": (f"nodes: [{{devices: 2, flops: 1, memory: 1, port: [1]}}]\nintra_node: {LINK}", r"nodes\[0\]\.port"),
    "port no number": (f"nodes: [{{devices: 1, flops: 1, memory: 1, port: wide}}]\nintra_node: {LINK}", r"nodes\[0\]\.port.*wide"),
    "uplink a list": (f"nodes: [{{devices: 1, flops: 1, memory: 1, uplink: [1]}}]\nintra_node: {LINK}", r"nodes\[0\]\.uplink"),
    "nic zero": (
        f"nodes: [{NODE}, {{devices: 1, flops: 1, memory: 1, nic: 0}}]\nintra_node: {LINK}\ninter_node: {LINK}",
        r"nodes\[1\]\.nic",
    ),
    "memory bandwidth null": (f"nodes: [{{devices: 1, flops: 1, memory: 1, memory_bandwidth: }}]\nintra_node: {LINK}", "memory_bandwidth"),
    "slowdown below 1": (f"nodes: [{NODE}]\nintra_node: {LINK}\noverlap_slowdown: 0.9", "overlap_slowdown"),
    "slowdown above 2": (f"nodes: [{NODE}]\nintra_node: {LINK}\noverlap_slowdown: 2.1", "overlap_slowdown"),
    "ranks of one node only": (f"nodes: [{{ranks: [0], {IN_NODE}}}, {NODE}]\nintra_node: {LINK}\ninter_node: {LINK}", "ranks"),
    "a rank twice": (f"nodes: [{{ranks: [0], {IN_NODE}}}, {{ranks: [0], {IN_NODE}}}]\nintra_node: {LINK}\ninter_node: {LINK}", "ranks"),
    "a rank too few": (f"nodes: [{{ranks: [0], devices: 2, flops: 1, memory: 1}}]\nintra_node: {LINK}", "ranks"),
    "a rank no integer": (f"nodes: [{{ranks: [zero], {IN_NODE}}}]\nintra_node: {LINK}", "ranks"),
    "price zero": (f"nodes: [{{price_per_hour: 0, {IN_NODE}}}]\nintra_node: {LINK}", r"nodes\[0\]\.price_per_hour"),
    "price no number": (f"nodes: [{{price_per_hour: cheap, {IN_NODE}}}]\nintra_node: {LINK}", r"nodes\[0\]\.price_per_hour.*cheap"),
    "price of one node only": (
        f"nodes: [{NODE}, {{price_per_hour: 2, {IN_NODE}}}]\nintra_node: {LINK}\ninter_node: {LINK}",
        r"nodes\[0\] has no price_per_hour, but nodes\[1\] has",
    ),
    "no YAML": ("nodes: [", "cannot be read"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_file_is_refused_by_name_and_key(tmp_path: Path, case: str) -> None:
    text, named = BAD[case]
    with pytest.raises(UserError, match=rf"(?s)machines\.yaml.*{named}") as error:
        load_topology(write(tmp_path, text))
    assert len(str(error.value).splitlines()) <= 8


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_topology(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"nodes: \xff")
    with pytest.raises(UserError, match=r"latin\.yaml"):
        load_topology(tmp_path / "latin.yaml")


OPTIONAL = """\
nodes:
  - {devices: 2, flops: 300.0, memory: 1, port: [7, 8e0], uplink: 40, memory_bandwidth: 6, price_per_hour: [2, 3.5]}
  - {devices: 1, flops: 600.0, memory: 1, nic: 30, price_per_hour: 1}
  - {devices: 1, flops: 600.0, memory: 1, price_per_hour: 1}
intra_node: {bandwidth: 9, latency: 0}
inter_node: {bandwidth: 50, latency: 0}
overlap_slowdown: 1.25
"""


def test_optional_keys_and_what_stands_in_for_them(tmp_path: Path) -> None:
    topology = load_topology(write(tmp_path, OPTIONAL))
    assert topology.port_bandwidth == (7.0, 8.0, 9.0, 9.0)
    assert topology.uplink_bandwidth == (40.0, 50.0, 50.0)
    assert topology.nic_bandwidth == (40.0, 40.0, 30.0, 50.0)
    assert topology.memory_bandwidth == (6.0, 6.0, 4.0, 4.0)  # left out: a byte for 150 FLOPs
    assert topology.overlap_slowdown == 1.25
    assert topology.price_per_hour == (2.0, 3.5, 1.0, 1.0)
    assert topology.take([1, 3]).price_per_hour == (3.5, 1.0)


def test_ranks_of_a_node_need_not_be_adjacent(tmp_path: Path) -> None:
    nodes = "[{devices: 2, ranks: [2, 0], flops: [3, 1], memory: 5}, {devices: 1, ranks: [1], flops: 2, memory: 6, nic: 4}]"
    topology = load_topology(write(tmp_path, f"nodes: {nodes}\nintra_node: {LINK}\ninter_node: {LINK}\n"))
    assert topology.node_of_rank == (0, 1, 0)
    assert topology.flops == (1.0, 2.0, 3.0)
    assert topology.memory == (5.0, 6.0, 5.0)
    assert topology.nic_bandwidth == (1.0, 4.0, 1.0)


positive = st.floats(1e-3, 1e18)
links = st.builds(Link, positive, st.sampled_from([0.0, 1e-5, 1 / 3]))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """1-3 nodes, 1-6 ranks in any order, everything different or left out."""
    nodes = draw(st.integers(1, 3))
    node_of_rank = draw(st.permutations(list(range(nodes)) + draw(st.lists(st.integers(0, nodes - 1), max_size=3))))

    def some(size: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(positive, min_size=size, max_size=size)))

    world = len(node_of_rank)
    plain = Topology(tuple(node_of_rank), some(world), some(world), draw(links), draw(links))
    size_of = {
        "port_bandwidth": world,
        "uplink_bandwidth": nodes,
        "nic_bandwidth": world,
        "memory_bandwidth": world,
        "price_per_hour": world,
    }
    chosen = {name: some(size) for name, size in size_of.items() if draw(st.booleans())}
    return replace(plain, **chosen, overlap_slowdown=draw(st.floats(1, 2)))


@given(topology=topologies(), comment=st.sampled_from(["", "one line", "two\n\nlines: [of"]))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, topology: Topology, comment: str) -> None:
    path = tmp_path_factory.getbasetemp() / "new folder" / "round-trip.yaml"
    save_topology(topology, path, comment)
    assert load_topology(path) == topology


def test_what_is_written_is_short() -> None:
    topology = Topology((0, 0, 1), (5e10,) * 3, (8e9, 8e9, 4e9), Link(1e9, 2e-4), Link(1e8, 1e-3), uplink_bandwidth=(3e8, 1e8))
    assert (
        topology_text(topology, "Three ranks.")
        == """\
# Three ranks.
nodes:
  - {devices: 2, flops: 5.0e+10, memory: 8.0e+9, uplink: 3.0e+8}
  - {devices: 1, flops: 5.0e+10, memory: 4.0e+9, uplink: 1.0e+8}
intra_node: {bandwidth: 1.0e+9, latency: 2.0e-4}
inter_node: {bandwidth: 1.0e+8, latency: 1.0e-3}
"""
    )


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    topology = load_topology(write(tmp_path, GOOD))
    with pytest.raises(UserError, match=r"taken.*folder"):
        save_topology(topology, tmp_path / "taken")
    with pytest.raises(UserError, match=r"inside.*folder cannot be created"):
        save_topology(topology, tmp_path / "machines.yaml" / "inside")


SHAPES = {
    "paper-cluster-a": (32, 4),
    "paper-cluster-a-16": (16, 2),
    "paper-cluster-b": (32, 4),
    "one-h100": (1, 1),
    "h100-node": (8, 1),
    "h200-node": (8, 1),
    "two-h100-nodes": (16, 2),
    "four-h100-nodes": (32, 4),
    "mixed": (20, 3),
    "two-cpu-ranks": (2, 1),
    "four-cpu-ranks": (4, 1),
}


def test_every_preset_has_a_shape_here() -> None:
    assert sorted(SHAPES) == sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_preset_loads(name: str) -> None:
    topology = load_topology(PRESETS / f"{name}.yaml")
    assert (topology.world_size, topology.num_nodes) == SHAPES[name]
    assert max(topology.nic_bandwidth) <= max(topology.uplink_bandwidth)


def test_the_papers_clusters() -> None:
    """Per direction: half of the NVLink figures of the paper; a node's network as it is."""
    a, b = (load_topology(PRESETS / f"paper-cluster-{name}.yaml") for name in "ab")
    assert (a.port_bandwidth[0], a.uplink_bandwidth[0]) == (150e9, 100e9 / 8)
    assert (b.port_bandwidth[0], b.uplink_bandwidth[0]) == (300e9, 400e9 / 8)
    assert (a.memory[0], b.memory[0]) == (32e9, 40e9)


def test_the_mixed_cluster_is_mixed() -> None:
    mixed = load_topology(PRESETS / "mixed.yaml")
    assert [len(mixed.ranks_of_node(node)) for node in range(3)] == [8, 8, 4]
    assert len({*mixed.uplink_bandwidth}) == 3
    assert sorted(set(mixed.flops), reverse=True) == [mixed.flops[0], mixed.flops[8], mixed.flops[16]]
