"""Where a step's time goes on one rank."""

from __future__ import annotations

import time
from typing import Any

import torch

from hecate.parallel.loops import jit
from hecate.train.extensions.extension import Moment, StepExtension

_ENDED: dict[Moment, str] = {"planned": "plan", "forwarded": "forward", "backpropagated": "backward", "norm": "gradients"}
"""The part of a step that is over at a moment."""


class StepClock(StepExtension):
    """Times the parts of steps, one after the other.

    On a GPU the times are the device's, from events. Waiting for the planner's machine code, which happens once a machine, counts in no
    part.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._last = self._now()
        self._spans: list[tuple[str, Any, Any]] = []

    def begin(self) -> None:
        """A step begins, of which nothing is known yet."""
        self._spans.clear()
        self._last = self._now()

    def at(self, moment: Moment, subject: Any = None) -> None:
        if moment == "step":
            self.begin()
        elif moment == "optimizer":
            self.host_waited("waiting")
        elif moment in _ENDED:
            self.ended(_ENDED[moment])

    def ended(self, part: str) -> None:
        """What was done since the last call belongs to `part`; a part may come several times in a step."""
        now = self._now()
        self._spans.append((part, self._last, now))
        self._last = now

    def host_waited(self, part: str) -> None:
        """Since the last call the host has waited for all that this rank has computed and, as `part`, for other ranks.

        On a GPU this is no part: to know when the device was through with it, the host would have to wait once more.
        """
        if not self._cuda:
            self.ended(part)

    def seconds(self) -> dict[str, float]:
        """Part -> its seconds in this step, in the order of their beginnings. On a GPU, the host must have waited for the last part."""
        parts: dict[str, float] = {}
        for part, (start, waited_before), (end, waited) in self._spans:
            span = start.elapsed_time(end) / 1000 if self._cuda else end - start
            parts[part] = parts.get(part, 0.0) + span - (waited - waited_before)
        return parts

    def _now(self) -> tuple[Any, float]:
        """A time of the device, and for how long this process has waited for machine code until then."""
        if not self._cuda:
            return time.perf_counter(), jit.waited_seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, jit.waited_seconds()
