"""Time what all ranks do together: a sample is the slowest rank's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from benchmarks.ratios import Budget, until_narrow

WARM_UP = 1
"""steps before the first sample: the one without history"""


class SlowestRank:
    """The samples of one action. All ranks take it together, and have the same numbers.

    Args:
        prepare: a function that is called with the number of a step, untimed, and returns what is timed.
    """

    def __init__(self, prepare: Callable[[int], Callable[[], object]]) -> None:
        self._prepare = prepare
        self._steps = 0
        self.ms: list[float] = []
        self.cpu_ms: list[float] = []
        """of the rank that was busiest, which other programs change less than the clock"""

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self._take()

    def sample(self) -> float:
        """Take the next step, and return its seconds."""
        clock, processor = self._take()
        self.ms.append(1e3 * clock)
        self.cpu_ms.append(1e3 * processor)
        return clock

    def _take(self) -> tuple[float, float]:
        action = self._prepare(self._steps)
        self._steps += 1
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        action()
        seconds = torch.tensor([time.perf_counter() - start, time.process_time() - cpu_start], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        clock, processor = seconds.tolist()
        return clock, processor


def take_turns(clocks: Mapping[str, SlowestRank], sides: Sequence[str], pairs: Sequence[tuple[str, str]], budget: Budget) -> None:
    """Sample these sides until the ratios of these pairs are narrow (`until_narrow`)."""
    for name in sides:
        clocks[name].warm_up()
    until_narrow(lambda name: clocks[name].sample(), sides, pairs, budget)
