"""The topology of a job from the names of its machines and cards, for jobs that nothing has measured (`topology: auto`). No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hecate.parallel.cluster.topology import CPU_DEVICE, UNKNOWN_GPU, Link, Topology, nodes_of_hosts

SUSTAINED_FLOPS, _SUSTAINED_LINK, _SUSTAINED_MEMORY = 0.6, 2 / 3, 0.9
"""what training gets of an advertised rate; configs/topologies/mixed.yaml has the same shares"""
_SHARED_UPLINK = 12.5e9
"""bytes/s (100 Gbit/s) of a node whose cards are sold without a network adapter for each"""
_INSIDE_LATENCY, _BETWEEN_LATENCY = 1e-5, 2e-5


@dataclass(frozen=True)
class Card:
    """The advertised figures of a GPU. Its maker's data sheet has them, unless a comment in `CARDS` says otherwise."""

    bf16_flops: float
    """FLOP/s of dense bf16 matmuls that accumulate in float32; data sheets print twice as much, with sparsity"""
    memory: float
    """the bytes of its memory"""
    memory_bandwidth: float
    """the bytes/s of its memory"""
    link: float
    """the bytes/s to other cards of its node, in one direction: half of NVLink's figure, or PCIe's x16"""
    nic: float | None = None
    """the bytes/s of its own network adapter in its maker's servers; None: the cards of a node share one"""


_PCIE_4, _PCIE_5 = 32e9, 64e9
_HDR, _NDR = 25e9, 50e9
"""InfiniBand of 200 and 400 Gbit/s, of which a DGX A100, and a DGX H100, H200 or B200, has one adapter for each GPU (their data sheets)"""

CARDS = {
    # data sheet "NVIDIA A100 Tensor Core GPU" (2022) for the 80 GB cards and (2020) for those of 40 GB: 312 TFLOP/s, NVLink 600 GB/s
    "A100-SXM4-40GB": Card(312e12, 40e9, 1555e9, 300e9, _HDR),
    "A100-SXM4-80GB": Card(312e12, 80e9, 2039e9, 300e9, _HDR),
    "A100-PCIE-40GB": Card(312e12, 40e9, 1555e9, _PCIE_4),
    "A100 80GB PCIe": Card(312e12, 80e9, 1935e9, _PCIE_4),
    # data sheet "NVIDIA H100 Tensor Core GPU": 1979 (SXM), 1671 (NVL) and 1513 (PCIe) TFLOP/s with sparsity; NVLink 900 GB/s
    "H100 80GB HBM3": Card(989e12, 80e9, 3350e9, 450e9, _NDR),
    "H100 NVL": Card(835e12, 94e9, 3900e9, _PCIE_5),
    "H100 PCIe": Card(756e12, 80e9, 2000e9, _PCIE_5),
    # data sheet "NVIDIA H200 Tensor Core GPU": 1979 (SXM) and 1671 (NVL) TFLOP/s with sparsity; NVLink 900 GB/s
    "H200": Card(989e12, 141e9, 4800e9, 450e9, _NDR),
    "H200 NVL": Card(835e12, 141e9, 4800e9, _PCIE_5),
    # data sheet "NVIDIA DGX B200", an eighth: 72 PFLOP/s in fp8 with sparsity, 1440 GB, 64 TB/s, NVLink 14.4 TB/s
    "B200": Card(2250e12, 180e9, 8000e9, 900e9, _NDR),
    # data sheets "NVIDIA L4", "NVIDIA L40", "NVIDIA L40S": 242, 362.1 and 733 TFLOP/s with sparsity; PCIe 4
    "L4": Card(121e12, 24e9, 300e9, _PCIE_4),
    "L40": Card(181e12, 48e9, 864e9, _PCIE_4),
    "L40S": Card(362e12, 48e9, 864e9, _PCIE_4),
    # data sheets "NVIDIA A10", "NVIDIA A30", "NVIDIA A40": 125, 165 and 149.7 TFLOP/s; PCIe 4
    "A10": Card(125e12, 24e9, 600e9, _PCIE_4),
    "A30": Card(165e12, 24e9, 933e9, _PCIE_4),
    "A40": Card(149.7e12, 48e9, 696e9, _PCIE_4),
    # The A10G has no data sheet of NVIDIA's own: 70 TFLOP/s is what Amazon says of it ("Amazon EC2 G5 instances").
    "A10G": Card(70e12, 24e9, 600e9, _PCIE_4),
    # "NVIDIA Ampere GA102 GPU Architecture", appendix: 71 (GeForce) and 154.8 TFLOP/s with accumulation in float32; PCIe 4
    "GeForce RTX 3090": Card(71e12, 24e9, 936e9, _PCIE_4),
    "RTX A6000": Card(154.8e12, 48e9, 768e9, _PCIE_4),
    # "NVIDIA Ada GPU Architecture" and "NVIDIA Ada Lovelace Professional GPU Architecture", appendices: 165.2 and 364.2 TFLOP/s; PCIe 4
    "GeForce RTX 4090": Card(165.2e12, 24e9, 1008e9, _PCIE_4),
    "RTX 6000 Ada Generation": Card(364.2e12, 48e9, 960e9, _PCIE_4),
    # "NVIDIA RTX Blackwell GPU Architecture", appendix: 209.5 TFLOP/s with accumulation in float32; PCIe 5
    "GeForce RTX 5090": Card(209.5e12, 32e9, 1792e9, _PCIE_5),
}
"""the cards that `topology: auto` knows, by the name that the driver gives them, without "NVIDIA" """


