"""One of two ranks that exchange uneven and empty messages: `python -m tests.gpu.exchange_rank mock|gpu STORE RANK`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the mock device must be loaded before torch
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

WORLD = 2
COUNTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "uneven": ((1, 5), (3, 0)),
    "one way": ((0, 7), (0, 0)),
    "to itself only": ((2, 0), (0, 4)),
    "nothing": ((0, 0), (0, 0)),
    "large": ((0, 1 << 20), (1, 0)),
}
"""name -> of each rank, rows for each rank"""
ROW = 16


def main(device: str, store: str, rank: int) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    if device == "mock":
        from tests.mock_cuda import install

        install.install(devices=WORLD)
        from tests.mock_cuda.collectives import install_backend

        install_backend()
    import torch.distributed as dist

    from hecate.ranks.ranks import connect

    ranks = connect(dist.FileStore(store, WORLD), rank, WORLD)
    # Each exchange goes through both groups at once, as experts and tokens do.
    under_way = [(name, group, *_begin(name, rank, group)) for name in COUNTS for group in (ranks.groups.experts, ranks.groups.tokens)]
    for name, _, work, received, wanted in under_way:
        work.wait()
        assert received.tolist() == wanted.tolist(), f"{name}: rank {rank} has received other rows than were sent"
    ranks.barrier()
    dist.destroy_process_group()
    print(json.dumps({"exchanges": float(len(under_way)), "backend": "mock" if device == "mock" else "nccl"}))


def _begin(name: str, rank: int, group: ProcessGroup) -> tuple[Work, Tensor, Tensor]:
    """An all-to-all: its work, what it receives into, and what that must become. A row from rank s to rank r is 10 · s + r everywhere."""
    import torch
    import torch.distributed as dist

    send, receive = COUNTS[name][rank], [counts[rank] for counts in COUNTS[name]]
    where = torch.device("cuda", rank)
    rows = torch.cat([torch.full((count, ROW), 10.0 * rank + to, device=where) for to, count in enumerate(send)])
    wanted = torch.cat([torch.full((count, ROW), 10.0 * source + rank) for source, count in enumerate(receive)])
    received = torch.empty(sum(receive), ROW, device=where)
    return dist.all_to_all_single(received, rows, receive, list(send), group=group, async_op=True), received, wanted


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
