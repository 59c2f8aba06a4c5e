import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.data.mixture import Mixture, permutation


def draw(mixture: Mixture, count: int) -> list[tuple[int, int]]:
    return [next(mixture) for _ in range(count)]


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    draws=st.integers(1, 100),
)
def test_every_source_is_always_less_than_one_draw_from_its_share(weights: list[float], draws: int) -> None:
    mixture = Mixture([1] * len(weights), weights, seed=0)
    drawn = np.zeros(len(weights))
    for n in range(1, draws + 1):
        drawn[next(mixture)[0]] += 1
        assert (np.abs(drawn - n * np.array(weights) / np.sum(weights)) < 1).all()


def test_order_of_sources_by_hand() -> None:
    # Shares 1/2, 1/4, 1/4: after every 4 draws exactly 2, 1, 1.
    sources = [source for source, _ in draw(Mixture([9, 9, 9], [2, 1, 1], seed=0), 12)]
    for start in (0, 4, 8):
        assert sorted(sources[start : start + 4]) == [0, 0, 1, 2]


def test_weights_mean_their_decimal_digits() -> None:
    # Binary 0.1, 0.2 and 0.9 are not exactly as 1 to 2 to 9, and break ties otherwise.
    decimal, whole = (Mixture([5, 5, 5], weights, seed=0) for weights in ([0.1, 0.2, 0.9], [1, 2, 9]))
    assert draw(decimal, 100) == draw(whole, 100)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 2**63))
def test_each_sample_once_an_epoch(sizes: list[int], seed: int) -> None:
    drawn: list[list[int]] = [[] for _ in sizes]
    for source, sample in draw(Mixture(sizes, [1.0] * len(sizes), seed), 3 * max(sizes) * len(sizes)):
        drawn[source].append(sample)
    for samples, size in zip(drawn, sizes, strict=True):
        for start in range(0, len(samples) - size + 1, size):
            assert sorted(samples[start : start + size]) == list(range(size))


def test_epochs_sources_and_seeds_are_shuffled_apart() -> None:
    orders = {tuple(permutation(*key, 50)) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(orders) == 4
    assert tuple(range(50)) not in orders


def test_order_is_the_same_for_ever() -> None:
    # Written down once: another NumPy or machine must give the same run.
    assert permutation(1, 2, 3, 8).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]


@pytest.mark.parametrize("before", [0, 1, 6, 7, 40])
def test_resume_anywhere(before: int) -> None:
    whole = Mixture([7, 3], [3, 1], seed=5)
    draw(whole, before)
    resumed = Mixture([7, 3], [3, 1], seed=5)
    draw(resumed, 11)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert draw(resumed, 30) == draw(whole, 30)
