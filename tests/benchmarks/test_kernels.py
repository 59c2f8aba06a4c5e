"""What `benchmarks.kernels` does around its clocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernel_cases import SHAPES, Layer, LayerShape, make_inputs

TINY = LayerShape("tiny", hidden=16, ffn=16, rank=8, experts=2, k=2, tokens=8)


def rows_of(times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    shape = {shape.name: shape for shape in SHAPES}
    return [kernels.row(shape[name], provider, [ms, ms + 1, ms - 1], "") for name, found in times.items() for provider, ms in found.items()]


def test_the_summary_is_the_worst_ratio_of_medians_over_shapes() -> None:
    rows = rows_of(
        {
            "7B": {"ours": 10, "frozen_ffn": 8, "stock_torch": 13, "moe_peft": 30, "ours, beside moe_peft": 12},
            "1B": {"ours": 6, "frozen_ffn": 5, "stock_torch": 9, "moe_peft": 24, "ours, beside moe_peft": 8},
            "fine-grained": {"ours": 4, "frozen_ffn": 4, "grouped_mm": 10},
        }
    )
    rows.append(kernels.row(SHAPES[3], "scattermoe", [], "not through after 150 s"))
    assert kernels.summary_of(rows) == pytest.approx(
        {"over_frozen_ffn_worst": 1.25, "stock_torch_over_ours_min": 1.3, "grouped_mm_over_ours_min": 2.5, "moe_peft_over_ours_min": 2.5}
    )


def test_small_layers_are_right_and_each_provider_is_checked() -> None:
    verdicts = kernels.check_small(torch.device("cpu"))
    assert [set(found) for found in verdicts.values()] == [
        {"ours", "frozen_ffn", "stock_torch", "grouped_mm"},
        {"ours", "frozen_ffn", "grouped_mm"},
    ]
    assert not any(verdict for found in verdicts.values() for verdict in found.values()), verdicts


def test_what_is_wrong_or_raises_has_a_verdict() -> None:
    inputs = make_inputs(TINY, torch.device("cpu"), torch.float32)

    def broken() -> torch.Tensor:
        raise MemoryError("no room")

    layers = {"doubled": Layer(lambda: 2 * inputs.x_TD, {"x": inputs.x_TD}), "broken": Layer(broken, {"x": inputs.x_TD})}
    verdicts = kernels.checked(inputs, layers)
    assert "y is off by" in verdicts["doubled"]
    assert "x is off by" in verdicts["doubled"]
    assert verdicts["broken"] == "MemoryError: no room"


def test_a_run_of_other_bits_is_seen() -> None:
    inputs = make_inputs(TINY, torch.device("cpu"), torch.float32)
    factors = iter([1.0, 1.0, 1.0 + 2**-23, 1.0])
    unsteady = Layer(lambda: next(factors) * inputs.x_TD, {"x": inputs.x_TD})
    assert kernels.differing_runs(unsteady, inputs.dy_TD, runs=4) == ["x", "y"]
    steady = Layer(lambda: 3 * inputs.x_TD, {"x": inputs.x_TD})
    assert kernels.differing_runs(steady, inputs.dy_TD, runs=4) == []
