"""Generations of ranks as values: who is at work, how it ends, and who trains together next."""

from __future__ import annotations

import pytest

from hecate.launch.policy.job_generation import JobGeneration, RankEnd

FIRST = JobGeneration(0, (0, 2, 3))


def with_ends(**ends: RankEnd) -> JobGeneration:
    generation = FIRST
    for name, end in ends.items():
        generation = generation.with_end(int(name[1:]), end)
    return generation


def test_before_the_first_generation_whoever_lives_may_begin() -> None:
    none = JobGeneration()
    assert (none.has_begun, none.all_ended, none.all_finished) == (False, False, False)
    assert none.may_go_on(5, set())
    assert none.following([0, 2, 3], set(), described=True, recoverable=False) == (FIRST, False)


def test_a_change_gives_a_new_value() -> None:
    later = FIRST.with_end(2, RankEnd.FAILED, "boom")
    assert (FIRST.at_work, later.at_work, later.errors) == ([0, 2, 3], [0, 3], ("boom",))
    assert (later.rank_of(3), later.rank_of(1)) == (2, None)


def test_training_is_done_when_every_rank_has_finished() -> None:
    assert with_ends(d0=RankEnd.FINISHED, d2=RankEnd.FINISHED, d3=RankEnd.FINISHED).all_finished
    mixed = with_ends(d0=RankEnd.FINISHED, d2=RankEnd.FINISHED, d3=RankEnd.LOST)
    assert (mixed.all_ended, mixed.all_finished, mixed.loss_answered) == (True, False, True)


@pytest.mark.parametrize(("described", "recoverable", "warm"), [(True, True, True), (False, True, False), (True, False, False)])
def test_after_a_loss_waiting_ranks_and_prepared_workers_begin_warm_if_the_lost_state_can_be_had(
    described: bool, recoverable: bool, warm: bool
) -> None:
    generation = with_ends(d0=RankEnd.WAITING, d2=RankEnd.LOST, d3=RankEnd.WAITING)
    prepared = {1}
    ready = [device for device in range(4) if generation.may_go_on(device, prepared)]
    assert ready == [0, 1, 3]
    following = generation.following(ready, prepared, described=described, recoverable=recoverable)
    assert following == (JobGeneration(1, (0, 1, 3)), warm)


def test_ranks_that_all_wait_need_no_copies() -> None:
    generation = with_ends(d0=RankEnd.WAITING, d2=RankEnd.WAITING, d3=RankEnd.WAITING)
    assert generation.following([0, 2, 3], set(), described=True, recoverable=False) == (JobGeneration(1, (0, 2, 3)), True)


def test_a_warm_generation_leaves_out_ranks_whose_training_has_raised_an_error() -> None:
    generation = with_ends(d0=RankEnd.WAITING, d2=RankEnd.FAILED, d3=RankEnd.WAITING)
    assert generation.may_go_on(2, set())
    assert generation.following([0, 2, 3], set(), described=True, recoverable=True) == (JobGeneration(1, (0, 3)), True)
    all_again = generation.following([0, 2, 3], set(), described=True, recoverable=True, fewest=3)
    assert all_again == (JobGeneration(1, (0, 2, 3)), False), "two would be too few"
