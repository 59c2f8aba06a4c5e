"""Do the index tables of a second exchange live until another stream has read them? One GPU, whose collectives are made to be slow.

Rank 0 of four begins a collective over leaders or in slices. Its first exchange is some milliseconds of waiting on a stream of its own,
and its future is complete at once, as NCCL's is; so the second exchange is queued behind it, on a third stream, before the call returns.
Then the caller writes into all small memory that it can get. If the tables that the second exchange reads had been freed, they would be
overwritten, and other rows be sent.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.cluster.topology import Link, Topology, uniform_topology
from hecate.parallel.comm.collectives import sparse_all_gather, sparse_reduce_scatter
from hecate.parallel.comm.device_tables import chunk_tables
from hecate.parallel.transfer.transfer_plan import ChunkPlan, plan_chunks_by
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import everything_everywhere

NUMEL, WORLD, EXPERTS = 12, 4, 8
CYCLES = 20_000_000
"""of waiting: some ten milliseconds"""
BLOCKS = 256
"""small tensors that the caller makes meanwhile"""


class Queued:
    """The work of a collective on a stream, with a future that is complete at once."""

    def __init__(self, stream: Any, result: Tensor) -> None:
        self._stream = stream
        with torch.cuda.stream(stream):
            self._future: torch.futures.Future[Any] = torch.futures.Future(devices=[torch.device("cuda", 0)])
            self._future.set_result([result])  # records an event on the stream, for which what follows waits

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)


class SlowGroup:
    """The collectives of rank 0 of four. Row n of what arrives is n everywhere.

    Args:
        width: elements of a row.
    """

    def __init__(self, width: int) -> None:
        self.stream, self._width = torch.cuda.Stream(), width
        self.sent: list[Tensor] = []
        """by the second exchange"""

    def all_to_all_single(self, output: Tensor, given: Tensor, *_: Any, **__: Any) -> Queued:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            _wait_on_device()
            output.copy_(torch.arange(len(output), device=output.device) // self._width)
        return Queued(self.stream, output)

    def batch_isend_irecv(self, operations: list[tuple[Any, Tensor]]) -> list[Queued]:
        for operation, rows in operations:
            if operation is dist.isend:
                self.sent.append(rows.clone())
            else:
                rows.zero_()
        return [Queued(torch.cuda.current_stream(), rows) for _, rows in operations]


def figures() -> dict[str, float | str]:
    """How many rows were sent in each case. Raises AssertionError: others than the tables say."""
    found: dict[str, float | str] = {"freed_memory_was_used_again": float(_freed_memory_is_used_again())}
    nodes = {"two_level": uniform_topology(2, 2, flops=1e14, memory=8e10, intra_node=Link(2e11, 1e-5), inter_node=Link(1e10, 1e-5))}
    nodes["sliced"] = uniform_topology(1, WORLD, flops=1e14, memory=8e10, intra_node=Link(2e11, 1e-5))
    for route, topology in nodes.items():
        for collective in ("gather", "reduce"):
            found[f"{route}_{collective}_rows"] = float(_rows_sent(route, topology, collective))
    return found


def _rows_sent(route: Any, topology: Topology, collective: str) -> int:
    plan = plan_chunks_by(route, everything_everywhere(np.arange(EXPERTS) % WORLD, WORLD), ChunkSize(NUMEL, 4), topology, 0)
    late, at_once = (_sent(plan, collective, disturbed) for disturbed in (True, False))
    assert len(late) == len(at_once) > 0, "the second exchange has sent nothing"
    for got, wanted in zip(late, at_once, strict=True):
        assert torch.equal(got, wanted), f"{route}, {collective}: sent were rows {got[:, 0].tolist()}, not {wanted[:, 0].tolist()}"
    return sum(map(len, at_once))


def _sent(plan: ChunkPlan, collective: str, disturbed: bool) -> list[Tensor]:
    """What the second exchange has sent, on the host."""
    group: Any = SlowGroup(NUMEL // plan.slices)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "get_world_size", return_value=WORLD))
        stack.enter_context(mock.patch.object(dist, "get_backend", return_value="nccl"))
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", group.all_to_all_single))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", group.batch_isend_irecv))
        stack.enter_context(mock.patch.object(dist, "P2POp", lambda operation, rows, **_: (operation, rows)))
        rows = torch.zeros(plan.num_owned if collective == "gather" else plan.num_slots, NUMEL, device="cuda")
        rows += torch.arange(len(rows), device="cuda")[:, None]
        begin = sparse_all_gather if collective == "gather" else sparse_reduce_scatter
        handle = begin(rows, plan, group)
        if disturbed:
            chunk_tables.cache_clear()
            kept = [torch.full((64,), 7, dtype=torch.int64, device="cuda") for _ in range(BLOCKS)]
        torch.cuda.synchronize()
        handle.wait()
        if disturbed:
            del kept
    return [rows.cpu() for rows in group.sent]


def _freed_memory_is_used_again() -> bool:
    """Whether a tensor that nothing holds is overwritten before another stream has read it: else nothing is shown by the rest."""
    stream, read = torch.cuda.Stream(), torch.zeros(64, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    index = torch.full((64,), 3, dtype=torch.int64, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _wait_on_device()
        read.copy_(index)
    del index
    kept = [torch.full((64,), 7, dtype=torch.int64, device="cuda") for _ in range(BLOCKS)]
    torch.cuda.synchronize()
    del kept
    return bool((read == 7).any())


def _wait_on_device() -> None:
    if hasattr(torch._C, "_cuda_sleep"):  # a mock GPU has no stream that could wait
        torch.cuda._sleep(CYCLES)
