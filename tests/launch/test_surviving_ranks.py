"""Which ranks go on together after a loss, and which are started."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hecate.launch.membership.job_policy import JobPolicy, Limits
from hecate.launch.membership.job_states import State
from hecate.launch.rank_command import Beginning, cause_of
from hecate.launch.surviving_ranks import SurvivingRanks
from hecate.ranks.launcher_files import LOST_PEER_EXIT, Generation, arrival_file, error_file, read_generation, ready_file
from tests.launch.stand_ins import StandIn, StandInMachines

AT_ONCE = Limits(end=0.0, cause=0.0)
"""wait for nobody to end by himself"""


class Run:
    """A run of stand-ins."""

    def __init__(self, folder: Path, ranks: int, *, loaded: bool = True, **rules: Any) -> None:
        self.machines, self.store = StandInMachines(ranks), folder / "store"
        policy = JobPolicy(**{"copied": True, "fewest_to_begin": ranks, **rules})
        self.ranks = SurvivingRanks(self.machines, self.store, policy)
        if loaded:
            self.load(*range(ranks))
            self.ranks.look()

    def load(self, *members: int) -> None:
        for member in members:
            ready_file(self.store, member).touch()

    def process(self, member: int) -> StandIn:
        found = self.ranks.processes[member]
        assert isinstance(found, StandIn)
        return found

    def end(self, member: int, status: int = -signal.SIGKILL) -> None:
        self.process(member).returncode = status

    @property
    def failed(self) -> int | None:
        """The member whose end has failed the run."""
        device = self.ranks.state.failed
        return None if device is None else self.ranks.member_on[device]

    @property
    def waits(self) -> bool:
        return self.ranks.state.phase is State.WAITING

    def members(self) -> tuple[int, ...]:
        """Those that the ranks read of."""
        self.ranks.look()
        assert self.ranks.members == read_generation(self.store).members
        return self.ranks.members


def test_the_living_go_on_and_a_new_member_joins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, 3)
    assert run.machines.started == [(rank, rank, Beginning(rank, 3, 0)) for rank in range(3)]
    run.end(1)
    assert run.members() == (0, 2)
    assert capsys.readouterr().err == "hecate: rank 1 was killed by SIGKILL; 2 ranks go on\n"
    assert run.machines.started[3:] == [(3, 1, None)]
    assert run.members() == (0, 2), "it has not loaded"
    run.load(3)
    assert run.members() == (0, 2, 3)
    assert read_generation(run.store) == Generation(2, (0, 2, 3), (0, 2, 1))


@pytest.mark.parametrize(("ends", "members", "status"), [("before", (0,), None), ("at once", (0,), -9), ("together", (0, 2), None)])
def test_a_rank_that_would_join_when_all_steps_are_done_is_not_waited_for(
    tmp_path: Path, ends: str, members: tuple[int, ...], status: int | None
) -> None:
    """The last rank ends before the new one is ready, before it could read that it is, or after both have gone on together."""
    run = Run(tmp_path, 2)
    run.end(1)
    run.ranks.look()
    arrival_file(run.store, 1, 0).touch()
    if ends == "before":
        run.end(0, 0)
    run.load(2)
    run.ranks.look()
    assert read_generation(run.store).members == ((0,) if ends == "before" else (0, 2))
    for member in (0, 2) if ends == "together" else (2,):
        arrival_file(run.store, 2, member).touch()
    run.end(0, 0)
    run.ranks.look()
    assert run.ranks.members == members
    assert run.process(2).returncode == status


def test_a_loss_before_all_have_loaded_starts_all_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks that load wait for each other, and none of them could go on."""
    run = Run(tmp_path, 3, limits=AT_ONCE, loaded=False)
    run.load(0, 1)
    run.end(2, 137)
    assert run.members() == (3, 4, 5)
    assert "rank 2 ended with status 137 before the run had begun; all ranks start again" in capsys.readouterr().err
    assert run.machines.started[3:] == [(3 + rank, rank, Beginning(rank, 3, 1)) for rank in range(3)]
    assert [run.process(member).returncode for member in (0, 1)] == [-signal.SIGKILL] * 2
    assert run.ranks.printing == 3
    run.load(3, 4, 5)
    run.end(4)
    assert run.members() == (3, 5)
    run.end(3, 0)
    run.end(5, 0)
    run.ranks.look()
    assert run.failed is None


