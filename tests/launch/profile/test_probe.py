"""The parts of the probe that can be checked without timing, and which rank's times count for a flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from hecate.launch.profile import probe
from hecate.launch.profile.fit import Flow
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.run import find_flows
from hecate.ranks.ranks import Ranks
from testing.ranks import run_ranks
from tests.launch.profile.ranks import ranks_of

SIZES = ProbeSizes(matmul=8, copy_bytes=64, small_bytes=1000, large_bytes=3000, seconds=0.01)


def test_partners() -> None:
    pairs = [(0, 3), (4, 1)]
    assert [probe.partner_of(rank, pairs) for rank in range(5)] == [3, 4, None, 0, 1]


def test_memory_of_a_cpu_rank() -> None:
    meminfo = "MemTotal:       8192 kB\nMemFree:         512 kB\nMemAvailable:   4096 kB\n"
    assert probe.available_memory(meminfo, limit=None) == 4096 * 1024
    assert probe.available_memory(meminfo, limit="max\n") == 4096 * 1024
    assert probe.available_memory(meminfo, limit="1000000\n") == 1e6


def test_what_a_container_uses_is_not_free(tmp_path: Path) -> None:
    """Of 1,000,000 bytes 700,000 are in use, of which 200,000 are a cache of files that nobody uses."""
    (tmp_path / "meminfo").write_text("MemAvailable:   4096 kB\n")
    for name, text in (("max", "1000000\n"), ("current", "700000\n"), ("stat", "anon 400000\ninactive_file 200000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert probe.memory_of_machine(tmp_path / "meminfo", tmp_path) == 5e5
    (tmp_path / "memory.stat").unlink()
    assert probe.memory_of_machine(tmp_path / "meminfo", tmp_path) == 3e5
    (tmp_path / "memory.current").write_text("1000001\n")
    assert probe.memory_of_machine(tmp_path / "meminfo", tmp_path) == 0


def test_ranks_share_the_memory_of_their_machine() -> None:
    with mock.patch.object(probe, "available_memory", return_value=12e9):
        assert probe.free_memory(torch.device("cpu"), 3) == 4e9


def seen_by_receivers(rank: int, world_size: int) -> list[list[Flow]]:
    def pretend(rounds: Sequence[object], ranks: Ranks, *_: object) -> list[tuple[float, float]]:
        """Large messages take 2 s longer than small ones to rank 0, 4 s to rank 1, 8 s to rank 2."""
        return [(1.0 + number, 1.0 + number + 2.0 ** (ranks.rank + 1)) for number in range(len(rounds))]

    ranks = ranks_of(rank, world_size)
    with mock.patch.object(probe, "measure_rounds", pretend):
        return find_flows([[(0, 1)], [(2, 0)]], ranks, ranks.groups.tokens, SIZES)


def test_a_flow_is_as_fast_as_its_receiver_says() -> None:
    by_rank = run_ranks(3, seen_by_receivers)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    first, second = by_rank[0]
    assert [(f.source, f.destination, f.link.bandwidth) for f in first] == [(0, 1, 500.0), (1, 0, 1000.0)]
    assert [(f.source, f.destination, f.link.bandwidth) for f in second] == [(2, 0, 1000.0), (0, 2, 250.0)]
