"""A rank that fails, wherever that is, ends the run on all ranks, and the user reads which rank it was and with what it failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args
from unittest import mock

import pytest
import torch.distributed as dist

from hecate import faults
from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.outcome import Scope
from hecate.apps.check.drill.ranks import begin_run
from hecate.apps.check.drill.run import DrillFolder, drill_folder
from hecate.config import load_config
from hecate.ranks.launcher_files import ERRORS_VARIABLE, STORE_VARIABLE, failure_of
from hecate.ranks.ranks import join_ranks, loss_in_words, lost_a_peer
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import settings_of

SETTINGS = (
    "max_steps=3",
    "save_steps=1",
    "eval_steps=1",
    "eval.on_start=false",
    "data.eval={workshop}/up.eval.jsonl",
    "fssdp.reshard_interval=1",
    "fssdp.redundancy=1",
)
"""with which each step comes to all places"""

NOT_OF_A_STEP = {
    "begin",  # no rank waits for another yet
    "loaded",
    "lost",  # these three come where a launcher lets ranks go on (tests/hecate/elastic)
    "regrouped",
    "move",  # only where a re-shard finds something to move (tests/hecate/elastic/test_losing_in_a_reshard.py)
    "file",  # only where a drill watches the disk (R5, R7)
}
FAULTS = tuple(place for place in get_args(faults.Place) if place not in NOT_OF_A_STEP)
CALLS = {
    "planning": "hecate.engine.step_plans.StepPlans.begin",
    "gather": "hecate.parallel.comm.expert_store.ExpertStore.replicas",
    "dispatch": "hecate.engine.shards.dispatch",
    "combine": "hecate.engine.shards.combine",
    "reduction": "hecate.parallel.comm.expert_store.ExpertStore.reduce",
    "writing": "hecate.checkpoint.save_run.write_shard",
}
"""parts of a run without a place of their own, by what does them"""


@contextmanager
def failing(place: str) -> Iterator[None]:
    """Have this process fail when it comes to a place, or calls a function, for the second time; in what comes once, for the first."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == (1 if place in ("output", "writing") else 2):
            raise ArithmeticError(f"in {place}")

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            count()
            return real(*given, **named)

        return call

    if place in CALLS:
        with mock.patch(CALLS[place], counted(resolve_name(CALLS[place]))):
            yield
    else:
        faults.arm(lambda at, _subject: count() if at == place else None)
        try:
            yield
        finally:
            faults.arm(None)


def fail_at(rank: int, world: int, workshop: str, places: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """In a run for each place, in which one rank fails there: the error of this rank, and what both have left for their launcher."""
    dist.destroy_process_group()
    found = []
    for number, place in enumerate(places):
        folder = Path(workshop, f"launcher-{place}")
        folder.mkdir(exist_ok=True)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), STORE_VARIABLE: str(folder / "store"), ERRORS_VARIABLE: str(folder)}
        config = load_config(f"{workshop}/config.yaml", settings_of(workshop, place, SETTINGS), claim_output=False)
        said = "it did not fail"
        try:
            with failing(place if rank == number % world else ""), join_ranks() as ranks:
                train(config, ranks)
        except Exception as error:  # noqa: BLE001 - it is the result
            said = loss_in_words(error) if lost_a_peer(error) else f"{type(error).__name__}: {error}"
        found.append((place, said, failure_of(folder, rank)))
    return found


@pytest.mark.parametrize(
    "places",
    [("planning", "dispatch", "backward", "writing"), pytest.param((*FAULTS, *CALLS), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_rank_that_fails_at_any_place_ends_the_run_and_leaves_its_reason(tmp_path: Path, places: tuple[str, ...]) -> None:
    """The other one fails at once, with the loss of its peer, which it leaves as no reason; or it says what it was told of the peer."""
    results = run_ranks(2, fail_at, str(make_workshop(tmp_path)), places, timeout=300)
    for number, (place, *ends) in enumerate(zip(places, *results, strict=True)):
        reason = f"ArithmeticError: in {place}"
        assert ends[number % 2] == (place, reason, reason)
        _, said, left = ends[1 - number % 2]
        told = place == "writing" and said.endswith(f"rank {number % 2} could not write its part: {reason}")
        assert told or said == "another rank closed its connection", (place, said)
        assert left == ""


@pytest.fixture(scope="module")
def made() -> Iterator[DrillFolder]:
    with drill_folder() as it:
        yield it


@pytest.mark.slow
@pytest.mark.parametrize("survives", [False, True])
def test_the_user_reads_which_rank_has_failed_and_why(made: DrillFolder, tmp_path: Path, survives: bool) -> None:
    """Under the local launcher. With a copy of each expert the other rank goes on, though the failing process has not been killed."""
    scope = Scope(str(tmp_path), str(made.workshop), quick=True, start=made.start)
    run = begin_run(scope, "failing", 2, injected=[Injected(action="fail", place="experts", rank=1, step=1, value=5)], survives=survives)
    ended = run.end(120)
    reason = "failed with OSError: [Errno 5] Input/output error"
    lines = [line for line in ended.log.splitlines() if "rank 1" in line and not line.startswith("[rank1]")]
    if survives:
        assert ended.status == 0, ended.log
        assert f"hecate: rank 1 {reason}; 1 ranks go on" in lines
    else:
        assert ended.status == 1, ended.log
        end = "the run is stopped; resume=true goes on from its last checkpoint, if any"
        assert ended.last_line == f"hecate: rank 1 of 2 {reason}; {end}"
        assert "hecate: rank 0 stops because it lost another rank: another rank closed its connection" in ended.log
