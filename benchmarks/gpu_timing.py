"""Time steps on a GPU by its own clock, and measure its two ceilings: memory bandwidth and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.ratios import Budget, until_narrow

WARM_UP = 3
OF_RATES = Budget(half_width=0.01, rounds=10)


def alternate(steps: Mapping[str, Callable[[], object]], compared: Sequence[tuple[str, str]], budget: Budget) -> dict[str, list[float]]:
    """Return the milliseconds of each step in each round, until the ratios of these steps are narrow (`benchmarks.ratios`).

    A step is enqueued behind some milliseconds of other work, so that the host's time is never measured. This is what a layer costs in a
    model whose other layers keep the GPU busy.
    """
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    ahead = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def milliseconds(name: str) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        for _ in range(20):
            ahead.add_(1)
        start.record()
        steps[name]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return until_narrow(milliseconds, list(steps), compared, budget)


def copy_bandwidth() -> float:
    """Return the bytes/s read and written by copies of 2 GiB inside the GPU's memory, the best of several."""
    source = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    ms = min(alternate({"copy": lambda: target.copy_(source)}, [], OF_RATES)["copy"])
    return 2 * source.numel() / ms * 1e3


def matmul_rate() -> float:
    """Return the FLOP/s of 8192 x 8192 x 8192 products of random bfloat16 numbers, the best of several."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = min(alternate({"product": lambda: a @ b}, [], OF_RATES)["product"])
    return 2 * 8192**3 / ms * 1e3
