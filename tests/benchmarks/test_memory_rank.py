"""The peak of tensors' bytes is found among what the allocator gave out and took back, by hand."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory_rank import live_tensors, peak_bytes


def test_a_peak_counts_what_was_there_before_and_nothing_after() -> None:
    changes = [(1, 100, 10), (2, 200, 50), (3, 200, -50), (5, 300, 7), (6, 300, -7), (7, 400, 3), (9, 500, 99)]
    assert peak_bytes(changes, 4, 8, {100: 10}) == 17


def test_a_block_in_the_place_of_another_ends_it() -> None:
    """The profiler does not tell of every block that it ends."""
    changes = [(1, 100, 10), (5, 300, 7), (6, 300, 8), (7, 300, 2), (8, 300, -2)]
    assert peak_bytes(changes, 4, 8, {100: 10}) == 18


def test_of_a_mapped_file_the_tensors_count_that_are_in_use() -> None:
    """Two tensors of a file of 40 bytes that is a block, and one of a file that is none."""
    changes = [(1, 100, 40), (5, 300, 7)]
    assert peak_bytes(changes, 4, 8, {104: 10, 120: 5, 900: 2}) == 10 + 5 + 2 + 7


def test_live_tensors_are_storages_each_once() -> None:
    with FakeTensorMode():
        fake = torch.zeros(3)
    mine = torch.zeros(1000)
    part = mine[3:]
    found = live_tensors()
    assert found[mine.data_ptr()] == 4000
    assert part.data_ptr() not in found
    assert fake.shape == (3,)
