"""What saves cost a small training: the share of digests in a save, and what a save adds to the steps that it is among.

Digests are timed inside of the saves that they belong to, since two writes of the same bytes to a disk differ by more than what they take.
Saves at once, saves beside the steps and no saves take turns (`benchmarks.ratios`), over a few steps each (`STEPS`).
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from typing import Any

import torch.distributed as dist

from benchmarks.paired_steps import Taken, on_all_ranks, training
from benchmarks.ratios import Budget, until_narrow
from hecate.checkpoint import shard
from hecate.checkpoint.layout import shard_file
from hecate.train.training import Training

LARGE = {"lora.r": 64, "micro_batch_size": 1}
"""settings of a training whose checkpoint has 80 MB, so that a save is more than its fsyncs"""
STEPS = 4
"""steps after the beginning of a save; while they run, one beside them must be written"""
ARMS = ("beside", "none", "at_once")
"""how a stretch of STEPS steps saves: as `save_async: true` does, not at all, as without it"""


def digest_shares(rank: int, world: int, folder: str, saves: int) -> dict[str, Any]:
    """The seconds of this rank's digests and of its saves, and how many bytes it writes in one."""
    run = training(rank, world, folder, "large", LARGE)
    run.train_one()
    real, spent = shard.digest_of, 0.0

    def timed(data: Any) -> str:
        nonlocal spent
        started = time.perf_counter()
        digest = real(data)
        spent += time.perf_counter() - started
        return digest

    shard.digest_of = timed
    found: dict[str, Any] = {"digests": [], "saves": [], "bytes": 0}
    for number in range(1 + saves):
        dist.barrier()
        spent, started = 0.0, time.perf_counter()
        path = run.save().folder
        took = time.perf_counter() - started
        assert path is not None
        if number:  # the first one is to warm up
            found["digests"].append(spent)
            found["saves"].append(took)
        found["bytes"] = (path / shard_file(rank, world)).stat().st_size
        dist.barrier()
        if rank == 0:
            shutil.rmtree(path)
        dist.barrier()
    shard.digest_of = real
    return found


def saves_among_steps(rank: int, world: int, folder: str, settings: dict[str, Any], budget: Budget) -> dict[str, Taken]:
    """Stretches of STEPS steps, by how they save, until what a save adds is known well enough."""
    run = training(rank, world, folder, "among", {**settings, "save_total_limit": 1})
    processor: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(2):
        run.train_one()

    def stretch(arm: str) -> float:
        clock, used = on_all_ranks(partial(_stretch, run, arm))
        processor[arm].append(used)
        return clock

    for arm in ARMS:
        stretch(arm)
    clock = until_narrow(stretch, ARMS, [("beside", "none"), ("at_once", "none")], budget)
    return {arm: Taken(clock[arm], processor[arm][1:]) for arm in ARMS}


def _stretch(run: Training, arm: str) -> None:
    """STEPS steps, with a save before the first; one beside them is ended as `hecate.train.loop` does."""
    if arm == "at_once":
        run.save()
    elif arm == "beside":
        run.begin_save()
    for _ in range(STEPS):
        asked = run.train_one(lambda: run.saving.requests() if run.saving else (False, False)).result.asked
        if run.saving and (asked[1] or not asked[0]):
            run.end_save(failed=asked[1])
    if run.saving:
        run.end_save()


def kept_copies(rank: int, world: int, folder: str, settings: dict[str, Any]) -> dict[str, int]:
    """The bytes of what is trained of experts on this rank, with moments, after two steps with `fssdp.redundancy: 1`."""
    run = training(rank, world, folder, "copies", {**settings, "fssdp.redundancy": 1})
    for _ in range(2):
        run.train_one()
    optimizer = run.parts.optimizer
    held = {"owned": optimizer.owned, "backups": optimizer.backups}
    return {
        kind: sum(one.numel() * one.element_size() for parameter in parameters.values() for one in optimizer.row(parameter).values())
        for kind, parameters in held.items()
    }
