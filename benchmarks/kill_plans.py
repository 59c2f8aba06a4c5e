"""Where `benchmarks.kill_points` kills: plans that follow from a seed and their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.launchers import Launcher
from hecate.apps.check.drill.tiny_run import STEPS
from hecate.faults import Place

SEED, RANKS, DEATHS = 20, 4, 3
"""of a run; after the third death of four ranks the last one goes on alone"""
CALLS: dict[Place, int] = {
    "step": 1,
    "forward": 2,
    "router": 4,
    "experts": 4,
    "loss": 2,
    "backward": 2,
    "reduce": 1,
    "gradients": 1,
    "norm": 1,
    "optimizer": 1,
    "stepped": 1,
    "trained": 1,
    "save": 1,
    "file": 15,
}
"""place -> how often a rank comes by it in a step, so that each call may be the one"""
CONNECTS = 4
"""how often a rank comes by "connect" while it connects to those that are left"""
_WRITES, _COMMIT = 85, 150
"""operations on files: after so many the first rank has written its tensors; after so many, or some fewer, it has also committed and
deleted an old checkpoint. It writes more where it has taken over experts"""
_FILES = 0.3
"""share of points at operations on files"""
_OTHERS_FROM = 18
"""the number of the first run that is not under the local launcher"""


@dataclass(frozen=True)
class KillPlan:
    """One run's kills."""

    number: int
    launcher: Launcher
    beside: bool
    """whether it saves beside the steps"""
    deaths: tuple[Injected, ...]

    def named(self, rank: int, step: int) -> str:
        """The place and the call at which a rank dies in a step."""
        return next((f"{one.place} {one.call}" for one in self.deaths if (one.rank, one.step) == (rank, step)), "?")


def plan_of(number: int) -> KillPlan:
    """The plan with this number, the same in every call.

    Three different ranks die in different steps, and the last one stays. Without backups all ranks start again after each death, so that
    any may die again; the deaths are in later steps than the first checkpoint's.

    No run that saves beside the steps has a death in its first save and one in the step beside it: two ranks lost at once are more than one
    backup is for, and no checkpoint is there to go back to.
    """
    random = np.random.default_rng([SEED, number])
    launcher = _launcher_of(number)
    stays = goes_on(launcher)
    first = 0 if stays else 1
    steps = sorted(first + random.choice(STEPS - first, DEATHS, replace=False))
    ranks = random.choice(RANKS, DEATHS, replace=not stays)
    deaths: list[Injected] = []
    for rank, step in zip(map(int, ranks), map(int, steps), strict=True):
        left = set(range(RANKS)) - ({one.rank for one in deaths} if stays else set())
        deaths.append(_death(random, rank, step, commits=rank == min(left)))
    beside = stays and bool(random.random() < 0.5)
    if in_a_row(number):
        deaths = _in_a_row(random, deaths)
    return KillPlan(number, launcher, beside and not _in_first_save_and_after(deaths), tuple(deaths))


def in_a_row(number: int) -> bool:
    """Whether a run loses its second rank while the others connect after the first loss."""
    return number >= _OTHERS_FROM and number % 10 in (3, 6)


def _in_a_row(random: np.random.Generator, deaths: Sequence[Injected]) -> list[Injected]:
    """The same deaths, of which the second comes while the ranks that are left connect; half of the runs then lose a third one.

    The second rank is no neighbour of the first: with one backup two neighbours at once are too many.
    """
    first, _, third = deaths
    second = (first.rank or 0) + RANKS // 2
    others = [rank for rank in range(RANKS) if rank not in (first.rank, second % RANKS)]
    found = [first, Injected(action="kill", place="connect", rank=second % RANKS, step=first.step, call=1 + int(random.integers(CONNECTS)))]
    if third.step != first.step and random.random() < 0.5:
        found.append(Injected(action="kill", place=third.place, rank=others[0], step=third.step, call=min(third.call, CALLS[third.place])))
    return found


def _in_first_save_and_after(deaths: Sequence[Injected]) -> bool:
    first, second, *_ = deaths
    return first.place in ("save", "file") and (first.step, second.step) == (0, 1)


def _launcher_of(number: int) -> Launcher:
    """Of ten runs one is on Ray, one under `hecate launch`, one there without backups, both in turn on one node and on two."""
    if number < _OTHERS_FROM or number % 10 < 7:
        return "local"
    if number % 10 == 8:
        return "ray"
    if number % 10 == 7:
        return "node" if number // 10 % 2 else "two_nodes"
    return "node_again" if number // 10 % 2 else "two_nodes_again"


def goes_on(launcher: str) -> bool:
    """Whether ranks go on after a loss under a launcher. Without backups all start again."""
    return launcher not in ("node_again", "two_nodes_again")


def _death(random: np.random.Generator, rank: int, step: int, *, commits: bool) -> Injected:
    others = [place for place in CALLS if place != "file"]
    place: Place = "file" if random.random() < _FILES else others[random.integers(len(others))]
    if place == "file" and commits:
        call = 1 + int(random.integers(_WRITES) if random.random() < 0.3 else random.integers(_WRITES, _COMMIT))
    else:
        call = 1 + int(random.integers(CALLS[place]))
    return Injected(action="kill", place=place, rank=rank, step=step, call=call)
