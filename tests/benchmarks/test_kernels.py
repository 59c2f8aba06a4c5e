"""Test everything in `benchmarks.kernels` except the timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_layer, kernels
from benchmarks.kernel_cases import SHAPES, Layer, LayerShape, make_inputs
from benchmarks.peers import wheels
from benchmarks.ratios import LEAST_PAIRS, Budget

BUDGET = Budget(half_width=0.01, rounds=2 * LEAST_PAIRS)
TINY = LayerShape("tiny", hidden=16, ffn=16, rank=8, experts=2, k=2, tokens=8)


def rows_of(times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    shape = {shape.name: shape for shape in SHAPES}
    return [kernels.row(shape[name], provider, [ms] * BUDGET.rounds, "") for name, found in times.items() for provider, ms in found.items()]


def test_the_summary_is_the_worst_ratio_of_medians_over_shapes() -> None:
    rows = rows_of(
        {
            "7B": {"ours": 10, "frozen_ffn": 8, "stock_torch": 13, "moe_peft": 30, "ours, beside moe_peft": 12},
            "1B": {"ours": 6, "frozen_ffn": 5, "stock_torch": 9, "moe_peft": 24, "ours, beside moe_peft": 8},
            "fine-grained": {"ours": 4, "frozen_ffn": 4, "grouped_mm": 10},
        }
    )
    rows.append(kernels.row(SHAPES[3], "scattermoe", [], "not finished after 150 s"))
    assert {key: one.value for key, one in kernels.summary_of(rows, BUDGET).items()} == pytest.approx(
        {"over_frozen_ffn_worst": 1.25, "stock_torch_over_ours_min": 1.3, "grouped_mm_over_ours_min": 2.5, "moe_peft_over_ours_min": 2.5}
    )


def test_small_layers_are_right_and_each_provider_is_checked() -> None:
    verdicts = kernels.check_small(torch.device("cpu"))
    assert [set(found) for found in verdicts.values()] == [
        {"ours", "frozen_ffn", "stock_torch", "grouped_mm"},
        {"ours", "frozen_ffn", "grouped_mm"},
    ]
    assert not any(verdict for found in verdicts.values() for verdict in found.values()), verdicts


def timed_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs once, and takes a millisecond."""

    def alternate(steps: Mapping[str, Callable[[], object]], compared: Sequence[tuple[str, str]], budget: Budget) -> dict[str, list[float]]:
        assert {side for pair in compared for side in pair} == set(steps)
        for step in steps.values():
            step()
        return {name: [1.0] * budget.rounds for name in steps}

    monkeypatch.setattr(kernels.gpu_timing, "alternate", alternate)


def test_every_provider_has_a_row_and_a_wrong_one_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_on_paper(monkeypatch)
    monkeypatch.setattr(
        kernels.kernel_providers, "stock_torch", lambda inputs, compiled: Layer(lambda: 2 * inputs.x_TD, {"x": inputs.x_TD})
    )
    rows = {row["provider"]: row for row in kernels.compare(make_inputs(TINY, torch.device("cpu"), torch.float32), BUDGET, compiled=False)}
    assert set(rows) == {"ours", "frozen_ffn", "stock_torch", "grouped_mm"}
    assert rows["ours"]["ms_all"] == [1.0] * BUDGET.rounds
    assert rows["stock_torch"]["ms_median"] is None
    assert "y is off by" in rows["stock_torch"]["why_not"]


def test_nothing_is_timed_while_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ours", lambda inputs, compiled: Layer(lambda: 2 * inputs.x_TD, {"x": inputs.x_TD}))
    with pytest.raises(RuntimeError, match="ours is wrong, so nothing is timed"):
        kernels.compare(make_inputs(TINY, torch.device("cpu"), torch.float32), BUDGET, compiled=False)


def test_a_peer_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed_on_paper(monkeypatch)
    monkeypatch.setattr(wheels, "WHEELS", tmp_path)
    result = kernels.compare_peer("moe_peft_layer", make_inputs(TINY, torch.device("cpu"), torch.float32), BUDGET)
    assert "python -m benchmarks.peers.wheels" in result["reason"]


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


def test_the_cpu_layer_s_summary_is_its_least_ratio() -> None:
    times = {("float32", "naive"): 30.0, ("float32", "ours"): 20.0, ("bfloat16", "naive"): 14.0, ("bfloat16", "ours"): 10.0}
    rows = [{"dtype": dtype, "provider": provider, "ms_all": [ms] * BUDGET.rounds} for (dtype, provider), ms in times.items()]
    assert {key: one.value for key, one in cpu_layer.summary_of(rows, BUDGET).items()} == pytest.approx(
        {"cpu_naive_over_ours": 1.4, "cpu_naive_over_ours_float32": 1.5, "cpu_naive_over_ours_bfloat16": 1.4}
    )
