"""Collectives across two network namespaces: what the link's ends count is what the plan says crosses. Needs root."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hecate.parallel.comm.collectives import Handle, sparse_all_gather, sparse_reduce_scatter
from testing.namespaces import bytes_out, missing_for_slow_link, slow_link
from testing.ranks import run_ranks
from tests.parallel.comm.collective_cases import Case, world_group
from tests.parallel.plain_gather_ports import gather_ports

pytestmark = pytest.mark.skipif(missing_for_slow_link() is not None, reason=missing_for_slow_link() or "")

CHUNK = 1 << 16
CASE = Case((0, 1, 0, 1), (0, 1, 2, 3, 0), ((True,) * 4,) * 5, CHUNK, torch.float64)
"""five experts of 512 KiB everywhere; ranks of a node are not adjacent"""


def _counted(start: Callable[[], Handle[torch.Tensor]]) -> tuple[int, torch.Tensor]:
    """Bytes that leave this rank's node during a collective, and its result."""
    dist.barrier()
    before = bytes_out()
    dist.barrier()  # nobody starts before all have looked
    result = start().wait()
    dist.barrier()
    return bytes_out() - before, result


def _crossing(rank: int, world: int) -> list[int]:
    group, plan, leaders = world_group(), CASE.plan(rank), CASE.plan(rank, "two_level")
    owned, gradients = CASE.chunks(CASE.owned(rank)), CASE.gradients(rank)
    _counted(lambda: sparse_all_gather(owned, plan, group))  # opens the connections
    flat, replicas = _counted(lambda: sparse_all_gather(owned, plan, group))
    over_leaders, same = _counted(lambda: sparse_all_gather(owned, leaders, group))
    assert torch.equal(replicas, same)
    flat_back, total = _counted(lambda: sparse_reduce_scatter(gradients, plan, group))
    back_over_leaders, same = _counted(lambda: sparse_reduce_scatter(gradients, leaders, group))
    torch.testing.assert_close(same, total, rtol=0, atol=1e-12)
    return [flat, over_leaders, flat_back, back_over_leaders]


def test_the_link_carries_what_the_plan_says() -> None:
    with slow_link() as names:
        counts = run_ranks(4, _crossing, timeout=60, namespaces=[names[node] for node in CASE.topology.node_of_rank])
    for number, two_level in enumerate((False, True, False, True)):
        ports = gather_ports(CASE.placement.owner_E, CASE.placement.where_ED, CASE.topology, two_level=two_level)
        far_D = (ports if number < 2 else ports.reversed()).far_out_D * CHUNK * 8
        for node in (0, 1):
            planned = far_D[CASE.topology.ranks_of_node(node)].sum()
            # The rest is headers, acknowledgements of what comes the other way, and barriers.
            assert planned <= counts[node][number] <= 1.06 * planned + 2**16, (number, node)


def test_a_terminated_program_leaves_no_namespace() -> None:
    program = "import testing.namespaces as n, time\nwith n.slow_link() as names: print(*names, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        names = process.stdout.readline().split()
        assert len(names) == 2
        assert all(Path("/run/netns", name).exists() for name in names)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not any(Path("/run/netns", name).exists() for name in names)
