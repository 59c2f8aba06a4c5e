"""What another stream reads lives until the collective is waited for.

Under NCCL the future of a collective is complete at once, so what follows it is queued on another stream before the call returns. If the
tensors that it reads died with the call, their memory could be written again before they are read.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.parallel.cluster.topology import Link, uniform_topology
from hecate.parallel.comm.collectives import Handle, sparse_all_gather, sparse_reduce_scatter
from hecate.parallel.comm.device_tables import chunk_tables
from hecate.parallel.transfer.transfer_plan import ChunkPlan, plan_chunks_by
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import everything_everywhere

NUMEL, WORLD = 12, 4


class Queued:
    """The work of a collective under NCCL."""

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([])
        return future

    def wait(self) -> None:
        """Orders streams only."""


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 0 of four, whose collectives are queued and bring nothing."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: WORLD)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_, **__: Queued())
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [Queued()])
    monkeypatch.setattr(dist, "P2POp", lambda *_, **__: None)
    return Queued()


def plan() -> ChunkPlan:
    topology = uniform_topology(1, WORLD, flops=1e14, memory=8e10, intra_node=Link(2e11, 1e-5))
    placement = everything_everywhere(np.arange(8) % WORLD, WORLD)
    return plan_chunks_by("sliced", placement, ChunkSize(NUMEL, 4), topology, 0)


@pytest.mark.parametrize("collective", ["gather", "reduce"])
def test_index_tables_live_as_long_as_the_handle(group: Any, collective: str) -> None:
    sliced = plan()
    handle: Handle[Any]
    if collective == "gather":
        handle = sparse_all_gather(torch.zeros(sliced.num_owned, NUMEL), sliced, group)
    else:
        handle = sparse_reduce_scatter(torch.zeros(sliced.num_slots, NUMEL), sliced, group)
    tables = chunk_tables(sliced, torch.device("cpu"))
    read_later = tables.sent_on_M if collective == "gather" else tables.leader_row_M
    assert len(read_later) > 0
    alive = weakref.ref(read_later)
    del tables, read_later
    chunk_tables.cache_clear()
    assert alive() is not None, "nothing holds the tables any more, though another stream may still have to read them"
    handle.wait()
    assert alive() is None, "they are held for good"
