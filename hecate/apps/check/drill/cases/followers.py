"""A tracker that follows a run and goes wrong: R25."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.ranks import call_on_ranks
from hecate.apps.check.drill.tiny_training import digests, tiny_config
from hecate.config import Config
from hecate.ranks.ranks import Ranks
from hecate.report import run_report
from hecate.report.tracking import tracker_threads
from hecate.report.tracking.trackers import TrackedRun, Tracker
from hecate.train.loop import train

_STEPS = 3
_NAMED = {
    "hangs": "tracker tensorboard has not",
    "raises": "tracker tensorboard failed: [Errno 28] No space left on device",
}
"""what the tracker does -> how the event that says so begins"""


def bad_followers(scope: Scope) -> DrillOutcome:
    """R25"""
    wanted = [how for how in _NAMED if how == "hangs" or not scope.quick]
    told = call_on_ranks(scope, 2, follow_badly, scope.workshop, str(scope.path / "runs"), wanted)
    cases = [DrillCase(f"tracker that {how}", next(filter(None, found), "")) for how, *found in zip(wanted, *told, strict=True)]
    return outcome_of(cases, "each is named once, all steps are recorded, and the last checkpoint is bitwise that of a run without")


def follow_badly(ranks: Ranks, workshop: str, output: str, wanted: list[str]) -> list[str]:
    """What is wrong on this rank with a run whose tracker goes wrong at its second step, for each case."""
    tracker_threads.PATIENCE = 0.5
    train(_config(workshop, f"{output}/alone"), ranks)
    problems = []
    for how in wanted:
        folder = Path(output, how)
        follower = _Follower(_full_disk if how == "raises" else threading.Event().wait)
        run_report.ADAPTERS = {"tensorboard": _opens(follower)}
        ended = train(_config(workshop, folder, "report_to=[tensorboard]"), ranks)
        ranks.barrier()  # the first rank has waited for what follows the run, and has written last
        problems.append(_problem(folder, Path(output, "alone"), _NAMED[how]) if ended else "the run did not come to its end")
    return problems


def _opens(follower: _Follower) -> Callable[[TrackedRun], Tracker]:
    return lambda _run: follower


class _Follower:
    """A tracker for which something is done when it is told of the second step."""

    run_id = None

    def __init__(self, second: Callable[[], object]) -> None:
        self._second = second

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        if step == 2:
            self._second()

    def close(self) -> None:
        pass


def _problem(folder: Path, alone: Path, named: str) -> str:
    if digests(folder / f"checkpoint-{_STEPS}") != digests(alone / f"checkpoint-{_STEPS}"):
        return "the checkpoint is another one"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if (steps := [one["step"] for one in records if one["kind"] == "step"]) != [1, 2, 3]:
        return f"metrics.jsonl has steps {steps}"
    said = [one["text"] for one in records if one["kind"] == "event"]
    return "" if sum(text.startswith(named) for text in said) == 1 else f"it is not named once: {said}"


def _full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _config(workshop: str, output: Path | str, *overrides: str) -> Config:
    return tiny_config(workshop, output, f"max_steps={_STEPS}", *overrides)
