"""A step's moments as places for faults (`hecate.faults`), in a process that is armed."""

from __future__ import annotations

from typing import Any, get_args

from hecate import faults
from hecate.train.extensions.extension import Moment, StepExtension

_PLACES = frozenset(get_args(faults.Place))


class FaultPlaces(StepExtension):
    """Passes on the step's moments that are places of faults to whoever has armed this process."""

    def at(self, moment: Moment, subject: Any = None) -> None:
        if moment in _PLACES:
            faults.at(moment, subject)  # type: ignore[arg-type]
