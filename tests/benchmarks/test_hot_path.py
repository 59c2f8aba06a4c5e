"""What the operators of a layer are, told apart from those of a micro-step and of a step, and how many there may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hot_path import COUNTED, ROOT, counts, due_to, make_folder


def test_calls_are_divided_among_what_they_are_due_to() -> None:
    """7 in a step, 5 in each of its layers, 3 in each micro-step, and 2 in each layer of each micro-step."""
    calls = {
        (layers, micro): {"operator aten::mm": 7 + 5 * layers + 3 * micro + 2 * layers * micro, "wait item": micro}
        for layers in COUNTED
        for micro in (1, 2)
    }
    assert due_to(calls) == {
        "layer and micro-step": {"operator aten::mm": 2},
        "layer and step": {"operator aten::mm": 5},
        "micro-step": {"operator aten::mm": 3, "wait item": 1},
        "step": {"operator aten::mm": 7},
    }


@pytest.mark.slow
def test_a_layer_of_mixlora_has_few_operators_and_no_waits(tmp_path: Path) -> None:
    """With dropout and Triton kernels, in a step of one micro-step. The goals are 120 and 90; the second is not reached."""
    make_folder(tmp_path, COUNTED)
    found = counts(ROOT, tmp_path)
    for part, most in (("forward", 100), ("backward", 130)):
        calls = [call for due in ("layer and micro-step", "layer and step") for call in found[part][due].items()]
        assert not [name for name, _ in calls if name.startswith("wait ")]
        assert sum(number for _, number in calls) <= most
