from __future__ import annotations

import math

import pytest
import torch

from hecate.kernels.common.dropout import Dropout, _mix64, dropout_key, dropout_stream

TOKENS, WIDTH = 400, 100
N = TOKENS * WIDTH


def kept(p: float, key: int, stream: int = 0, first: int = 0) -> torch.Tensor:
    return Dropout(p, key).mask(torch.arange(first, first + TOKENS), stream, WIDTH, torch.float64) > 0


def deviation(share: float, expected: float, n: int = N) -> float:
    """In standard deviations of a binomial share."""
    return abs(share - expected) / math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("key", [dropout_key(0, 0, 0), dropout_key(1, 2, 3), 0])
def test_the_share_of_dropped_elements(p: float, key: int) -> None:
    keep = kept(p, key)
    assert deviation(float(keep.double().mean()), 1 - p) < 4
    # Rows and columns are each a sample of their own; their spread must be a binomial's, within a factor.
    for axis, n in ((0, TOKENS), (1, WIDTH)):
        spread = float(keep.double().mean(axis).var()) / (p * (1 - p) / n)
        assert 0.6 < spread < 1.6, f"variance along axis {axis} is {spread:.2f} times a binomial's"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_zero_or_scaled_so_that_the_mean_is_one(dtype: torch.dtype) -> None:
    mask = Dropout(0.75, 5).mask(torch.arange(TOKENS), 1, WIDTH, dtype)
    assert mask.dtype == dtype
    assert mask.shape == (TOKENS, WIDTH)
    assert mask.unique().tolist() == [0.0, 4.0]


def test_nothing_is_dropped_with_probability_zero() -> None:
    assert kept(0.0, 3).all()


def test_a_token_keeps_its_mask_in_any_order_and_company() -> None:
    dropout, numbers = Dropout(0.4, dropout_key(9, 8)), torch.tensor([5, 0, 123456789, (7 << 33) + 1, 77])
    whole = dropout.mask(numbers, 4, WIDTH, torch.float32)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(dropout.mask(numbers[order], 4, WIDTH, torch.float32), whole[order])
    assert torch.equal(dropout.mask(numbers[2:3], 4, WIDTH, torch.float32), whole[2:3])
    assert torch.equal(dropout.mask(numbers, 4, 10, torch.float32), whole[:, :10])
    assert dropout.mask(numbers[:0], 4, WIDTH, torch.float32).shape == (0, WIDTH)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("stream", kept(0.5, 11, stream=1)),
        ("far stream", kept(0.5, 11, stream=1 << 30)),
        ("key", kept(0.5, 12)),
        ("high key bit", kept(0.5, 11 ^ (1 << 31))),
        ("tokens", kept(0.5, 11, first=TOKENS)),
        ("tokens 2^32 further", kept(0.5, 11, first=1 << 32)),
    ],
)
def test_another_name_gives_an_unrelated_mask(name: str, other: torch.Tensor) -> None:
    agree = float((kept(0.5, 11) == other).double().mean())
    assert deviation(agree, 0.5) < 4, f"{name}: {agree:.1%} of the elements agree"


def test_neighbours_are_unrelated() -> None:
    keep = kept(0.5, 21)
    assert deviation(float((keep[1:] == keep[:-1]).double().mean()), 0.5, n=N - WIDTH) < 4
    assert deviation(float((keep[:, 1:] == keep[:, :-1]).double().mean()), 0.5, n=N - TOKENS) < 4


def test_keys_differ_by_each_part_and_their_order() -> None:
    names = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (0, 0, 1)]
    keys = [dropout_key(*name) for name in names]
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert len(set(keys)) == len(names)
    assert keys == [dropout_key(*name) for name in names]


def test_keys_are_those_that_tensors_of_int64_give() -> None:
    """Masks of checkpoints that exist hang on these numbers."""
    for parts in ((0, 0), (3, 17, 2), (-1, 5), (1 << 62, 9)):
        key = torch.tensor(0x2545F4914F6CDD1D)
        for part in parts:
            key = _mix64(key ^ part)
        assert dropout_key(*parts) == int(key)


def test_the_two_elements_of_a_word_are_unrelated() -> None:
    """A word of 32 bits decides columns 2i and 2i + 1; other words of the row and of the column must not repeat it."""
    even, odd = kept(0.5, 33).view(TOKENS, WIDTH // 2, 2).unbind(2)
    for other in (odd, odd.roll(1, 0), odd.roll(1, 1)):
        assert deviation(float((even == other).double().mean()), 0.5, n=N // 2) < 4


def test_the_scale_is_of_what_is_really_dropped() -> None:
    """16 bits decide, so 0.05 is 3277 of 65536."""
    assert Dropout(0.05, 1).rows(torch.arange(1), 0).scale == 65536 / (65536 - 3277)
    assert Dropout(1 - 1e-9, 1).rows(torch.arange(1), 0).scale == 65536


def test_streams_differ_by_expert_and_input() -> None:
    """Gate and up see one dropped input, down another."""
    assert dropout_stream(3, "gate_proj") == dropout_stream(3, "up_proj")
    assert len({dropout_stream(e, name) for e in range(20) for name in ("gate_proj", "down_proj")}) == 40
