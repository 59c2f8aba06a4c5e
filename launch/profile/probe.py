"""Measure this rank's device and the messages between ranks. All ranks measure at the same time, as they train at the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.launch.profile.schedule import Rounds
from hecate.model.files.load import pick_dtype
from hecate.ranks.ranks import Ranks

_FEWEST, _MOST = 3, 50
_SMALL_MESSAGES = 20
_FEWEST_CALLS = 4
"""the fewest calls in one series of calls that is timed as a whole"""
_SERIES_SHARE = 0.5
"""the length of such a series, as a share of `ProbeSizes.seconds`"""


@dataclass(frozen=True, kw_only=True)
class ProbeSizes:
    """How much a measurement computes, copies and sends, and for how long."""

    matmul: int
    """the side of the square matrices that are multiplied"""
    copy_bytes: int
    """the bytes of a copy, well above the size of the caches"""
    small_bytes: int
    """the bytes of a small message"""
    large_bytes: int
    """the bytes of a large message"""
    seconds: float
    """how long each measurement of a device is repeated, and the messages of all pairs in all; but at least three times"""


def sizes_for(device: torch.device) -> ProbeSizes:
    """Return the sizes with which `hecate profile` measures."""
    if device.type == "cuda":
        return ProbeSizes(matmul=8192, copy_bytes=1 << 30, small_bytes=1 << 10, large_bytes=1 << 26, seconds=1.0)
    return ProbeSizes(matmul=1024, copy_bytes=1 << 27, small_bytes=1 << 10, large_bytes=1 << 24, seconds=1.0)


def quick_sizes(device: torch.device) -> ProbeSizes:
    """Return sizes for a job that measures before it starts: a second or two in all, enough to distinguish devices and links."""
    if device.type == "cuda":
        return ProbeSizes(matmul=8192, copy_bytes=1 << 29, small_bytes=1 << 10, large_bytes=1 << 25, seconds=0.2)
    return ProbeSizes(matmul=512, copy_bytes=1 << 25, small_bytes=1 << 10, large_bytes=1 << 22, seconds=0.25)


def measure_flops(ranks: Ranks, sizes: ProbeSizes) -> float:
    """Return the sustained FLOP/s of a matmul in the dtype that training would use. Every rank must call it."""
    multiply = _matmul(ranks.device, sizes)
    return 2 * sizes.matmul**3 / _seconds_side_by_side(multiply, sizes, ranks)


def measure_memory_bandwidth(ranks: Ranks, sizes: ProbeSizes) -> float:
    """Return the bytes/s that a large copy reads, plus those that it writes. Every rank must call it."""
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=ranks.device)
    target = torch.empty_like(source)
    return 2 * sizes.copy_bytes / _seconds_side_by_side(lambda: target.copy_(source), sizes, ranks)


def measure_rounds(rounds: Rounds, ranks: Ranks, group: dist.ProcessGroup, sizes: ProbeSizes) -> list[tuple[float, float]]:
    """Exchange messages with the partners that `rounds` give. Every rank must call it, with the same number of rounds.

    A message is sent by an all-to-all of `group`, as experts and tokens are, and both partners send at the same time. A rank without
    a partner in a round sends nothing.

    Args:
        rounds: pairs of ranks of the whole job; pairs outside `group` are ignored.

    Returns:
        [rounds] the median seconds in which this rank received a small and a large message; meaningless in rounds without a partner.
    """
    partner_of_round = [partner_of(ranks.rank, pairs) for pairs in rounds]
    send = torch.ones(sizes.large_bytes, dtype=torch.uint8, device=ranks.device)
    receive = torch.empty_like(send)
    budget = sizes.seconds / max(1, 2 * len(rounds))

    def exchange(partner: int | None, size: int) -> None:
        splits = [0] * group.size()
        if partner is not None:
            splits[dist.get_group_rank(group, partner)] = size
        dist.all_to_all_single(receive[: sum(splits)], send[: sum(splits)], splits, splits, group)

    seconds: list[tuple[float, float]] = []
    for partner in partner_of_round:

        def small(partner: int | None = partner) -> None:
            for _ in range(_SMALL_MESSAGES):
                exchange(partner, sizes.small_bytes)

        def large(partner: int | None = partner) -> None:
            exchange(partner, sizes.large_bytes)

        small_seconds = median(_repeat(small, budget, ranks)) / _SMALL_MESSAGES
        seconds.append((small_seconds, median(_repeat(large, budget, ranks))))
    return seconds


def measure_overlap(ranks: Ranks, sizes: ProbeSizes) -> tuple[float, float, float]:
    """Return the median seconds, on the slowest rank, of some matmuls, of an all-to-all of all ranks, and of the two at once.

    Their sizes are chosen so that the two take about equally long. Every rank must call it.
    """
    multiply = _matmul(ranks.device, sizes)
    world = ranks.world_size

    def start(send: Tensor, receive: Tensor) -> dist.Work:
        work = dist.all_to_all_single(receive, send, group=ranks.groups.tokens, async_op=True)
        assert work is not None, "every rank is in the group"
        return work

    def buffers(size: int) -> tuple[Tensor, Tensor]:
        size = -(-size // world) * world
        return torch.ones(size, dtype=torch.uint8, device=ranks.device), torch.empty(size, dtype=torch.uint8, device=ranks.device)

    pair = buffers(sizes.large_bytes)
    once = _slowest(_repeat(multiply, sizes.seconds / 4, ranks), ranks)
    sent = _slowest(_repeat(lambda: start(*pair).wait(), sizes.seconds / 4, ranks), ranks)
    multiplications = max(1, round(sent / once))
    pair = buffers(sizes.large_bytes * min(8, max(1, round(once / sent))))

    def compute() -> None:
        for _ in range(multiplications):
            multiply()

    def both() -> None:
        work = start(*pair)
        compute()
        work.wait()

    actions: tuple[Callable[[], object], ...] = (compute, lambda: start(*pair).wait(), both)
    compute_alone, transfer, at_once = (_slowest(_repeat(action, sizes.seconds / 2, ranks), ranks) for action in actions)
    return compute_alone, transfer, at_once


def free_memory(device: torch.device, ranks_on_node: int) -> float:
    """Return the bytes that this rank may use: those free on its GPU, or on a CPU machine an equal share of the available memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return memory_of_machine(Path("/proc/meminfo"), Path("/sys/fs/cgroup")) / ranks_on_node


