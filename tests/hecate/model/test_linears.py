"""The linears of decoder layers as units: which are found, what is refused, and how many parameters MoLA trains."""

from __future__ import annotations

import pytest
import torch

from hecate.config.expert_keys import allocated
from hecate.errors import UserError
from hecate.experts.pairs.sources.plain import plain_pairs
from hecate.model.linears import find_linears, target_linears
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LinearSizes, LoraShape
from hecate.parallel.values.units import Unit
from tests.hecate.model.tiny import tiny
from tests.plain_mola import mola_parameters

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_the_linears_of_each_layer_are_found_in_the_order_of_their_use() -> None:
    found = find_linears(tiny("llama", torch.float32))
    assert [one.name for one in found] == list(ALL) * 3
    first, last = found[0], found[-1]
    assert (first.unit, first.path) == (Unit(0, "self_attn.q_proj"), "model.layers.0.self_attn.q_proj")
    assert (last.unit, last.shape) == (Unit(2, "mlp.down_proj"), LinearSizes(24, 16))


def test_targets_are_named_by_their_last_names() -> None:
    found = find_linears(tiny("llama", torch.float32))
    assert [str(one.unit) for one in target_linears(found, ("v_proj", "q_proj"), "Llama")][:3] == [
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
    ]
    with pytest.raises(UserError, match=r"lora\.target_modules: lm_head matches no linear of Llama's decoder layers; they have q_proj"):
        target_linears(found, ("q_proj", "lm_head"), "Llama")


@pytest.mark.parametrize(("target", "holder"), [("q_proj", "qkv_proj"), ("qkv_proj", "qkv_proj"), ("up_proj", "gate_up_proj")])
def test_projections_that_share_one_weight_are_refused(target: str, holder: str) -> None:
    found = find_linears(tiny("phi3", torch.float32, partial_rotary_factor=1.0))
    with pytest.raises(UserError) as caught:
        target_linears(found, ("o_proj", target), "Phi3ForCausalLM")
    text = str(caught.value)
    assert f"lora.target_modules: {target}: Phi3ForCausalLM computes" in text
    assert f"with one weight, {holder}, whose parts cannot be told apart\n" in text
    assert "leave" in text
    assert target_linears(found, ("o_proj", "down_proj"), "Phi3ForCausalLM"), "the others can be told apart"


def test_linear_attention_has_one_weight_for_several_projections() -> None:
    """Of four layers three have it, and the last one has projections of its own."""
    changes = {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 0}
    found = find_linears(tiny("qwen3_next", torch.float32, **changes))
    with pytest.raises(UserError, match="Qwen3Next computes q_proj, k_proj, v_proj with one weight, in_proj_qkvz"):
        target_linears(found, ("in_proj_qkvz",), "Qwen3Next")
    assert [str(one.unit) for one in target_linears(found, ("q_proj",), "Qwen3Next")] == ["3.self_attn.q_proj"]


def test_an_allocation_is_dealt_over_equal_groups_of_layers() -> None:
    assert allocated((2, 4, 6, 8), 32) == (2,) * 8 + (4,) * 8 + (6,) * 8 + (8,) * 8
    counts = allocated((2, 4, 6, 8), 30)
    assert [counts.count(experts) for experts in (2, 4, 6, 8)] == [8, 7, 8, 7]
    assert allocated((0, 3), 2) == (0, 3)
    with pytest.raises(UserError, match=r"moe\.allocation has 4 groups, but the model has 3 layers\n  give at most 3 numbers"):
        allocated((2, 4, 6, 8), 3)


@pytest.mark.parametrize("allocation", [(2, 4, 6, 8), (8, 6, 4, 2), (2, 8, 8, 2), (8, 2, 2, 8), (5, 5, 5, 5)])
def test_the_papers_parameters_of_llama_2_7b(allocation: tuple[int, ...]) -> None:
    """All its allocations have 160 experts in each place, rank 8: 105,635,840 parameters."""
    linears = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    experts = allocated(allocation, 32)
    pairs = {sizes: plain_pairs(LinearSizes(*sizes), (ONLY_PROJECTION,), LoraShape(8, 2.0, 0.05)).trained_numel for sizes in linears}
    ours = sum(number * (pairs[sizes] + sizes[0]) for number in experts for sizes in linears)
    assert ours == mola_parameters(linears, experts, 8) == 105_635_840
