"""Who follows a run from outside and goes wrong: R25."""

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
from hecate.elastic import observer_thread
from hecate.elastic.observer import BeginFacts, StepFacts
from hecate.ranks.ranks import Ranks
from hecate.report import run_report
from hecate.report.tracking import tracker_threads
from hecate.report.tracking.trackers import TrackedRun, Tracker
from hecate.train.loop import train

_STEPS = 3
_NAMED = {
    ("observer", "hangs"): "the run ends without its observer, which has not returned",
    ("observer", "raises"): "the run's observer failed: [Errno 28] No space left on device",
    ("tracker", "hangs"): "tracker tensorboard has not",
    ("tracker", "raises"): "tracker tensorboard failed: [Errno 28] No space left on device",
}
"""who does what -> how the event that says so begins"""


def bad_followers(scope: Scope) -> DrillOutcome:
    """R25"""
    wanted = [[who, how] for who, how in _NAMED if how == "hangs" or not scope.quick]
    told = call_on_ranks(scope, 2, follow_badly, scope.workshop, str(scope.path / "runs"), wanted)
    cases = [DrillCase(f"{who} that {how}", next(filter(None, found), "")) for (who, how), *found in zip(wanted, *told, strict=True)]
    return outcome_of(cases, "each is named once, all steps are recorded, and the last checkpoint is bitwise that of a run without")


def follow_badly(ranks: Ranks, workshop: str, output: str, wanted: list[list[str]]) -> list[str]:
    """What is wrong on this rank with a run whose observer or tracker goes wrong at its second step, for each case."""
    tracker_threads.PATIENCE = observer_thread.LAST_SECONDS = 0.5
    train(_config(workshop, f"{output}/alone"), ranks)
    problems = []
    for who, how in wanted:
        folder = Path(output, f"{who}-{how}")
        follower = _Follower(_full_disk if how == "raises" else threading.Event().wait)
        run_report.ADAPTERS = {"tensorboard": _opens(follower)}
        ended = train(
            _config(workshop, folder, *(["report_to=[tensorboard]"] if who == "tracker" else [])),
            ranks,
            observer=follower if who == "observer" else None,
        )
        ranks.barrier()  # the first rank has waited for what follows the run, and has written last
        problems.append(_problem(folder, Path(output, "alone"), _NAMED[who, how]) if ended else "the run did not come to its end")
    return problems


def _opens(follower: _Follower) -> Callable[[TrackedRun], Tracker]:
    return lambda _run: follower


class _Follower:
    """An observer and a tracker, for which something is done when it is told of the second step."""

    run_id = None

    def __init__(self, second: Callable[[], object]) -> None:
        self._second = second

    def begins(self, facts: BeginFacts) -> None:
        pass

    def stepped(self, facts: StepFacts) -> None:
        if facts.step == 2:
            self._second()

    def saved(self, step: int, path: Path) -> None:
        pass

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
