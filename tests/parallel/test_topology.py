from __future__ import annotations

from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.parallel.topology import Link, Topology, load_topology, local_topology, uniform_topology

GOOD = """\
nodes:
  - {devices: 2, flops: 1e12, memory: 8.0e+9}
  - {devices: 3, flops: [1.0, 2, 3e3], memory: [4, 5, 6]}
intra_node: {bandwidth: 1e10, latency: 1e-5}
inter_node: {bandwidth: 2.5e+8, latency: 0}
"""
NODE = "{devices: 1, flops: 1, memory: 1}"
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


def test_topology_values_are_checked() -> None:
    link = Link(1.0, 0.0)
    with pytest.raises(UserError, match="at least one device"):
        Topology((), (), (), link, link)
    with pytest.raises(UserError, match="2 ranks, but 1 rates"):
        Topology((0, 0), (1.0,), (1.0, 1.0), link, link)
    with pytest.raises(UserError, match="without gaps"):
        Topology((0, 2), (1.0, 1.0), (1.0, 1.0), link, link)
    for bandwidth, latency in ((0.0, 0.0), (float("inf"), 0.0), (float("nan"), 0.0), (1.0, -1.0), (1.0, float("inf"))):
        with pytest.raises(UserError, match="link"):
            Link(bandwidth, latency)


def test_same_node_with_ranks_out_of_order() -> None:
    link = Link(1.0, 0.0)
    topology = Topology((0, 1, 0), (1.0,) * 3, (1.0,) * 3, link, link)
    assert topology.same_node().tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert topology.ranks_of_node(0) == [0, 2]


def test_uniform_topology_fills_node_0_first() -> None:
    topology = uniform_topology(2, 3, flops=5.0, memory=7.0, intra_node=Link(9.0, 0.0), inter_node=Link(2.0, 1.0))
    assert topology.node_of_rank == (0, 0, 0, 1, 1, 1)
    assert topology.flops == (5.0,) * 6
    assert topology.memory == (7.0,) * 6
    assert topology.slowest_link == Link(2.0, 1.0)
    assert uniform_topology(2, 1, flops=1.0, memory=1.0, intra_node=Link(9.0, 0.0)).inter_node == Link(9.0, 0.0)


@pytest.mark.parametrize("cuda", [False, True])
def test_local_topology_is_one_node(cuda: bool) -> None:
    topology = local_topology(3, cuda=cuda)
    assert topology.node_of_rank == (0, 0, 0)
