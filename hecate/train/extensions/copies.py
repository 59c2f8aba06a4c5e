"""Copies of experts and of what all ranks have: gradients for the backups, and the comparison that finds damaged memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hecate.elastic.backups import GradientsOnTheirWay, send_gradients
from hecate.engine.protocol import ExpertEngine
from hecate.optim.optimizer import ExpertOptimizer
from hecate.train.extensions.extension import Moment, StepExtension


class BackupGradients(StepExtension):
    """The backups of experts get their owners' gradients, while the replicated gradients are summed, and take the same steps."""

    def __init__(self, engine: ExpertEngine, optimizer: ExpertOptimizer, backups: int) -> None:
        """`backups`: of each expert, at least 1."""
        self._engine, self._optimizer, self._backups = engine, optimizer, backups
        self._on_their_way: GradientsOnTheirWay | None = None

    def at(self, moment: Moment, subject: Any = None) -> None:
        if moment == "reduce":
            self._on_their_way = send_gradients(self._engine, self._optimizer, subject, self._backups)
        elif moment == "reduced" and self._on_their_way is not None:
            self._on_their_way.wait()
            self._on_their_way = None


@dataclass(frozen=True)
class ComparedCopies(StepExtension):
    """All copies are compared when the gradients are complete and nothing has changed yet."""

    compare: Callable[[], None]
    """A function that sends messages, and ends the step with an error if copies differ."""

    def at(self, moment: Moment, subject: Any = None) -> None:
        if moment == "gradients":
            self.compare()
