"""A run holds in step 2,000 what it held in step 200, its reports, checkpoints and the ranks' messages included."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hecate import faults
from hecate.config import load_config
from hecate.parallel.comm.device_tables import chunk_tables, token_tables
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group, settings_of

FIRST, LAST = 200, 2000
SETTINGS = (
    f"max_steps={LAST + 1}",
    "model.dtype=float32",
    "data.seq_len=32",
    "gradient_accumulation_steps=1",
    "logging_steps=100",
    "lr_scheduler_type=constant",
    "warmup_ratio=0",
    "save_steps=150",
    "save_total_limit=1",
    "fssdp.reshard_interval=75",
)


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    tensors: int
    """of which Python knows"""
    tensor_bytes: int
    """of their memory, each block once"""
    objects: int
    """of Python that can refer to others"""
    resident: int
    """bytes"""


def held_now() -> Held:
    for cache in (chunk_tables, token_tables):  # of so many plans at most, and fuller after more steps
        cache.cache_clear()
    gc.collect()
    objects = gc.get_objects()
    tensors = [one for one in objects if isinstance(one, torch.Tensor)]
    blocks = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one.device.type == "cpu"}
    resident = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS"))
    return Held(len(tensors), sum(blocks.values()), len(objects), int(resident.split()[1]) * 1024)


def held_at_both(rank: int, world: int, workshop: str) -> list[Held]:
    seen: list[Held] = []
    faults.arm(lambda place, subject: seen.append(held_now()) if place == "step" and subject in (FIRST, LAST) else None)
    config = load_config(f"{workshop}/config.yaml", settings_of(workshop, f"steady-{world}", SETTINGS), claim_output=False)
    assert train(config, ranks_of_default_group(rank, world))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_held_that_was_not_held_before(tmp_path: Path, world: int) -> None:
    """The plans of one step may have 32 tensors of tables more than those of another, of 32 KiB at most; one more in each step would be
    1,800. Objects may be a hundredth more, as a cache or a record of losses has a few, and the resident memory 16 MiB, 9 KiB a step: malloc
    keeps what is free, and torch a record of the newest 2,000 collectives.
    """
    for first, last in run_ranks(world, held_at_both, str(make_workshop(tmp_path)), timeout=1200):
        assert last.tensors <= first.tensors + 32, (first, last)
        assert last.tensor_bytes <= first.tensor_bytes + (32 << 10), (first, last)
        assert last.objects <= 1.01 * first.objects, (first, last)
        assert last.resident <= first.resident + (16 << 20), (first, last)
