"""Learning-rate schedules: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable


def schedule(kind: str, max_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """The factor of the peak learning rate for step 0, 1, ...: what torch's LambdaLR takes.

    Warm-up lasts ceil(warmup_ratio · max_steps) steps, as in transformers, and its first step is not zero; cosine and linear reach zero
    after the last step.
    """
    warmup = math.ceil(warmup_ratio * max_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if kind == "linear" else 1.0

    return factor
