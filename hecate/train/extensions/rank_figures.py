"""What each rank tells the others in every step beside its share of the losses: what it asks of them, and how fast it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hecate.report.events import DenseWork, StepResult
from hecate.train.extensions.extension import StepExtension


@dataclass(frozen=True)
class RankFigures(StepExtension):
    """This rank's requests and its work in the step before, of one step."""

    requests: Callable[[], Sequence[bool]]
    """Returns this rank's requests to all ranks (`StepResult.asked`), equally many on every rank. It is called once."""
    work_before: DenseWork
    """This rank's work in the step before."""

    def figures(self) -> Sequence[float]:
        return self.work_before.tokens, self.work_before.seconds, *self.requests()

    def completed(self, result: StepResult, figures: Sequence[Sequence[float]], sums: Sequence[float]) -> StepResult:
        requests = zip(*(asked for _, _, *asked in figures), strict=True)
        return replace(
            result,
            asked=tuple(any(asked) for asked in requests),
            work_before=tuple(DenseWork(int(tokens), seconds) for tokens, seconds, *_ in figures),
        )
