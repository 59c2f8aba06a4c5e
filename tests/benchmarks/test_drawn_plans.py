"""Layers drawn at random are the same wherever they are drawn, a third is kept, and what an ablation leaves out is there to be left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.drawn_plans import ABLATIONS, LOST, auto_seconds, best_other, compared, inputs
from testing.drawn_layers import LAYERS, drawn_layer, is_kept

ROOT = Path(__file__).parents[2]
FEW = [index for index in range(LAYERS) if not is_kept(index)][::50]


def test_a_third_is_kept_for_a_last_look() -> None:
    assert sum(map(is_kept, range(LAYERS))) == LAYERS // 3


@pytest.mark.parametrize("index", FEW)
def test_a_layer_is_drawn_alike_each_time_and_is_one(index: int) -> None:
    one, again = drawn_layer(index), drawn_layer(index)
    assert one.case == again.case
    loads_LED = one.given.expected_LED
    np.testing.assert_array_equal(loads_LED, again.given.expected_LED)
    assert (loads_LED >= 0).all()
    assert (loads_LED <= one.case["tokens"]).all(), "a token chooses an expert once"


def test_auto_is_seldom_slower_than_any_other_policy() -> None:
    over = [auto_seconds(given) / best_other(given) for _, _, given in inputs(FEW[::2])]
    assert np.mean(np.array(over) > LOST) <= 0.1
    rows, total = compared(FEW[:3])
    assert total["layers"] == 3
    assert {row["plan"] for row in rows} == {"history", "exact"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_what_is_left_out_stands_in_the_file_once(name: str) -> None:
    file, old, _ = ABLATIONS[name]
    assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1
