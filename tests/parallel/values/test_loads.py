from __future__ import annotations

import json

import numpy as np
import pytest

from hecate.parallel.values.loads import LoadHistory, imbalance
from hecate.parallel.values.units import Unit


def loads(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def test_nothing_is_predicted_before_the_first_iteration() -> None:
    assert LoadHistory(3).predict([Unit(0)]) is None


def test_layers_are_predicted_together_from_what_is_kept() -> None:
    """A window of one iteration, of which two are kept: the last alone, or the mean of both where it is to last."""
    history = LoadHistory(1)
    for hot in (100, 9, 1):
        history.record({Unit(0): loads([hot, 9], [9, 9]), Unit(4): loads([1, 0], [hot, 0])})
    predicted, lasting = history.predict([Unit(4), Unit(0)]), history.predict([Unit(4)], lasting=True)
    assert predicted is not None
    assert lasting is not None
    assert predicted.dtype == np.float64
    assert predicted.tolist() == [[[1, 0], [1, 0]], [[1, 9], [9, 9]]]
    assert lasting.tolist() == [[[1, 0], [5, 0]]]


def test_a_copy_records_apart() -> None:
    history = LoadHistory(1)
    for hot in (100, 9):
        history.record({Unit(0): loads([hot, 9])})
    other = history.copy()
    other.record({Unit(0): loads([1, 1])})
    assert [step[Unit(0)].tolist() for step in history.snapshot()] == [[[100, 9]], [[9, 9]]]
    assert [step[Unit(0)].tolist() for step in other.snapshot()] == [[[9, 9]], [[1, 1]]]
    assert other.snapshot()[0] is history.snapshot()[1], "a step is known by the object of its loads"
    history.record({Unit(0): loads([1, 1])})
    for one, apart in zip(
        (history.predict([Unit(0)]), history.recent([Unit(0)])), (other.predict([Unit(0)]), other.recent([Unit(0)])), strict=True
    ):
        assert one is not None
        assert apart is not None
        assert one.tolist() == apart.tolist()


def test_the_state_survives_json_and_goes_on_alike() -> None:
    history, resumed = LoadHistory(3), LoadHistory(3)
    for step in range(8):
        history.record({Unit(2): loads([step, 1], [0, 7 * step]), Unit(11): loads([step * step, 3], [2, 2])})
    resumed.record({Unit(2): loads([100, 100])})
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for _ in range(2):
        for unit in (Unit(2), Unit(11)):
            before, after = history.predict([unit]), resumed.predict([unit])
            assert before is not None
            assert after is not None
            np.testing.assert_array_equal(before, after)
        for h in (history, resumed):
            h.record({Unit(2): loads([1, 2], [3, 4]), Unit(11): loads([0, 0], [0, 5])})


def test_the_state_has_a_row_a_source_rank() -> None:
    """Two experts, three ranks: the form in checkpoints, which is not that in memory."""
    history = LoadHistory(3)
    history.record({Unit(4): loads([1, 2, 3], [4, 5, 6])})
    assert history.state_dict() == [{"4": [[1, 4], [2, 5], [3, 6]]}]
    history.load_state_dict(history.state_dict())
    assert history.snapshot()[0][Unit(4)].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_an_empty_state() -> None:
    history = LoadHistory(3)
    history.record({Unit(0): loads([1])})
    history.load_state_dict(LoadHistory(3).state_dict())
    assert history.predict([Unit(0)]) is None


def test_loads_dealt_to_other_ranks_keep_their_sums() -> None:
    history = LoadHistory(3)
    history.record({Unit(0): loads([5, 2], [1, 3])})
    before = history.snapshot()
    history.redeal(3)
    predicted = history.predict([Unit(0)])
    assert predicted is not None
    np.testing.assert_array_equal(predicted, [[[3, 2, 2], [2, 1, 1]]])
    history.restore(before)
    np.testing.assert_array_equal(history.snapshot()[0][Unit(0)], [[5, 2], [1, 3]])


def test_a_window_of_nothing_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        LoadHistory(0)


def test_imbalance() -> None:
    assert imbalance(np.array([3, 1, 2])) == 1.5
    assert imbalance(np.array([4, 4])) == 1.0
    assert imbalance(np.array([0, 0, 0])) == 1.0


@pytest.mark.parametrize("bad", [[{"0": [1, 2]}], [{"0": [[1, -2]]}], [{"0": [["a"]]}], [[1]]], ids=str)
def test_what_is_no_history_is_refused(bad: list) -> None:  # type: ignore[type-arg]
    with pytest.raises((AttributeError, TypeError, ValueError)):
        LoadHistory(1).load_state_dict(bad)
