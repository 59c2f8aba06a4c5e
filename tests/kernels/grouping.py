"""Helpers of the tests of grouped kernels: groups, tolerances, and memory that is NaN until it is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

GROUPS = {
    "uneven": (5, 0, 17, 1, 33),
    "first empty": (0, 7, 2),
    "last empty": (7, 2, 0),
    "all empty": (0, 0),
    "one token": (0, 1),
    "one huge, the others empty": (0, 70, 0),
    "full tiles": (16, 32),
    "one each, so that no tile is left over": (1, 1, 1),
}
"""assignments of each slot; tiles have 16 rows in the interpreter"""
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""relative to the largest value: float32 by the order of its sums, the others by half a unit of their last place twice"""


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Unwritten floating-point memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def grouped(sizes: tuple[int, ...], elsewhere: int, k: int) -> torch.Tensor:
    """int64 [T, K]: slots of assignments, in a random order, of which `sizes[s]` go to slot s and at least `elsewhere` to none."""
    assignments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    missing = elsewhere + (-len(assignments) - elsewhere) % k
    assignments = torch.cat([assignments, torch.full((missing,), -1)])
    return assignments[torch.randperm(len(assignments), generator=torch.Generator().manual_seed(1))].view(-1, k)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str = "result") -> None:
    """The largest error over the largest value."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    if want.numel() == 0:
        return
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: error {error:.2e}, over {tolerance:.2e}"
