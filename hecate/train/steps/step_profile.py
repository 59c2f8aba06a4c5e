"""Records a timeline of a few steps of all ranks with torch's profiler (`profile`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from hecate.ranks.ranks import Ranks
from hecate.report.timeline import write_timeline

BEFORE, STEPS = 2, 3
"""steps of the process that are not recorded, because they also warm things up, and those that are"""
TIMELINE = "profile.json.gz"
"""The name of the timeline's file in the run's folder."""


class StepProfile:
    """The profile of one rank. Each rank writes a file of its own, and the first one merges them one step later.

    That costs no message: a rank completes a step only after all others have begun it, and so have written their files of the steps before.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, wanted: bool) -> None:
        self._folder, self._ranks = folder, ranks
        self._under_way = wanted
        """Whether there will be a timeline, the same on every rank; False: it is written, not wanted or given up."""
        self._steps = 0
        """The number of steps that this process has done."""
        self._profile: profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if self._under_way and self._steps == BEFORE:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else [])]
            # The next step is planned in a thread of its own (`hecate.engine.plans_ahead`).
            self._profile = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
            self._profile.start()
        with record_function("hecate: step"):
            yield
        self._steps += 1
        if self._profile is not None and self._steps == BEFORE + STEPS:
            self._write_own()

    def merge(self, *, at_end: bool = False) -> str | None:
        """Merge the ranks' files, on the first rank, if all are there; what to tell the user, or None.

        Args:
            at_end: the run ends, on all ranks, which must all call it: what was recorded is all.
        """
        if not self._under_way or not (at_end or self._steps > BEFORE + STEPS):
            return None
        self._under_way = False
        if self._steps <= BEFORE:
            return f"profile: nothing was recorded, because the first {BEFORE} steps of a process never are, and it did no more"
        if self._profile is not None:
            self._write_own()
        if at_end:
            self._ranks.all_most([0.0])  # no step comes that would say that all have written
        if not self._ranks.is_first:
            return None
        path = self._folder / TIMELINE
        missing = write_timeline(path, {rank: self._part(rank) for rank in range(self._ranks.world_size)})
        lacking = f"; without ranks {', '.join(map(str, missing))}, whose nodes have other disks" if missing else ""
        return f"profile of {min(self._steps - BEFORE, STEPS)} steps: {path}, for ui.perfetto.dev{lacking}"

    def give_up(self) -> str | None:
        """Ranks were lost or have come, so that there is no timeline of all; what to tell the user, or None."""
        if not self._under_way:
            return None
        self._under_way = False
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        self._part(self._ranks.rank).unlink(missing_ok=True)
        return "profile: given up, because the ranks have changed"

    def _write_own(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._part(self._ranks.rank)))
        self._profile = None

    def _part(self, rank: int) -> Path:
        return self._folder / f"profile-rank-{rank}.json.gz"
