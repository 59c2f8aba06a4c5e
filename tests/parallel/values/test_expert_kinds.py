"""The kinds of experts by hand: an FFN of hidden 6 and ffn 10 has 180 weights, a pair of rank 2 on one of its projections 32 numbers."""

from __future__ import annotations

from typing import get_args

import pytest

from hecate.experts.pairs.sources.plain import plain_pairs
from hecate.parallel.cost.expert_cost import NumberBytes, expert_layer_cost, ffn_place
from hecate.parallel.values.expert_kinds import (
    FULL,
    KINDS,
    MIXLORA,
    MOE_LORA,
    NO_PAIRS,
    ExpertKind,
    FfnSizes,
    KindName,
    LoraShape,
    kind_written_as,
    kinds_for,
)

SIZES = FfnSizes(hidden=6, ffn=10)
FFN = [("gate_proj", (10, 6)), ("up_proj", (10, 6)), ("down_proj", (6, 10))]


def test_every_name_that_a_configuration_may_give_is_a_kind() -> None:
    assert set(KINDS) == set(get_args(KindName))
    assert all(KINDS[kind.name] is kind for kind in KINDS.values())
    assert len({kind.output for kind in KINDS.values()}) == len(KINDS), "a saved adapter must say which kind it is of"
    assert kind_written_as("peft") is MOE_LORA


@pytest.mark.parametrize(
    ("kind", "targets", "projections"),
    [
        (MIXLORA, ("down_proj", "q_proj", "gate_proj"), ("gate_proj", "down_proj")),
        (FULL, ("down_proj", "q_proj"), ()),
        (MOE_LORA, ("down_proj", "up_proj", "gate_proj"), ("gate_up_proj", "down_proj")),
        (MOE_LORA, ("down_proj", "q_proj"), ("down_proj",)),
        (MOE_LORA, ("gate_proj", "q_proj"), ("gate_proj",)),
        (MOE_LORA, ("up_proj", "down_proj"), ("up_proj", "down_proj")),
        (MOE_LORA, ("q_proj",), ()),
    ],
)
def test_the_projections_that_get_a_pair(kind: ExpertKind, targets: tuple[str, ...], projections: tuple[str, ...]) -> None:
    assert kind.projections(targets) == projections


def test_layouts() -> None:
    pairs = plain_pairs(SIZES, ("down_proj", "gate_up_proj"), LoraShape(2, 1.0, 0.0))
    named = [("gate_up_proj.A", (2, 6)), ("gate_up_proj.B", (20, 2)), ("down_proj.A", (2, 10)), ("down_proj.B", (6, 2))]
    assert [(spec.name, spec.shape) for spec in pairs.trained] == named
    layouts = {kind.name: kind.layout(SIZES.specs(), pairs if kind.has_pairs else NO_PAIRS) for kind in KINDS.values()}
    for name, trained, frozen in (("mixlora", named, []), ("full", FFN, []), ("moe_lora", named, FFN)):
        assert [(spec.name, spec.shape) for spec in layouts[name].trainable] == trained  # type: ignore[index]
        assert [(spec.name, spec.shape) for spec in layouts[name].frozen] == frozen  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "trained", "frozen", "row", "assignment", "backward", "attention"),
    [
        (MIXLORA, 64, 0, 360, 128, 3 * 128, 1),
        (FULL, 180, 0, 0, 360, 2 * 360, 2),
        (MOE_LORA, 64, 180, 0, 360 + 128, 360 + 2.5 * 128, 1),
    ],
)
def test_costs(kind: ExpertKind, trained: int, frozen: int, row: int, assignment: int, backward: float, attention: int) -> None:
    """Parameters of 8 bytes and gradients of 5 travel, masters and moments take 4 each, weights are computed with in 2 bytes."""
    number = NumberBytes(trained=8, gradient=5, master=4, computed=2)
    cost = expert_layer_cost(kind.parameters(180, 64, 2.0 * 64), place=ffn_place(6), top_k=2, number=number, non_moe_flops=7.0)
    assert (cost.trainable_bytes, cost.reduced_bytes) == (8 * trained, 5 * trained)
    assert (cost.frozen_bytes, cost.state_bytes) == (2 * frozen, 3 * 4 * trained)
    assert (cost.row_bytes, cost.row_flops, cost.assignment_flops) == (12, row, assignment)
    assert cost.assignment_backward * cost.assignment_flops == backward
    assert (cost.top_k, cost.non_moe_flops, cost.non_moe_backward) == (2, 7.0, attention)


def test_the_flops_of_pairs_are_not_those_of_what_is_trained_of_them() -> None:
    """A source may train a few numbers and multiply with many, as one that draws A and trains B does."""
    kind, number = MIXLORA, NumberBytes(trained=8, gradient=8, master=4, computed=2)
    cost = expert_layer_cost(kind.parameters(180, 10, 128.0), place=ffn_place(6), top_k=2, number=number, non_moe_flops=0.0)
    assert (cost.trainable_bytes, cost.state_bytes) == (8 * 10, 3 * 4 * 10)
    assert (cost.assignment_flops, cost.assignment_backward) == (128.0, 3.0)
    plain = plain_pairs(SIZES, ("gate_proj", "down_proj"), LoraShape(2, 1.0, 0.0))
    assert (plain.trained_numel, plain.flops) == (64, 128.0)


def test_kinds_are_named_by_the_models_that_they_are_for() -> None:
    assert kinds_for(moe_base=True) == "moe.family=moe_lora (LoRA over an MoE model's own experts)"
    assert "moe.family=mixlora" in kinds_for(moe_base=False)
