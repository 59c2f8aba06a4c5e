from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hecate.experts.family import ExpertReplicas
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.parallel.values.units import Unit
from testing.ranks import run_ranks
from tests.hecate.experts.making import FFN, HIDDEN, SEED, base, experts, offsets


def test_the_layout_of_a_chunk() -> None:
    """A and B of each projection, in the projections' own order whatever order they were asked for in."""
    layout = experts(3, projections=("down_proj", "gate_proj")).layout()
    assert [(spec.name, spec.shape) for spec in layout.trainable] == [
        ("gate_proj.A", (2, HIDDEN)),
        ("gate_proj.B", (FFN, 2)),
        ("down_proj.A", (2, FFN)),
        ("down_proj.B", (HIDDEN, 2)),
    ]
    assert layout.frozen == ()
    assert offsets(layout) == {"gate_proj.A": (0, 12), "gate_proj.B": (12, 32), "down_proj.A": (32, 52), "down_proj.B": (52, 64)}


def test_chunks_are_cut_as_the_layout_says() -> None:
    family = experts(2)
    replicas = torch.arange(2 * family.layout().trainable_numel, dtype=torch.float64).view(2, -1)
    pairs = family.pair_source.stacked(replicas, torch.arange(2))
    for spec in family.layout().trainable:
        name, matrix = spec.name.split(".")
        start, end = offsets(family.layout())[spec.name]
        got = pairs[name].a_SrI if matrix == "A" else pairs[name].b_SOr
        assert torch.equal(got, torch.stack([row[start:end].view(spec.shape) for row in replicas])), spec.name


def test_an_expert_starts_as_the_base() -> None:
    family = experts(4)
    for expert in range(4):
        pairs = family.pair_source.stacked(family.init_chunk(expert)[None], torch.tensor([expert]))
        for name, lora in pairs.items():
            assert not lora.b_SOr.any(), name
            assert lora.a_SrI.any(), name
            assert float(lora.a_SrI.abs().max()) <= 1 / math.sqrt(lora.a_SrI.shape[-1])


def test_initial_chunks_depend_on_seed_layer_and_expert() -> None:
    first = experts(4).init_chunk(1)
    assert torch.equal(experts(9).init_chunk(1), first)
    others = (experts(4).init_chunk(2), experts(4, layer=1).init_chunk(1), experts(4, seed=SEED + 1).init_chunk(1))
    assert not any(torch.equal(other, first) for other in others)


def _initial(rank: int, world: int) -> dict[str, list[float]]:
    from hecate.engine.engine import Engine
    from hecate.engine.step_plans import EngineConfig
    from hecate.parallel.cluster.topology import local_topology
    from hecate.parallel.planners import POLICIES
    from hecate.ranks.groups import ExpertGroups

    group = dist.group.WORLD
    assert group is not None
    config = EngineConfig(POLICIES["static_ep"], local_topology(world, cuda=False))
    made = Engine({layer: experts(5, layer=layer) for layer in (0, 2)}, config, ExpertGroups(group, group))
    return {f"{layer}.{expert}": p.tolist() for (layer, expert), p in made.shards.named_parameters().items()}


def test_initial_values_do_not_depend_on_the_number_of_ranks() -> None:
    (alone,) = run_ranks(1, _initial)
    assert len(alone) == 10
    for world in (2, 3):
        parts = run_ranks(world, _initial)
        assert sum(map(len, parts)) == 10, "an expert has two owners, or none"
        assert {name: values for part in parts for name, values in part.items()} == alone


def test_cost_by_hand() -> None:
    """Three pairs of rank 2 over 6 and 10, 32 numbers of 8 bytes each; a row of 6 numbers, three products of it with 60 weights.

    An assignment: 2 · 2 · (6 + 10) FLOPs a pair, which backward runs once more and then twice for the gradients.
    """
    cost = experts(3).cost(top_k=2, non_moe_flops=5.0)
    assert cost.trainable_bytes == cost.reduced_bytes == 3 * 32 * 8
    assert cost.state_bytes == 3 * cost.trainable_bytes
    assert cost.frozen_bytes == 0
    assert (cost.top_k, cost.non_moe_flops) == (2, 5.0)
    assert (cost.row_bytes, cost.row_flops, cost.row_backward) == (6 * 8, 3 * 2 * 60, 1.0)
    assert (cost.assignment_flops, cost.assignment_backward) == (3 * 64, 3.0)
    one = experts(3, projections=("down_proj",)).cost(top_k=1, non_moe_flops=0.0)
    assert (one.trainable_bytes, one.assignment_flops, one.row_flops) == (32 * 8, 64, 360)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_keyed_by_seed_step_and_layer_and_only_for_training(training: bool) -> None:
    family = experts(2, layer=4, dropout=0.5)
    random = torch.Generator().manual_seed(0)
    replicas = torch.randn(2, family.layout().trainable_numel, generator=random, dtype=torch.float64)
    x, weight = torch.randn(5, HIDDEN, generator=random, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    slot, token, here = torch.tensor([[0], [1], [1], [0], [-1]]), torch.arange(5) + 50, torch.tensor([3, 8])
    got = family.compute(RoutedTokens(x, slot, weight, token, here), ExpertReplicas(replicas), 6 if training else None)
    dropout = Dropout(0.5, dropout_key(SEED, 6, 4)) if training else None
    pairs = family.pair_source.stacked(replicas, here)
    wanted = mixlora_ffn_reference(RoutedTokens(x, slot, weight, token, here), base(), pairs, dropout=dropout)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_units_of_one_layer_have_dropout_of_their_own() -> None:
    whole, linear = experts(2, layer=4, dropout=0.5), experts(2, layer=4, dropout=0.5)
    linear.site = replace(linear.site, unit=Unit(4, "mlp.up_proj"))
    chunks = torch.ones(2, whole.layout().trainable_numel, dtype=torch.float64)
    slots, weights = torch.tensor([[0], [1], [0]]), torch.ones(3, 1, dtype=torch.float64)
    routed = RoutedTokens(torch.ones(3, HIDDEN, dtype=torch.float64), slots, weights, torch.arange(3), torch.arange(2))
    first, second = (family.compute(routed, ExpertReplicas(chunks), 6) for family in (whole, linear))
    assert not torch.equal(first, second)


def test_the_result_depends_on_the_replicas_without_a_token() -> None:
    family = experts(2)
    replicas = torch.zeros(2, family.layout().trainable_numel, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, 1, dtype=torch.int64)
    routed = RoutedTokens(torch.zeros(0, HIDDEN, dtype=torch.float64), none, none.double(), none[:, 0], torch.arange(2))
    y = family.compute(routed, ExpertReplicas(replicas), step=0)
    y.sum().backward()
    assert replicas.grad is not None
    assert not replicas.grad.any()
