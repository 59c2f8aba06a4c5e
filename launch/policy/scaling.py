"""How many workers a job should have now. Pure; the controller carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Scaling(Enum):
    KEEP = "keep"
    GROW = "grow"


@dataclass(frozen=True)
class ScalingPolicy:
    """Grow when devices return, after the step under way, but not before the pause has passed."""

    pause_seconds: float
    """from one growth to the next, so that a device that comes and goes does not keep the others from training"""

    def decide(self, *, working: int, ready: int, seconds_since_growth: float) -> Scaling:
        """
        Args:
            working: workers that train now.
            ready: further workers that have loaded.
        """
        return Scaling.GROW if ready and working and seconds_since_growth >= self.pause_seconds else Scaling.KEEP
