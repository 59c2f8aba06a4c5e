"""The loops over arrays, against numpy's functions."""

from __future__ import annotations

import functools
import operator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.loops.array_loops import descending_order, largest, total, where_largest

NUMBERS = st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.5, -3.0, 1e300, 0.1]), min_size=1, max_size=40).map(np.array)


@given(NUMBERS)
def test_order_is_a_stable_sort_from_the_largest_down(values: np.ndarray) -> None:
    assert descending_order(values).tolist() == np.argsort(-values, kind="stable").tolist()


@given(NUMBERS)
def test_largest_and_total(values: np.ndarray) -> None:
    assert largest(values) == values.max()
    assert where_largest(values) == values.argmax()
    # Since Python 3.12 `sum` makes up for what rounding has lost.
    assert total(values) == functools.reduce(operator.add, values.tolist(), 0.0), "added up in order"


def test_nothing_has_an_order_and_a_total() -> None:
    assert descending_order(np.zeros(0)).tolist() == []
    assert total(np.zeros(0)) == 0.0