@dataclass(frozen=True)
class RankDevice:
    """What one rank says about its device."""

    node: str
    """a name that the ranks of one machine share, and no others"""
    card: str | None = None
    """the GPU's name, as the driver gives it; None: the rank computes on the CPU"""
    memory: float | None = None
    """the GPU's bytes; None: not read, so the card's advertised ones"""


@dataclass(frozen=True)
class SeenTopology:
    """A topology, and what a user should know about how it came to be."""

    topology: Topology
    notes: tuple[str, ...] = ()
    """lines without a full stop; none for a topology that a file gives, or of one CPU machine"""


def topology_of_devices(devices: Sequence[RankDevice]) -> SeenTopology:
    """Return the topology of a job whose rank r uses `devices[r]`, either all of them GPUs or none.

    Cards of `CARDS` get their advertised figures times what training reaches of such figures. Other GPUs get the figures of `UNKNOWN_GPU`,
    and a note says so. Memory is what the device says, undiminished.
    """
    node_of_rank = nodes_of_hosts([device.node for device in devices])
    if all(device.card is None for device in devices):
        flops, memory, link = CPU_DEVICE["flops"], CPU_DEVICE["memory"], CPU_DEVICE["intra_node"]
        cpus = Topology(node_of_rank, (flops,) * len(devices), (memory,) * len(devices), intra_node=link, inter_node=link)
        return SeenTopology(cpus, _between_nodes(cpus))
    names = [device.card or "" for device in devices]
    cards = [_sustained(name) for name in names]
    nodes = range(max(node_of_rank) + 1)
    own_nics = [[card.nic for card, n in zip(cards, node_of_rank, strict=True) if n == node and card.nic] for node in nodes]
    uplinks = tuple(sum(nics) or _SHARED_UPLINK for nics in own_nics)
    nics = tuple(card.nic or uplinks[node] for card, node in zip(cards, node_of_rank, strict=True))
    intra = Link(min(card.link for card in cards), _INSIDE_LATENCY)
    topology = Topology(
        node_of_rank=node_of_rank,
        flops=tuple(card.bf16_flops for card in cards),
        memory=tuple(device.memory or card.memory for device, card in zip(devices, cards, strict=True)),
        intra_node=intra,
        inter_node=Link(min(nics), _BETWEEN_LATENCY) if len(nodes) > 1 else intra,
        port_bandwidth=tuple(card.link for card in cards),
        uplink_bandwidth=uplinks,
        nic_bandwidth=nics,
        memory_bandwidth=tuple(card.memory_bandwidth for card in cards),
        card=tuple(card_name(name) for name in names),
    )
    seen = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    guessed = {name for name, device in zip(names, devices, strict=True) if device.memory is None}
    unknown = [_unknown(name, name in guessed) for name in dict.fromkeys(names) if card_name(name) not in CARDS]
    return SeenTopology(topology, (f"topology: {seen} on {_nodes(topology)}", *unknown, *_between_nodes(topology)))


def _sustained(name: str) -> Card:
    """Return what training gets of a card's figures, or what it is taken for if it is unknown."""
    card = CARDS.get(card_name(name))
    if card is None:
        flops, memory, link = UNKNOWN_GPU["flops"], UNKNOWN_GPU["memory"], UNKNOWN_GPU["intra_node"].bandwidth
        return Card(flops, memory, flops / 150, link)
    return Card(
        SUSTAINED_FLOPS * card.bf16_flops,
        card.memory,
        _SUSTAINED_MEMORY * card.memory_bandwidth,
        _SUSTAINED_LINK * card.link,
        card.nic,
    )


def card_name(name: str) -> str:
    """Return the name of a GPU as `CARDS` has it."""
    return name.removeprefix("NVIDIA ").strip()


def _unknown(name: str, memory_is_guessed: bool) -> str:
    card = _sustained(name)
    memory = f" with {card.memory / 1e9:.0f} GB of memory" if memory_is_guessed else ""
    return (
        f"topology: auto does not know the card {name!r}; plans take it for one of {card.bf16_flops / 1e12:.0f} TFLOP/s and "
        f"{card.link / 1e9:.0f} GB/s to its neighbours{memory}; `hecate profile` measures it"
    )


def _between_nodes(topology: Topology) -> tuple[str, ...]:
    if topology.num_nodes == 1:
        return ()
    rates = sorted({f"{rate / 1e9:.3g}" for rate in topology.uplink_bandwidth}, key=float)
    return (
        f"topology: the links between the {_nodes(topology)} are not measured; plans take them for {' and '.join(rates)} GB/s a node; "
        "`hecate profile` measures them",
    )


def _nodes(topology: Topology) -> str:
    return "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
