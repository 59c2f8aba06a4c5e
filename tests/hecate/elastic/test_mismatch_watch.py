"""A rank that does another collective than the others is named with both (`hecate.elastic.mismatch_watch`)."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hecate.elastic import mismatch_watch
from hecate.elastic.mismatch_watch import MismatchWatch, calls_of, crossing_of, difference_of, next_look, still_seconds
from hecate.errors import UserError
from hecate.ranks.ranks import connect
from testing.ranks import run_ranks


def entry(
    number: int, name: str, sizes: list[list[int]], group: str = "0", at: int = 10, kinds: tuple[str, ...] = ("Float",)
) -> dict[str, Any]:
    return {
        "collective_seq_id": number, "profiling_name": f"gloo:{name}", "input_sizes": sizes, "input_dtypes": list(kinds),
        "process_group": [group, "undefined"], "is_p2p": False, "time_created_ns": at,
    }  # fmt: skip


def test_what_must_be_the_same_on_all_ranks_is_read_from_the_record_of_torch() -> None:
    entries = [
        entry(1, "all_reduce", [[3]], at=9),
        entry(2, "all_reduce", [[4, 2]]),
        entry(3, "all_to_all", [[7]]),
        entry(1, "barrier", [], group="2", kinds=()),
        {**entry(1, "send", [[1]]), "is_p2p": True},
    ]
    found = calls_of(json.dumps({"entries": entries}).encode(), since_ns=10)
    assert found == {"0": {"2": "all_reduce of Float [4, 2]", "3": "all_to_all of Float"}, "2": {"1": "barrier"}}
    assert calls_of(b"{}", 0) == {}, "the recorder is off"


def test_the_first_difference_is_named_and_being_behind_is_none() -> None:
    sums, stray = {"8": "a", "9": "b", "10": "c"}, {"8": "a", "9": "x", "10": "y"}
    assert difference_of({0: {"1": sums}, 1: {"1": {"8": "a"}}, 2: {"3": {"8": "z"}}}) is None
    found = difference_of({0: {"1": sums}, 1: {"1": stray}, 2: {"1": sums}})
    assert found == "collective 9 of group 1: rank 1 is in x; ranks 0, 2 are in b"


def test_ranks_that_wait_in_different_groups_are_named_and_those_that_are_behind_are_not() -> None:
    calls = {rank: {"0": {"4": "barrier", "5": "sum"}, "1": {"2": "gather"}} for rank in range(3)}
    even = {"0": 4, "1": 2}
    assert crossing_of(calls, {0: even, 1: {"0": 5, "1": 2}, 2: {"0": 5, "1": 3}}) is None
    found = crossing_of(calls, {0: even, 1: {"0": 5, "1": 1}, 2: even})
    assert found == "in different groups: rank 1 is in sum of group 0; ranks 0, 2 are in gather of group 1"
    assert crossing_of(calls, {0: {"0": 4, "1": 3}, 1: {"0": 5, "2": 1}}) is None, "they have one group in common"


def test_ranks_that_wait_for_half_an_hour_look_at_the_store_rarely() -> None:
    looks, now = [], 100.6
    while now < 1900:
        looks.append(now)
        now += 0.2  # the thread's own pace
        while now <= next_look(100, looks[-1]):
            now += 0.2
    assert len([look for look in looks if look < 102]) >= 5, "a few times a second at first"
    assert max(after - before for before, after in pairwise(looks)) < 1800 / 5
    assert len(looks) < 50


def test_a_run_whose_ranks_often_stand_still_leaves_few_records() -> None:
    assert still_seconds(0) < 1
    records = 0
    for _ in range(100_000):  # steps in each of which the rank waits for another for three seconds
        records += still_seconds(records) < 3.0
    assert records < 100


def goes_astray(rank: int, world_size: int, store: str, how: str) -> str:
    dist.destroy_process_group()
    ranks = connect(dist.FileStore(store, world_size), rank, world_size)
    watch = MismatchWatch()
    watch.begin(ranks)
    ranks.barrier()
    try:
        if rank == 1 and how == "operation":
            dist.broadcast(torch.ones(7), src=0, group=ranks.groups.world)
        elif rank == 1 and how == "group":
            dist.all_reduce(torch.ones(7), group=ranks.groups.experts)
        elif rank == 1:
            dist.barrier(group=ranks.groups.world)
        ranks.all_sum(torch.ones(5))
        ranks.barrier()
    except RuntimeError as error:
        try:
            watch.raise_found(error)
        except UserError as found:
            return str(found)
        return f"unnamed: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("how", "stray"), [("operation", "broadcast of Float [7]"), ("order", "barrier"), ("group", "all_reduce of Float [7] of group 0")]
)
def test_ranks_that_wait_for_each_other_end_with_the_name_of_the_stray(tmp_path: Path, how: str, stray: str) -> None:
    for said in run_ranks(3, goes_astray, str(tmp_path / "store"), how):
        assert f": rank 1 is in {stray}; ranks 0, 2 are in all_reduce of Float [5]" in said


def hears_of_it(rank: int, world_size: int, store: str) -> str:
    """Only rank 0 looks at the others' records more than once."""
    if rank > 0:
        mismatch_watch.next_look = lambda _still_since, _now: math.inf  # type: ignore[assignment]
    return goes_astray(rank, world_size, store, "group")


def test_a_rank_that_has_not_found_the_difference_is_told_of_it(tmp_path: Path) -> None:
    for said in run_ranks(3, hears_of_it, str(tmp_path / "store")):
        assert ": rank 1 is in all_reduce of Float [7] of group 0" in said


def waits_long(rank: int, world_size: int, store: str) -> bool:
    """A rank that is late does what the others do."""
    import time

    dist.destroy_process_group()
    ranks = connect(dist.FileStore(store, world_size), rank, world_size)
    watch = MismatchWatch()
    watch.begin(ranks)
    time.sleep(2.0 * rank)
    ranks.barrier()
    return ranks.aborted


def test_slow_ranks_are_left_alone(tmp_path: Path) -> None:
    assert run_ranks(2, waits_long, str(tmp_path / "store")) == [False, False]
