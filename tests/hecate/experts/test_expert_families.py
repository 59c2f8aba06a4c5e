"""Layout, initial values and cost of the families whose experts have weights of their own; what they compute is tested with the kernels."""

from __future__ import annotations

import math

import pytest
import torch

from hecate.experts.family import Site
from hecate.experts.full import FullExperts
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.kernels.common.ffn import FfnShape
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.units import Unit
from tests.hecate.experts.making import offsets

SHAPE = FfnShape(hidden=6, ffn=10, activation="silu")


def site(master: torch.dtype, compute: torch.dtype, *, layer: int = 0, seed: int = 3) -> Site:
    return Site(Unit(layer), 4, SHAPE, seed, master, compute, torch.device("cpu"))


def full(*, layer: int = 0, seed: int = 3) -> FullExperts:
    return FullExperts(site(torch.float64, torch.float32, layer=layer, seed=seed))


def moe_lora(dtype: torch.dtype = torch.bfloat16) -> MoeLoraExperts:
    def weights(expert: int) -> torch.Tensor:
        return torch.full((SHAPE.numel,), float(expert), dtype=torch.bfloat16)

    pairs = PlainPairs(LoraShape(rank=2, scale=0.5, dropout=0.0), ("gate_proj", "down_proj"), FfnSizes(6, 10))
    return MoeLoraExperts(site(torch.float32, dtype), weights, pairs)


def test_layouts() -> None:
    ffn = [("gate_proj", (10, 6)), ("up_proj", (10, 6)), ("down_proj", (6, 10))]
    layout = full().layout()
    assert [(spec.name, spec.shape) for spec in layout.trainable] == ffn
    assert layout.frozen == ()
    layout = moe_lora().layout()
    assert [(spec.name, spec.shape) for spec in layout.frozen] == ffn
    assert [spec.name for spec in layout.trainable] == ["gate_proj.A", "gate_proj.B", "down_proj.A", "down_proj.B"]


def test_the_kernels_views_of_a_chunk_are_the_layouts() -> None:
    layout, flat = full().layout(), torch.arange(SHAPE.numel)
    gate_up, down = SHAPE.matrices(flat)
    for spec, view in zip(layout.trainable, (gate_up[:10], gate_up[10:], down), strict=True):
        start, end = offsets(layout)[spec.name]
        assert torch.equal(view, flat[start:end].view(spec.shape)), spec.name


def test_no_chunks_have_the_form_of_chunks() -> None:
    """What a rank holds that owns no expert."""
    for family in (full(), moe_lora()):
        for none, one in ((family.no_chunks(), family.init_chunk(0)), (family.no_frozen_chunks(), family.frozen_chunk(0))):
            assert none.shape == (0, one.numel())
            assert (none.dtype, none.device) == (one.dtype, one.device)


def test_initial_chunks_depend_on_seed_layer_and_expert() -> None:
    first = full().init_chunk(1)
    assert torch.equal(full().init_chunk(1), first)
    assert not any(torch.equal(other, first) for other in (full().init_chunk(2), full(layer=1).init_chunk(1), full(seed=4).init_chunk(1)))
    gate_up, down = SHAPE.matrices(first)
    assert 0.8 / math.sqrt(6) < float(gate_up.abs().max()) <= 1 / math.sqrt(6)
    assert 0.8 / math.sqrt(10) < float(down.abs().max()) <= 1 / math.sqrt(10)


def test_an_adapted_expert_starts_as_the_bases() -> None:
    family = moe_lora()
    assert not any(lora.b_SOr.any() for lora in family.pair_source.stacked(family.init_chunk(2)[None], torch.tensor([2])).values())
    assert torch.equal(family.frozen_chunk(2), torch.full((180,), 2, dtype=torch.bfloat16))


def test_a_frozen_chunk_of_another_type_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        moe_lora(torch.float32).frozen_chunk(0)


def test_costs_by_hand() -> None:
    """180 weights an expert; pairs of rank 2 over 6 and 10 on two projections, 64 numbers. Full experts are gathered as computed."""
    cost = full().cost(2, 7.0)
    assert (cost.trainable_bytes, cost.reduced_bytes, cost.frozen_bytes, cost.state_bytes) == (180 * 4, 180 * 8, 0, 3 * 180 * 8)
    assert (cost.top_k, cost.row_bytes, cost.row_flops, cost.assignment_flops, cost.assignment_backward) == (2, 24, 0, 360, 2)
    assert cost.non_moe_flops == 7
    cost = moe_lora().cost(2, 7.0)
    assert (cost.trainable_bytes, cost.reduced_bytes, cost.frozen_bytes, cost.state_bytes) == (64 * 4, 64 * 4, 180 * 2, 3 * 64 * 4)
    assert (cost.row_bytes, cost.row_flops, cost.assignment_flops) == (12, 0, 360 + 128)
    # Backward: the frozen weights once; of each pair A once more, and both twice for their gradients.
    assert cost.assignment_backward * cost.assignment_flops == 360 + 2.5 * 128
