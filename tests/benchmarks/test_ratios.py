"""Intervals of ratios, on series of known ratio: drift, noise that lasts, and disturbances that hit one side."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ratios import LEAST_PAIRS, Budget, Ratio, interval, largest, least, of_times, speedup, until_narrow
from benchmarks.report import finish

ENOUGH = Budget(half_width=0.02, rounds=400)


def lasting(random: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """A series of variance 1, each value of which keeps this share of the one before."""
    values = [random.normal()]
    for _ in range(count - 1):
        values.append(memory * values[-1] + np.sqrt(1 - memory**2) * random.normal())
    return np.array(values)


def measured(
    random: np.random.Generator, pairs: int, ratio: float, *, drift: float = 0.0, memory: float = 0.9, apart: float = 0.0
) -> tuple[list[float], list[float]]:
    """Seconds of two sides in the order ABBA, the first of which takes `ratio` times as long.

    Args:
        drift: what each sample takes more than the one before, as a share.
        memory: of the noise that the machine adds to all samples.
        apart: the size of lasting noise that slows the first side alone.
    """
    machine = 0.05 * lasting(random, 4 * pairs, memory) + drift * np.arange(4 * pairs)
    alone = machine + 0.02 * random.normal(size=4 * pairs)
    first, second = alone.reshape(-1, 4)[:, [0, 3]], alone.reshape(-1, 4)[:, [1, 2]]
    first = first + np.log(ratio) + apart * np.repeat(lasting(random, pairs, 0.5), 2).reshape(-1, 2)
    return np.exp(first).ravel().tolist(), np.exp(second).ravel().tolist()


@pytest.mark.parametrize(
    ("pairs", "noise"),
    [
        (12, {"drift": 0.003}),
        (40, {"drift": 0.003}),
        (40, {"memory": 0.98}),
        (40, {"memory": 0.0}),
        (40, {"apart": 0.03}),
    ],
)
def test_nine_of_ten_intervals_hold_the_true_ratio(pairs: int, noise: dict[str, float]) -> None:
    """Of 400 runs 340 to 380: a share has a standard deviation of 0.015."""
    random = np.random.default_rng(0)
    ratios = [of_times(*measured(random, pairs, 1.25, **noise), ENOUGH) for _ in range(400)]
    assert 0.85 <= np.mean([one.low <= 1.25 <= one.high for one in ratios]) <= 0.95


def test_drift_cancels_and_does_not_widen() -> None:
    """Without turns that go back and forth, the second side would be 1 % slower."""
    steady = np.exp(0.01 * np.arange(80)).reshape(-1, 4)
    found = of_times(steady[:, [0, 3]].ravel().tolist(), steady[:, [1, 2]].ravel().tolist(), ENOUGH)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)


def test_equal_sides_are_seldom_told_apart_and_unequal_ones_are() -> None:
    random = np.random.default_rng(1)
    equal = [speedup(*measured(random, 40, 1.0, drift=0.002), ENOUGH).verdict for _ in range(200)]
    slower = [speedup(*measured(random, 40, 1.05, drift=0.002), ENOUGH).verdict for _ in range(200)]
    faster = [speedup(*measured(random, 40, 1 / 1.05, drift=0.002), ENOUGH).verdict for _ in range(200)]
    assert equal.count(0) >= 0.85 * 200
    assert (slower.count(-1), faster.count(1)) == (200, 200)


def test_a_disturbance_of_one_side_hardly_moves_the_ratio() -> None:
    these, those = measured(np.random.default_rng(2), 40, 1.25)
    these[10:16] = [10 * seconds for seconds in these[10:16]]
    found = of_times(these, those, ENOUGH)
    assert found.low <= 1.25 <= found.high
    assert found.high < 1.3


def test_lasting_noise_of_one_side_widens_the_interval() -> None:
    """Values that hang together tell less than as many independent ones, of the same spread."""
    random = np.random.default_rng(3)
    together = np.mean([np.diff(interval(lasting(random, 60, 0.7))) for _ in range(50)])
    independent = np.mean([np.diff(interval(random.normal(size=60))) for _ in range(50)])
    assert together > 1.5 * independent


def test_a_speedup_is_the_other_way_up() -> None:
    ours, theirs = [1.0] * 20, [2.0] * 20
    assert (speedup(ours, theirs, ENOUGH).value, speedup(ours, theirs, ENOUGH).verdict) == (2.0, 1)
    assert (of_times(ours, theirs, ENOUGH).value, of_times(ours, theirs, ENOUGH).verdict) == (0.5, 1)
    assert of_times(theirs, ours, ENOUGH).verdict == -1


def test_of_few_pairs_nothing_is_claimed() -> None:
    few = 2 * (LEAST_PAIRS - 1)
    found = speedup([1.0] * few, [2.0] * few, ENOUGH)
    assert (found.value, found.verdict, found.narrow) == (2.0, 0, False)
    assert str(found) == f"2: nothing is claimed from {few} rounds"


def test_sides_take_turns_forwards_and_backwards_until_all_ratios_are_narrow() -> None:
    asked: list[str] = []
    noise = np.random.default_rng(4)

    def sample(side: str) -> float:
        asked.append(side)
        return float(np.exp({"a": 0.0, "b": 0.02, "c": 0.1}[side] * noise.normal()))

    found = until_narrow(sample, ["a", "b", "c"], [("a", "b")], ENOUGH)
    assert asked[:12] == [*"abccba", *"abccba"]
    quick = len(found["a"])
    assert quick < 100
    assert of_times(found["a"], found["b"], ENOUGH).narrow
    assert not of_times(found["a"][: quick - 2], found["b"][: quick - 2], ENOUGH).narrow or quick == 2 * LEAST_PAIRS
    found = until_narrow(sample, ["a", "b", "c"], [("a", "b"), ("b", "c")], ENOUGH)
    assert len(found["a"]) == len(found["c"]) > quick


def test_a_budget_ends_and_says_so() -> None:
    noise = np.random.default_rng(5)
    budget = Budget(half_width=0.02, rounds=20)
    found = until_narrow(lambda side: float(np.exp(noise.normal())), ["a", "b"], [("a", "b")], budget)
    ratio = speedup(found["a"], found["b"], budget)
    assert (len(found["a"]), ratio.narrow, ratio.pairs) == (20, False, 10)
    assert str(ratio).endswith("not narrow enough after 20 rounds")


def test_the_worst_of_several_is_as_uncertain_as_they_are() -> None:
    ratios = [Ratio(1.1, 1.0, 1.2, 20, True), Ratio(1.2, 0.9, 1.3, 9, False)]
    assert largest(ratios) == Ratio(1.2, 1.0, 1.3, 9, False)
    assert least(ratios) == Ratio(1.1, 0.9, 1.2, 9, False)


def test_a_ratio_is_printed_and_recorded_with_its_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratio = Ratio(1.331, 1.29, 1.38, 20, True, of_times=False)
    finish("some", [{"row": 1}], {"speedup": ratio, "ceiling": 1.63}, tmp_path / "some.json")
    assert capsys.readouterr().out.splitlines()[2:] == ["speedup = 1.33 (1.29 to 1.38): faster", "ceiling = 1.63"]
    assert json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))["summary"] == {
        "speedup": 1.331,
        "speedup_low": 1.29,
        "speedup_high": 1.38,
        "speedup_verdict": 1.0,
        "speedup_narrow": 1.0,
        "ceiling": 1.63,
    }


def test_the_same_samples_have_the_same_interval() -> None:
    values = np.random.default_rng(6).normal(size=30)
    assert len(set(itertools.starmap(interval, [(values,), (values,)]))) == 1
