"""Decides when a job takes in further workers. The controller acts on the decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Scaling(Enum):
    KEEP = "keep"
    GROW = "grow"


@dataclass(frozen=True)
class ScalingPolicy:
    """A job grows when devices return, after the step under way, unless the last growth was too short a time ago."""

    pause_seconds: float
    """shortest time between two growths, so that a device that comes and goes does not keep the others from training"""

    def decide(self, *, working: int, ready: int, seconds_since_growth: float) -> Scaling:
        """
        Args:
            working: number of workers that train now.
            ready: number of further workers that have loaded.
        """
        return Scaling.GROW if ready and working and seconds_since_growth >= self.pause_seconds else Scaling.KEEP
