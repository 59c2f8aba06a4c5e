"""Which evaluation of a run was the best, and how long there has been no better one: a pure function of the evaluations before.

The semantics are those of transformers' Trainer and EarlyStoppingCallback: any better value is the best, and an evaluation counts as an
improvement if it is better than the best before it by more than a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class BestModel:
    """What a run knows of its best model; the same on every rank."""

    metric: str = ""
    """The name of the number that is compared; empty: nothing was evaluated yet, or the run looks for no best model."""
    value: float | None = None
    """The best value; None: none was a number yet."""
    step: int | None = None
    """The number of optimizer steps after which it was evaluated."""
    evaluated: int = 0
    """The number of steps after which the last evaluation was that is counted here."""
    without: int = 0
    """How many evaluations in a row have brought no improvement."""

    def after(self, metric: str, value: float, step: int, *, threshold: float = 0.0) -> BestModel:
        """What is known after an evaluation. An evaluation that is counted already changes nothing. Another metric begins anew.

        Args:
            metric: its last word is the kind of number: less is better of `loss`, more of `exact`.
            value: a value that is not finite is no improvement.
            step: the number of optimizer steps done.
            threshold: what is better by no more than this is the best, but no improvement.
        """
        before = self if self.metric == metric else BestModel(metric)
        if step <= before.evaluated:
            return before
        gain = -math.inf
        if math.isfinite(value):
            gain = math.inf if before.value is None else ((value - before.value) * (1 if metric.endswith("exact") else -1))
        counted = replace(before, evaluated=step, without=0 if gain > threshold else before.without + 1)
        return replace(counted, value=value, step=step) if gain > 0 else counted

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> BestModel:
        """What `asdict` gave; of nothing, what is known at the start of a run. Raises TypeError or ValueError: it is something else."""
        best = BestModel(**value)
        known = (best.value is None, best.step is None)
        kinds = [type(one) for one in (best.metric, best.evaluated, best.without, best.step or 0, best.value or 0.0)]
        if kinds != [str, int, int, int, float] or known[0] != known[1]:
            raise ValueError(f"the best model is {str(value)[:100]}")
        return best


NOTHING_KNOWN = BestModel()
"""At the start of a run."""
