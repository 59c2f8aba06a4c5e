"""Presets against published figures, costs by hand, errors by their text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecate.errors import UserError
from hecate.parallel.cost.model_shapes import ModelShape, load_model_shape
from testing.plan_cases import num_params

PRESETS = Path(__file__).resolve().parents[3] / "configs" / "models"

SMALL: dict[str, Any] = {"name": "small", "hidden": 10, "ffn": 20, "layers": 3, "seq": 8, "experts": 4, "top_k": 2}


@pytest.mark.parametrize(("preset", "billions"), [("gpt-moe-s", 1.84), ("gpt-moe-l", 7.36), ("bert-moe", 3.27), ("bert-moe-deep", 6.54)])
def test_the_papers_models_have_its_parameters(preset: str, billions: float) -> None:
    assert round(num_params(load_model_shape(PRESETS / f"{preset}.yaml")) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("preset", "frozen_mb", "pair_millions"),
    # Mixtral: 3 · 4096 · 14336 weights of 2 bytes; of rank 16 a pair over gate and up, (4096 + 28672), and one over down, (14336 + 4096).
    # MixLoRA's paper-sized Llama-7B: 0.725 M parameters an expert.
    [("mixtral-8x7b", 352, 0.819), ("llama-7b-mixlora", 0, 0.725), ("qwen3-30b-a3b", 9, 0.102), ("olmoe-1b-7b", 13, 0.115)],
)
def test_lora_presets_by_published_sizes(preset: str, frozen_mb: int, pair_millions: float) -> None:
    shape = load_model_shape(PRESETS / f"{preset}.yaml")
    assert round(shape.layer_cost(1).frozen_bytes / 1e6) == frozen_mb
    assert round(shape.pair_parameters / 1e6, 3) == pair_millions


def test_every_preset_loads() -> None:
    names = {load_model_shape(path).name for path in PRESETS.glob("*.yaml")}
    assert len(names) == 8


def test_full_experts_by_hand() -> None:
    """Two matrices of 10 x 20: 400 parameters. Attention: 4 of 10 x 10, 800 FLOPs a token, and 4 · 8 · 10 over the sequence."""
    shape = ModelShape(kind="full", matrices=2, causal=False, **SMALL)
    cost = shape.layer_cost(16)
    assert (cost.trainable_bytes, cost.reduced_bytes, cost.frozen_bytes, cost.state_bytes) == (800, 800, 0, 4800)
    assert (cost.assignment_flops, cost.assignment_backward, cost.row_flops, cost.row_bytes) == (800, 2, 0, 20)
    assert (cost.non_moe_flops, cost.non_moe_backward) == (16 * (800 + 320), 2)
    assert cost.top_k == 2
    assert num_params(shape) == 3 * (400 + 4 * 400)
    assert shape.replicated_bytes() == 3 * 400 * 16


def test_pairs_over_a_shared_ffn_by_hand() -> None:
    """Three matrices of 10 x 20 and pairs of rank 2: 600 and 3 · 2 · 30 = 180 parameters, the pairs in float32.

    Attention: 800 FLOPs a token of frozen projections, backward as many, and 160 of scores, backward twice as many.
    """
    shape = ModelShape(kind="mixlora", rank=2, **SMALL)
    cost = shape.layer_cost(16)
    assert (cost.trainable_bytes, cost.frozen_bytes, cost.state_bytes) == (720, 0, 2160)
    assert (cost.row_flops, cost.row_backward, cost.assignment_flops, cost.assignment_backward) == (1200, 1, 360, 3)
    assert cost.non_moe_backward * cost.non_moe_flops == pytest.approx(16 * (800 + 2 * 160))
    assert num_params(shape) == 3 * (400 + 600 + 4 * 180)
    assert shape.replicated_bytes() == 3 * (400 + 600) * 2


def test_pairs_over_frozen_experts_by_hand() -> None:
    """A pair of rank 2 over gate and up, 10 to 40, and one over down: 2 · 50 + 2 · 30 = 160 parameters.

    Backward: once the 1200 FLOPs of the frozen expert; of its pairs' 320 half once more, as A's are taken to be, and all twice.
    """
    shape = ModelShape(kind="moe_lora", rank=2, **SMALL)
    cost = shape.layer_cost(16)
    assert (cost.trainable_bytes, cost.frozen_bytes, cost.row_flops, cost.assignment_flops) == (640, 1200, 0, 1520)
    assert cost.assignment_backward * cost.assignment_flops == pytest.approx(1200 + 2.5 * 320)
    assert num_params(shape) == 3 * (400 + 4 * (600 + 160))
    assert shape.replicated_bytes() == 3 * 400 * 2


def test_grouped_heads_and_the_causal_half() -> None:
    """Queries 30 wide, keys and values 5 each: 2 · 10 · 35 weights; half of 4 · 8 · 30 over the sequence."""
    shape = ModelShape(kind="full", query_width=30, key_value_width=5, **SMALL)
    assert shape.attention_parameters == 700
    assert shape.attention_flops(1) == 1400 + 480


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a model is a mapping with the keys kind, hidden"),
        ("{kind: full}", "missing: hidden, ffn, layers, seq, experts, top_k"),
        ("{kind: full, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2, heads: 4}", "unknown: heads"),
        ("{kind: dense, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2}", "kind must be one of full, mixlora, moe_lora"),
        ("{kind: full, hidden: 8.5, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2}", "hidden must be an integer >= 1, got 8.5"),
        ("{kind: full, hidden: 8, ffn: 0, layers: 1, seq: 8, experts: 4, top_k: 2}", "ffn must be an integer >= 1, got 0"),
        ("{kind: full, hidden: 8, ffn: 8, layers: true, seq: 8, experts: 4, top_k: 2}", "layers must be an integer >= 1, got True"),
        ("{kind: full, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 5}", "top_k is 5, but there are 4 experts"),
        ("{kind: full, rank: 2, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2}", "kind full has no rank"),
        ("{kind: moe_lora, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2}", "kind moe_lora needs a rank"),
        ("{kind: full, matrices: 4, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2}", "matrices must be 2"),
        ("{kind: full, causal: 1, hidden: 8, ffn: 8, layers: 1, seq: 8, experts: 4, top_k: 2}", "causal must be true or false, got 1"),
        ("kind: [", "cannot be read as a model"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_model_shape(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 8
