"""Which ranks go on together after a loss, and which are started."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hecate.launch.rank_command import Beginning, cause_of
from hecate.launch.surviving_ranks import SurvivingRanks
from hecate.ranks.launcher_files import Generation, error_file, here_file, read_generation, ready_file
from tests.launch.stand_ins import StandIn, StandInMachines


class Run:
    """A run of stand-ins."""

    def __init__(self, folder: Path, ranks: int, *, loaded: bool = True, together: int = 1, most_replaced: int = 3) -> None:
        self.machines, self.store = StandInMachines(), folder / "store"
        self.ranks = SurvivingRanks(self.machines, ranks, self.store, together, most_replaced)
        if loaded:
            self.load(*range(ranks))

    def load(self, *members: int) -> None:
        for member in members:
            ready_file(self.store, member).touch()

    def process(self, member: int) -> StandIn:
        found = self.ranks.processes[member]
        assert isinstance(found, StandIn)
        return found

    def end(self, member: int, status: int = -signal.SIGKILL) -> None:
        self.process(member).returncode = status

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
    assert read_generation(run.store) == Generation(2, (0, 2, 3), (0, 2, 1), 3)


@pytest.mark.parametrize(("ends", "members", "status"), [("before", (0,), None), ("at once", (0,), -9), ("together", (0, 2), None)])
def test_a_rank_that_would_join_when_all_steps_are_done_is_not_waited_for(
    tmp_path: Path, ends: str, members: tuple[int, ...], status: int | None
) -> None:
    """The last rank ends before the new one is ready, before it could read that it is, or after both have gone on together."""
    run = Run(tmp_path, 2)
    run.end(1)
    run.ranks.look()
    here_file(run.store, 1, 0).touch()
    if ends == "before":
        run.end(0, 0)
    run.load(2)
    run.ranks.look()
    assert read_generation(run.store).members == ((0,) if ends == "before" else (0, 2))
    for member in (0, 2) if ends == "together" else (2,):
        here_file(run.store, 2, member).touch()
    run.end(0, 0)
    run.ranks.look()
    assert run.ranks.members == members
    assert run.process(2).returncode == status


def test_a_loss_before_all_have_loaded_starts_all_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks that load wait for each other, and none of them could go on."""
    run = Run(tmp_path, 3, loaded=False)
    run.load(0, 1)
    run.end(2, 137)
    assert run.members() == (3, 4, 5)
    assert "rank 2 ended with status 137 before the run had begun; all 3 ranks start again" in capsys.readouterr().err
    assert run.machines.started[3:] == [(3 + rank, rank, Beginning(rank, 3, 1)) for rank in range(3)]
    assert [run.process(member).returncode for member in (0, 1)] == [-signal.SIGKILL] * 2
    run.load(3, 4, 5)
    run.end(4)
    assert run.members() == (3, 5)
    run.end(3, 0)
    run.end(5, 0)
    run.ranks.look()
    assert run.ranks.failed is None


def test_a_run_begins_on_the_devices_that_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, 6, loaded=False, together=2)
    run.machines.gone = {2, 3}
    run.end(2)
    run.end(3)
    assert run.members() == (6, 7, 8, 9)
    assert run.machines.started[6:] == [
        (6, 0, Beginning(0, 4, 1)),
        (7, 1, Beginning(1, 4, 1)),
        (8, 4, Beginning(2, 4, 1)),
        (9, 5, Beginning(3, 4, 1)),
    ]
    assert read_generation(run.store).devices == (0, 1, 4, 5)
    assert "all 4 ranks start again" in capsys.readouterr().err


def test_a_machine_that_goes_while_ranks_are_started_is_done_without(tmp_path: Path) -> None:
    machines = StandInMachines()
    machines.gone = {1}
    ranks = SurvivingRanks(machines, 2, tmp_path / "store")
    ranks.look()
    assert machines.started == [(0, 0, Beginning(0, 2, 0)), (1, 1, Beginning(1, 2, 0)), (1, 0, Beginning(0, 1, 1))]


def test_a_run_that_does_not_begin_ends_after_some_attempts(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, loaded=False, most_replaced=1)
    run.end(1)
    assert run.members() == (2, 3)
    run.end(3)
    run.ranks.look()
    assert run.ranks.failed == 3
    assert run.process(2).returncode == -signal.SIGKILL
    assert len(run.machines.started) == 4


def test_a_mistake_ends_the_run_although_another_rank_was_lost_by_it(tmp_path: Path) -> None:
    run = Run(tmp_path, 4, together=2)
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
    run.machines.new = [2, 5]
    run.ranks.look()
    run.machines.new = [5]
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


@pytest.mark.parametrize(("status", "words"), [(3, "ended with status 3"), (-9, "was killed by SIGKILL"), (-35, "was killed by signal 35")])
def test_how_a_process_ended(status: int, words: str) -> None:
    assert cause_of(status) == words