def memory_of_machine(meminfo: Path, cgroup: Path) -> float:
    """Return the available bytes of a machine or of a container, from the kernel's file of memory and folder of the control group."""
    limit, used, parts = (
        path.read_text(encoding="utf-8") if path.is_file() else None
        for path in (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat")
    )
    return available_memory(meminfo.read_text(encoding="utf-8"), limit, used or "0", parts or "")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of a CPU with this rank's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def available_memory(meminfo: str, limit: str | None, used: str = "0", parts: str = "") -> float:
    """Return the available bytes, from the text of the machine's /proc/meminfo and of the container's files, if there are any.

    Args:
        limit: memory.max.
        used: memory.current, which counts the cache of files, too.
        parts: memory.stat. The cache of files that are not in use is given up as soon as something else needs memory.
    """
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    available = float(line.split()[1]) * 1024
    if limit is None or limit.strip() == "max":
        return available
    cache = next((float(line.split()[1]) for line in parts.splitlines() if line.startswith("inactive_file ")), 0.0)
    return min(available, max(0.0, float(limit) - max(0.0, float(used) - cache)))


def _matmul(device: torch.device, sizes: ProbeSizes) -> Callable[[], object]:
    # The numbers are random: with constant ones a GPU draws less power and keeps a higher clock than in training.
    numbers = torch.randn(sizes.matmul, sizes.matmul, generator=torch.Generator(device).manual_seed(0), device=device)
    factor = numbers.to(pick_dtype("auto", device))
    product = torch.empty_like(factor)
    return lambda: torch.mm(factor, factor, out=product)


def partner_of(rank: int, pairs: Sequence[tuple[int, int]]) -> int | None:
    """Return the partner of `rank` in a round, or None if it has none."""
    return next((a + b - rank for a, b in pairs if rank in (a, b)), None)


def _seconds_side_by_side(action: Callable[[], object], sizes: ProbeSizes, ranks: Ranks) -> float:
    """Return the median seconds of a call while all ranks make it.

    Calls are timed in long series, for two reasons: ranks that share cores do not start at the same moment, so a single call of one
    could end before that of another begins; and a CPU quota or heat slows a device down only after a while.
    """
    action()
    count = max(_FEWEST_CALLS, math.ceil(_SERIES_SHARE * sizes.seconds / _timed(action, ranks.device)))

    def series() -> None:
        for _ in range(count):
            action()

    return median(_repeat(series, sizes.seconds, ranks)) / count


def _repeat(action: Callable[[], object], budget: float, ranks: Ranks) -> list[float]:
    """Return the seconds of each of several calls, about `budget` seconds in all.

    Every rank must call it, and all ranks start each call at the same time.
    """
    action()  # the first call allocates memory, opens connections and selects kernels
    first = ranks.all_max(_timed(action, ranks.device))
    count = min(_MOST, max(_FEWEST, int(budget / first)))
    seconds = []
    for _ in range(count):
        ranks.barrier()
        seconds.append(_timed(action, ranks.device))
    return seconds


def _timed(action: Callable[[], object], device: torch.device) -> float:
    _finish(device)  # a GPU works behind the host: what is queued before or after must not count, and the action must have ended
    start = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: Sequence[float], ranks: Ranks) -> float:
    return median(ranks.all_max(value) for value in seconds)
