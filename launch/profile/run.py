"""The steps of `hecate profile`: measure on every rank, gather the results, fit a topology and write it."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hecate.launch.profile import probe
from hecate.launch.profile.fit import Flow, Measurements, fit_link, fit_overlap, topology_from
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.schedule import Rounds, alone_rounds, far_rounds, near_rounds
from hecate.parallel.cluster.topology import Topology, nodes_of_hosts
from hecate.parallel.cluster.topology_cards import card_name
from hecate.parallel.cluster.topology_file import save_topology
from hecate.ranks.devices import gather_texts
from hecate.ranks.ranks import Ranks

_TIMEOUT = timedelta(minutes=10)


def profile(ranks: Ranks, out: Path, sizes: ProbeSizes | None = None) -> Topology:
    """Measure the ranks' devices and the links between them; rank 0 writes the topology to `out`. Every rank must call it.

    Raises:
        UserError: `out` cannot be written.
    """
    sizes = sizes or probe.sizes_for(ranks.device)
    hosts = gather_texts(socket.gethostname(), ranks)
    kinds = gather_texts(probe.device_name(ranks.device), ranks)
    found = topology_from(measure(ranks, nodes_of_hosts(hosts), tuple(kinds), sizes))
    topology = replace(found, measured=True, card=tuple(map(card_name, kinds)) if ranks.device.type == "cuda" else ())
    if ranks.is_first:
        save_topology(topology, out, _comment(hosts, kinds, ranks.device))
    return topology


def measure(ranks: Ranks, node_of_rank: tuple[int, ...], kinds: tuple[str, ...], sizes: ProbeSizes) -> Measurements:
    """Measure the devices and links of a job. Every rank must call it.

    Args:
        node_of_rank: the node of each rank.
        kinds: the name of each rank's device.
    """
    ranks_of_node = [[r for r, n in enumerate(node_of_rank) if n == node] for node in range(max(node_of_rank) + 1)]
    own = (
        probe.free_memory(ranks.device, len(ranks_of_node[node_of_rank[ranks.rank]])),
        probe.measure_flops(ranks, sizes),
        probe.measure_memory_bandwidth(ranks, sizes),
    )
    memory, flops, memory_bandwidth = zip(*_gather_numbers(list(own), ranks), strict=True)

    near_group = ranks.groups.tokens
    if len(ranks_of_node) > 1:
        # An all-to-all of all ranks waits for other nodes even if they send nothing.
        groups = [dist.new_group(members, timeout=_TIMEOUT) for members in ranks_of_node]
        own_group = groups[node_of_rank[ranks.rank]]
        assert isinstance(own_group, dist.ProcessGroup), "this rank is on its own node"
        near_group = own_group
    near = find_flows(near_rounds(ranks_of_node), ranks, near_group, sizes)
    alone = find_flows(alone_rounds(ranks_of_node), ranks, ranks.groups.tokens, sizes)
    all_at_once = find_flows(far_rounds(ranks_of_node), ranks, ranks.groups.tokens, sizes)
    return Measurements(
        node_of_rank=node_of_rank,
        kind_of_rank=kinds,
        flops=flops,
        memory=memory,
        memory_bandwidth=memory_bandwidth,
        near=[flow for flows in near for flow in flows],
        alone=[flow for flows in alone for flow in flows],
        all_at_once=all_at_once,
        overlap_slowdown=fit_overlap(*probe.measure_overlap(ranks, sizes)) if ranks.world_size > 1 else 1.0,
    )


def find_flows(rounds: Rounds, ranks: Ranks, group: dist.ProcessGroup, sizes: ProbeSizes) -> list[list[Flow]]:
    """Return both directions of every pair in every round, with links fitted to the receivers' times. Every rank must call it."""
    if not rounds:
        return []
    own = probe.measure_rounds(rounds, ranks, group, sizes)
    seconds_of_rank = _gather_numbers([seconds for pair in own for seconds in pair], ranks)

    def flow(source: int, destination: int, round_: int) -> Flow:
        small, large = seconds_of_rank[destination][2 * round_ : 2 * round_ + 2]
        return Flow(source, destination, fit_link(sizes.small_bytes, small, sizes.large_bytes, large))

    return [[f for a, b in pairs for f in (flow(a, b, number), flow(b, a, number))] for number, pairs in enumerate(rounds)]


def _gather_numbers(values: list[float], ranks: Ranks) -> list[list[float]]:
    """Return every rank's values, [ranks][values]. Every rank must call it, with the same number of values."""
    own = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    gathered = [torch.empty_like(own) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, own, group=ranks.groups.tokens)
    return [numbers.tolist() for numbers in gathered]


def _comment(hosts: list[str], kinds: list[str], device: torch.device) -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    dtype = str(probe.pick_dtype("auto", device)).removeprefix("torch.")
    lines = [f"Measured by `hecate profile` on {when}: torch {torch.__version__}, {dist.get_backend()}, {dtype}."]
    lines += [f"{host}: {count} x {kind}" for (host, kind), count in Counter(zip(hosts, kinds, strict=True)).items()]
    return "\n".join(lines)
