"""The course of the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable


def schedule(
    kind: str, max_steps: int, warmup_ratio: float, *, min_lr_rate: float = 0.0, decay_ratio: float = 0.0
) -> Callable[[int], float]:
    """The factor of the peak learning rate in step 0, 1, ...

    Linear warm-up lasts ceil(warmup_ratio * max_steps) steps, as in transformers, and its first step is not zero. After it the factors are
    those of transformers' schedules.

    Args:
        kind: a value of lr_scheduler_type: what follows the warm-up.
        min_lr_rate: the factor after the last step, of cosine_with_min_lr and wsd.
        decay_ratio: the share of the steps, at the end, in which wsd falls.
    """
    warmup = math.ceil(warmup_ratio * max_steps)
    start = max_steps - math.ceil(decay_ratio * max_steps) if kind == "wsd" else warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step < start or kind.startswith("constant"):
            return 1.0
        if kind == "inverse_sqrt":
            return 1 / math.sqrt(1 + (step - warmup) / (warmup or 10_000))
        done = min(1.0, (step - start) / max(1, max_steps - start))
        if kind == "linear":
            return 1 - done
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return cosine if kind == "cosine" else min_lr_rate + (1 - min_lr_rate) * cosine

    return factor