def test_a_member_that_was_to_join_is_ended_when_all_start_again(tmp_path: Path) -> None:
    """As of a node that has come while the others load: its device is used by the run that begins again."""
    run = Run(tmp_path, 2, limits=AT_ONCE, loaded=False)
    run.machines.new = {2}
    assert run.members() == (0, 1)
    assert run.machines.started[2:] == [(2, 2, None)]
    run.end(1)
    assert run.members() == (3, 4, 5)
    assert run.process(2).returncode == -signal.SIGKILL
    assert run.machines.started[3:] == [(3 + rank, rank, Beginning(rank, 3, 1)) for rank in range(3)]


def test_all_that_are_lost_at_once_start_again_as_well(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, loaded=False)
    run.end(0, 1)
    run.end(1, 1)
    assert run.members() == (2, 3)


def test_a_run_begins_again_when_enough_machines_are_there(tmp_path: Path) -> None:
    run = Run(tmp_path, 6, limits=AT_ONCE, loaded=False, fewest_to_begin=4)
    run.machines.gone = {2, 3, 4}
    run.end(2)
    run.ranks.look()
    assert run.waits
    assert len(run.machines.started) == 6
    run.ranks.look()
    run.machines.gone = {2, 3}
    assert run.members() == (6, 7, 8, 9)
    devices = (0, 1, 4, 5)
    assert run.machines.started[6:] == [(6 + rank, device, Beginning(rank, 4, 1)) for rank, device in enumerate(devices)]
    assert read_generation(run.store).devices == devices
    assert not run.waits


@pytest.mark.parametrize("why", ["nobody comes", "a signal"])
def test_a_run_waits_for_machines_for_a_while(tmp_path: Path, why: str) -> None:
    limits = replace(AT_ONCE, wait=0.01 if why == "nobody comes" else 60.0)
    run = Run(tmp_path, 2, limits=limits, loaded=False)
    run.machines.gone = {1}
    run.end(1)
    run.ranks.look()
    run.ranks.stopping = why == "a signal"
    time.sleep(0.02)
    run.ranks.look()
    assert run.ranks.over
    assert run.ranks.state.phase is (State.STOPPED if why == "a signal" else State.FAILED)
    ending = run.ranks.state.ending
    assert ending is None or ending.text == "1 devices are left, 2 are needed, and none returned in time"


def test_a_signal_that_comes_while_ranks_are_started_reaches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, 2, limits=AT_ONCE, loaded=False)
    start = run.machines.start

    def signalled(*given: Any) -> StandIn:
        run.ranks.stopping = True
        return start(*given)

    monkeypatch.setattr(run.machines, "start", signalled)
    run.end(1)
    run.ranks.look()
    assert [run.process(member).returncode for member in (2, 3)] == [-signal.SIGTERM] * 2


def test_a_machine_that_goes_while_ranks_are_started_is_done_without(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, limits=AT_ONCE, loaded=False, fewest_to_begin=1)
    start = run.machines.start

    def start_and_go(member: int, device: int, begins: Beginning | None) -> StandIn:
        run.machines.gone = {1}  # meanwhile
        return start(member, device, begins)

    run.machines.start = start_and_go  # type: ignore[method-assign]
    run.end(0)
    assert run.members() == (4,)
    assert run.machines.started[2:] == [(2, 0, Beginning(0, 2, 1)), (3, 1, Beginning(1, 2, 1)), (4, 0, Beginning(0, 1, 2))]


def test_a_run_that_does_not_begin_ends_after_some_attempts(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, limits=AT_ONCE, loaded=False, most=1)
    run.end(1)
    assert run.members() == (2, 3)
    run.end(3)
    run.ranks.look()
    assert run.failed == 3
    assert run.process(2).returncode == -signal.SIGKILL
    assert len(run.machines.started) == 4


def test_ranks_that_cannot_go_on_all_start_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, 3, limits=AT_ONCE, copied=False, most=1)
    run.end(0, LOST_PEER_EXIT)
    run.end(1)
    assert run.members() == (3, 4, 5)
    assert run.process(2).returncode == -signal.SIGKILL
    assert run.machines.started[3:] == [(member, rank, Beginning(rank, 3, 1)) for rank, member in enumerate((3, 4, 5))]
    said = "hecate: rank 1 was killed by SIGKILL; all ranks start again from the last checkpoint\n"
    assert capsys.readouterr().err == said, "rank 0 has only lost it"
    run.end(5, 1)
    run.ranks.look()
    assert run.failed == 5
    assert len(run.machines.started) == 6


