"""Moving experts' tensors between ranks, against a plain gather, on random owners."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.parallel.comm.reshard import RowSpec, reshard
from testing.ranks import run_ranks

CASES = 25
SPECS = {
    "count": RowSpec((), torch.float32),
    "half": RowSpec((3,), torch.bfloat16),  # six bytes: what follows lies askew in the message
    "master": RowSpec((5, 2), torch.float64),
    "none": RowSpec((0,), torch.float32),
    "moment": RowSpec((7,), torch.float32),
}
NUM_BYTES = {"count": 4, "half": 6, "master": 80, "none": 0, "moment": 28}


def row(expert: int, name: str) -> torch.Tensor:
    """Any bits at all: NaNs of all kinds, infinities, signed zeros among them."""
    spec = SPECS[name]
    if 0 in spec.shape:
        return torch.empty(spec.shape, dtype=spec.dtype)
    size = int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize
    seed = 100 * expert + list(SPECS).index(name)
    bits = np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)
    return torch.from_numpy(bits).view(spec.dtype).view(spec.shape)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def _compare(rank: int, world: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    group = dist.group.WORLD
    assert group is not None
    totals = []
    for _ in range(CASES):
        experts = int(rng.integers(1, 12))
        # Few or many ranks that own something, so that ranks gain all, lose all, and have nothing all along.
        old, new = (rng.integers(0, rng.integers(1, world + 1), size=experts) for _ in range(2))
        has = {e: [name for name in SPECS if rng.random() < 0.7] for e in range(experts)}
        mine = {e: {name: row(e, name) for name in has[e]} for e in range(experts) if old[e] == rank}
        done = reshard(mine, SPECS, old, new, group, torch.device("cpu"))

        everything: list[dict[int, dict[str, tuple[torch.dtype, tuple[int, ...], list[int]]]]] = [{} for _ in range(world)]
        plain = {e: {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in tensors.items()} for e, tensors in mine.items()}
        dist.all_gather_object(everything, plain)
        gathered = dict(itertools.chain.from_iterable(part.items() for part in everything))
        wanted = {e: gathered[e] for e in range(experts) if new[e] == rank}
        got = {e: {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in tensors.items()} for e, tensors in done.rows.items()}
        assert got == wanted
        assert list(got) == sorted(wanted)
        for e, tensors in done.rows.items():
            if old[e] == rank:
                assert all(tensors[name] is mine[e][name] for name in tensors), "a row that stays was copied"
        moving = [e for e in range(experts) if old[e] != new[e]]
        assert (done.moved, done.num_bytes) == (len(moving), sum(NUM_BYTES[name] for e in moving for name in has[e]))
        totals.append((done.moved, done.num_bytes))
    return totals


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_arrive_bit_for_bit_and_missing_ones_stay_missing(world: int) -> None:
    totals = run_ranks(world, _compare, 40 + world)
    assert all(each == totals[0] for each in totals)
    assert (sum(moved for moved, _ in totals[0]) > 0) == (world > 1)
