"""A pair source is told which experts are in the slots: here each expert has an A of its own, which is drawn and never travels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import ExpertReplicas, Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs, plain_pairs
from hecate.experts.seeding import generator, linear_weight
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.kernels.mixlora.torch_path import mixlora_ffn
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape, PairSizes
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from testing.ranks import run_ranks
from tests.hecate.experts.making import FFN, HIDDEN, SEED, base

EXPERTS, TOKENS = 5, 12
LORA = LoraShape(rank=2, scale=0.5, dropout=0.0)
SIZES = FfnSizes(HIDDEN, FFN)
UNIT = Unit(1)


class SeededA:
    """A `PairSource`: B is trained, and every expert has its own A, drawn from the expert's name."""

    drawn_digest = ""

    def __init__(self, num_experts: int, lora: LoraShape, projections: tuple[str, ...]) -> None:
        self.lora, self.projections = lora, projections
        plain = plain_pairs(SIZES, projections, lora)
        self.sizes = PairSizes(tuple(spec for spec in plain.trained if spec.name.endswith(".B")), plain.flops)
        self._a_ErI = {name: torch.stack([self._drawn(expert, name) for expert in range(num_experts)]) for name in projections}

    def _drawn(self, expert: int, projection: str) -> torch.Tensor:
        return linear_weight(self.lora.rank, SIZES.of_projection(projection)[0], generator("A", str(UNIT), expert, projection))

    def initial(self, expert: int, *key: int | str) -> torch.Tensor:
        return torch.zeros(self.sizes.trained_numel, dtype=torch.float64)

    def stacked(self, replicas_SC: torch.Tensor, expert_S: torch.Tensor) -> dict[str, LowRankPairs]:
        parts = replicas_SC.split([spec.numel for spec in self.sizes.trained], dim=1)
        return {
            name: LowRankPairs(self._a_ErI[name][expert_S], part.view(-1, *spec.shape), self.lora.scale)
            for name, part, spec in zip(self.projections, parts, self.sizes.trained, strict=True)
        }

    def chunk_of(self, expert: int, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        assert all(torch.equal(pairs[name][0], self._a_ErI[name][expert]) for name in self.projections), "another expert's A"
        return torch.cat([pairs[name][1].flatten() for name in self.projections])


def seeded() -> MixLoraExperts:
    double = torch.float64
    site = Site(UNIT, EXPERTS, FfnShape(HIDDEN, FFN, "silu"), SEED, double, double, torch.device("cpu"))
    return MixLoraExperts(site, base(), SeededA(EXPERTS, LORA, ("gate_proj", "down_proj")))


def chunks() -> torch.Tensor:
    """B of every expert."""
    random = torch.Generator().manual_seed(2)
    return torch.randn(EXPERTS, seeded().layout().trainable_numel, generator=random, dtype=torch.float64)


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    expert = torch.rand(TOKENS, EXPERTS, generator=random).argsort(1)[:, :2]
    return x, expert, torch.rand(TOKENS, 2, generator=random, dtype=torch.float64)


def test_slots_hold_any_experts() -> None:
    family, plain = seeded(), PlainPairs(LORA, ("gate_proj", "down_proj"), SIZES)
    in_slots = torch.tensor([3, 1, 4])
    pairs = family.pair_source.stacked(chunks()[in_slots], in_slots)
    for slot, expert in enumerate(in_slots.tolist()):
        one = {name: (of.a_SrI[slot], of.b_SOr[slot]) for name, of in pairs.items()}
        assert torch.equal(family.pair_source.chunk_of(expert, one), chunks()[expert])
        whole = plain.stacked(plain.chunk_of(expert, one)[None], in_slots[slot : slot + 1])
        assert all(torch.equal(whole[name].a_SrI[0], pairs[name].a_SrI[slot]) for name in pairs)
    x, _, weight = tokens()
    slot_TK = torch.arange(TOKENS * 2).view(-1, 2) % 3
    got = family.compute(RoutedTokens(x, slot_TK, weight, None, in_slots), ExpertReplicas(chunks()[in_slots]), None)
    wanted = mixlora_ffn_reference(
        RoutedTokens(x, in_slots[slot_TK], weight), base(), family.pair_source.stacked(chunks(), torch.arange(EXPERTS))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


RANKS = (1, 4, 2, 4, 3)


def test_experts_of_other_ranks_are_padded_and_scaled_by_their_own() -> None:
    """An FFN's experts, slot by slot in any order, beside each expert's pairs of its own rank and scale; nothing reaches the padding."""
    projections = ("gate_proj", "up_proj", "down_proj")
    lora = LoraShape(4, 0.5, 0.0, of_experts=tuple((rank, 2.0 / rank) for rank in RANKS))
    source, in_slots = PlainPairs(lora, projections, SIZES), torch.tensor([3, 0, 4, 2])
    initial = [source.initial(expert, SEED, "expert", str(UNIT), expert) for expert in range(len(RANKS))]
    random = torch.Generator().manual_seed(3)
    chunks, own = [], []
    for expert, rank in enumerate(RANKS):
        plain = PlainPairs(LoraShape(rank, 2.0 / rank, 0.0), projections, SIZES)
        small = torch.randn(plain.sizes.trained_numel, generator=random, dtype=torch.float64).requires_grad_()
        small_pairs = plain.stacked(small[None], torch.zeros(1, dtype=torch.int64))
        begun = plain.stacked(plain.initial(expert, SEED, "expert", str(UNIT), expert)[None], torch.zeros(1, dtype=torch.int64))
        padded = {}
        for name, of in small_pairs.items():
            a, b = of.a_SrI[0].detach(), of.b_SOr[0].detach()
            padded[name] = F.pad(a, (0, 0, 0, 4 - rank)), F.pad(b, (0, 4 - rank)) * (4 / rank)
            drawn = source.stacked(initial[expert][None], torch.tensor([expert]))[name].a_SrI[0]
            assert torch.equal(drawn, F.pad(begun[name].a_SrI[0], (0, 0, 0, 4 - rank)))
        chunks.append(source.chunk_of(expert, padded))
        own.append((small, small_pairs))
    replicas = torch.stack([chunks[expert] for expert in in_slots]).requires_grad_()
    x, _, weight = tokens()
    slot_TK = torch.arange(TOKENS * 2).view(-1, 2) % 4
    got = mixlora_ffn(RoutedTokens(x, slot_TK, weight), base(), source.stacked(replicas, in_slots))
    wanted = torch.zeros_like(got)
    for slot, expert in enumerate(in_slots.tolist()):
        only = RoutedTokens(x, torch.where(slot_TK == slot, 0, -1), weight)
        wanted = wanted + mixlora_ffn_reference(only, base(), own[expert][1])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert replicas.grad is not None
    for slot, expert in enumerate(in_slots.tolist()):
        gradients = zip(source.sizes.trained, replicas.grad[slot].split([spec.numel for spec in source.sizes.trained]), strict=True)
        parts = []
        for spec, part in gradients:
            of_a, rank = spec.name.endswith(".A"), RANKS[expert]
            of_rows = part.view(spec.shape) if of_a else part.view(spec.shape).T
            assert not of_rows[rank:].any(), spec.name
            parts.append(of_rows[:rank].flatten() if of_a else of_rows[:rank].T.flatten())
        torch.testing.assert_close(torch.cat(parts), own[expert][0].grad, rtol=1e-11, atol=1e-12)


def test_half_as_much_travels_and_as_much_is_computed() -> None:
    double = torch.float64
    site = Site(UNIT, EXPERTS, FfnShape(HIDDEN, FFN, "silu"), SEED, double, double, torch.device("cpu"))
    plain = MixLoraExperts(site, base(), PlainPairs(LORA, ("gate_proj", "down_proj"), SIZES)).cost(2, 0.0)
    ours = seeded().cost(2, 0.0)
    assert (ours.trainable_bytes, plain.trainable_bytes) == (8 * 2 * (FFN + HIDDEN), 8 * 2 * 2 * (FFN + HIDDEN))
    assert (ours.assignment_flops, ours.assignment_backward) == (plain.assignment_flops, plain.assignment_backward)


def _train(rank: int, world: int, policy: str) -> None:
    """A step of all ranks is a step of one process, whatever experts a rank has in its slots."""
    config = EngineConfig(POLICIES[policy], local_topology(world, cuda=False), top_k=2)
    engine = Engine({UNIT: seeded()}, config, expert_groups(make_mesh(world)))
    for (_, expert), parameter in engine.shards.named_parameters().items():
        parameter.data.copy_(chunks()[expert])
    x, chosen, weight = tokens()
    mine = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    step = engine.begin_step(0)
    micro = step.begin_micro_step()
    y = micro.experts(UNIT, x[mine].requires_grad_(), chosen[mine], weight[mine], torch.arange(TOKENS)[mine])
    micro.backward(y.square().sum())
    step.finish()
    all_chunks = chunks().requires_grad_()
    wanted = mixlora_ffn_reference(RoutedTokens(x, chosen, weight), base(), seeded().pair_source.stacked(all_chunks, torch.arange(EXPERTS)))
    wanted.square().sum().backward()
    torch.testing.assert_close(y.detach(), wanted[mine].detach(), rtol=1e-12, atol=1e-12)
    assert all_chunks.grad is not None
    for (_, expert), parameter in engine.shards.named_parameters().items():
        torch.testing.assert_close(parameter.grad, all_chunks.grad[expert], rtol=1e-12, atol=1e-12)
    dist.barrier()


@pytest.mark.parametrize("policy", ["static_ep", "full"])
def test_a_source_with_an_a_for_each_expert_trains_on_two_ranks(policy: str) -> None:
    run_ranks(2, _train, policy)