def test_ranks_that_cannot_go_on_start_again_without_a_lost_machine_and_with_one_that_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, 2, limits=AT_ONCE, copied=False, fewest_to_begin=1)
    run.machines.gone = {1}
    run.end(1)
    assert run.members() == (2,)
    assert run.machines.started[2:] == [(2, 0, Beginning(0, 1, 1))]
    run.machines.gone, run.machines.new = set(), {1}
    run.process(2).saves = True
    assert run.members() == (3, 4)
    assert run.process(2).returncode == 0, "it has saved"
    assert capsys.readouterr().err.splitlines()[1] == "hecate: a node has joined; all ranks save, and start again with it"
    for member in (3, 4):
        run.end(member, 0)
    assert run.members() == (3, 4), "the run has ended"
    assert not run.waits


def test_ranks_that_cannot_go_on_wait_for_a_machine_without_which_there_are_too_few(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, limits=AT_ONCE, copied=False)
    run.machines.gone = {1}
    run.end(1)
    run.ranks.look()
    assert run.waits
    run.machines.gone = set()
    assert run.members() == (2, 3)
    assert not run.waits


def test_a_mistake_that_is_said_a_moment_later_is_not_tried_again(tmp_path: Path) -> None:
    """The others have lost the rank that has met it, and end before it does."""
    run = Run(tmp_path, 3, loaded=False)
    run.end(0, 1)
    assert run.members() == (0, 1, 2)
    run.end(1, 1)
    run.ranks.look()
    assert run.process(2).returncode is None, "it is about to"
    run.end(2, 2)
    run.ranks.look()
    assert len(run.machines.started) == 3


def test_a_mistake_that_is_said_while_the_others_are_ended_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, 2, limits=AT_ONCE, loaded=False)
    monkeypatch.setattr(run.process(1), "kill", lambda: run.end(1, 2))
    run.end(0, 1)
    run.ranks.look()
    assert run.failed == 1
    assert len(run.machines.started) == 2


def test_a_rank_that_lost_the_others_in_their_last_message_is_not_waited_for(tmp_path: Path) -> None:
    """Rank 1 dies, rank 2 notices, and rank 0 has already had its answer and ends."""
    run = Run(tmp_path, 3)
    run.end(1)
    assert run.members() == (0, 2)
    arrival_file(run.store, 1, 2).touch()
    run.end(0, 0)
    run.ranks.look()
    assert run.ranks.members == (0,)
    assert run.process(2).returncode == -signal.SIGKILL


def test_a_mistake_ends_the_run_although_another_rank_was_lost_by_it(tmp_path: Path) -> None:
    run = Run(tmp_path, 4, tp_size=2)
    run.end(2, 2)
    run.end(3, 1)
    assert run.members() == (0, 1, 2, 3)
    assert run.process(0).returncode is None, "it may say more of the mistake"


def test_when_a_rank_has_ended_the_run_is_done(tmp_path: Path) -> None:
    """All ranks have left the last collective; nobody waits for those that are left in the next group."""
    run = Run(tmp_path, 3)
    run.end(0, 0)
    run.end(1)
    assert run.members() == (0, 1, 2)


def test_a_device_has_one_member(tmp_path: Path) -> None:
    """A node that has come in the place of a lost one may be offered before the loss is seen."""
    run = Run(tmp_path, 3)
    run.machines.new = {2, 5}
    run.ranks.look()
    run.machines.new = {5}
    run.ranks.look()
    assert [(member, device) for member, device, _ in run.machines.started[3:]] == [(3, 5)]


def test_the_mistake_of_a_rank_that_was_to_join_is_shown_and_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, 2)
    run.end(1)
    run.ranks.look()
    error_file(tmp_path, 2).write_text("hecate: no such model", encoding="utf-8")
    run.end(2, 2)
    assert run.members() == (0,)
    assert "a rank that was to join the run ended with status 2\nhecate: no such model\n" in capsys.readouterr().err
    assert len(run.machines.started) == 3


@pytest.mark.parametrize(("status", "words"), [(7, "ended with status 7"), (-9, "was killed by SIGKILL"), (-35, "was killed by signal 35")])
def test_how_a_process_ended(status: int, words: str) -> None:
    assert cause_of(status) == words


def test_what_a_rank_has_said_outweighs_its_status() -> None:
    assert cause_of(-9, "OSError: no such device") == "failed with OSError: no such device"
    assert cause_of(LOST_PEER_EXIT) == "stopped because it lost another rank"
