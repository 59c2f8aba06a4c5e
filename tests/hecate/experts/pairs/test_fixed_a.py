"""Pairs whose A is drawn and fixed are plain pairs with that A, of which B alone is trained, owned and moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.family import ExpertReplicas, Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.pairs.source_table import PAIR_SOURCES
from hecate.experts.pairs.sources.fixed_a import FixedA
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnShape
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import MIXLORA, FfnSizes, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups
from tests.hecate.experts.making import FFN, HIDDEN, base
from tests.hecate.model.tiny import tiny

EXPERTS, TOKENS = 3, 12
PROJECTIONS = ("gate_proj", "down_proj")
LORA = LoraShape(rank=2, scale=0.5, dropout=0.0, source="fixed_a")
PLAIN = LoraShape(rank=2, scale=0.5, dropout=0.0)


def site(unit: int = 1, seed: int = 3, dtype: torch.dtype = torch.float64) -> Site:
    return Site(Unit(unit), EXPERTS, FfnShape(HIDDEN, FFN, "silu"), seed, dtype, dtype, torch.device("cpu"))


def chunks_and_pairs(**of_site: Any) -> tuple[FixedA, torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A source, random chunks, and A and B of the first of them by projection."""
    source = FixedA(site(**of_site), LORA, PROJECTIONS)
    chunks_SC = torch.randn(EXPERTS, source.sizes.trained_numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = source.stacked(chunks_SC, torch.arange(EXPERTS))
    return source, chunks_SC, {name: (of.a_SrI[0], of.b_SOr[0]) for name, of in pairs.items()}


def test_it_is_plain_pairs_whose_a_has_no_gradient() -> None:
    """Outputs, gradients of the tokens and of B are those of plain pairs with the same A, to the bit; they need no dA for that."""
    fixed = MixLoraExperts(site(), base(), FixedA(site(), LORA, PROJECTIONS))
    plain = MixLoraExperts(site(), base(), PlainPairs(PLAIN, PROJECTIONS, FfnSizes(HIDDEN, FFN)))
    _, chunks_SC, _ = chunks_and_pairs()
    pairs = fixed.pair_source.stacked(chunks_SC, torch.arange(EXPERTS))
    whole_SC = torch.stack(
        [plain.pair_source.chunk_of(e, {name: (of.a_SrI[e], of.b_SOr[e]) for name, of in pairs.items()}) for e in range(EXPERTS)]
    )
    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    slot, weight = torch.arange(2 * TOKENS).view(-1, 2) % EXPERTS, torch.rand(TOKENS, 2, generator=random, dtype=torch.float64)
    found = []
    for family, chunks in ((fixed, chunks_SC), (plain, whole_SC)):
        leaf, x_leaf = chunks.clone().requires_grad_(), x.clone().requires_grad_()
        y = family.compute(RoutedTokens(x_leaf, slot, weight, None, torch.arange(EXPERTS)), ExpertReplicas(leaf), None)
        y.square().sum().backward()
        found.append((y.detach(), x_leaf.grad, leaf.grad))
    (y, dx, dchunk), (y_plain, dx_plain, dwhole) = found
    assert y_plain.equal(y)
    assert dx_plain is not None
    assert dx is not None
    assert dx.equal(dx_plain)
    sizes = [spec.numel for spec in plain.pair_source.sizes.trained]
    assert dwhole is not None
    assert dchunk is not None
    assert dchunk.equal(torch.cat(dwhole.split(sizes, dim=1)[1::2], dim=1))


def test_a_chunk_holds_b_alone_and_begins_with_zeros() -> None:
    source, chunks_SC, pairs = chunks_and_pairs()
    assert [spec.name for spec in source.sizes.trained] == ["gate_proj.B", "down_proj.B"]
    assert source.sizes.trained_numel == 2 * (FFN + HIDDEN)
    assert not source.initial(0, 3, "expert", "1", 0).any()
    assert source.chunk_of(0, pairs).equal(chunks_SC[0])


def test_on_smollm2_57_6_percent_of_plain_pairs_are_owned_and_travel() -> None:
    sizes, all_three = FfnSizes(576, 1536), ("gate_proj", "up_proj", "down_proj")
    numbers = {name: PAIR_SOURCES[name].sizes(sizes, all_three, LoraShape(16, 1.0, 0.0, name)) for name in ("plain", "fixed_a")}
    assert numbers["fixed_a"].trained_numel / numbers["plain"].trained_numel == pytest.approx(0.576, abs=5e-4)
    assert numbers["fixed_a"].flops == numbers["plain"].flops
    assert numbers["plain"].trained_numel == sum(spec.numel for spec in (*numbers["fixed_a"].trained, *numbers["fixed_a"].seeded))


def drawn(**of_site: Any) -> list[torch.Tensor]:
    return [a_rI.clone() for a_rI, _ in chunks_and_pairs(**of_site)[2].values()]


def test_a_depends_on_names_alone() -> None:
    """So every rank draws the same, whatever its random state."""
    ours = drawn()
    torch.manual_seed(17)
    assert all(again.equal(mine) for again, mine in zip(drawn(), ours, strict=True))
    for other in (drawn(seed=4), drawn(unit=2)):
        assert not any(matrix.equal(mine) for matrix, mine in zip(other, ours, strict=True))
    assert all(single.equal(mine) for single, mine in zip(drawn(dtype=torch.float32), [a.float().double() for a in ours], strict=True))


def test_the_mean_of_adapters_is_the_mean_of_their_differences() -> None:
    """What FFA-LoRA is for: mean(B) A = mean(B A), where plain pairs have cross terms."""
    source, chunks_SC, _ = chunks_and_pairs()
    mean = source.stacked(chunks_SC.mean(0, keepdim=True), torch.arange(1))
    for name, of in source.stacked(chunks_SC, torch.arange(EXPERTS)).items():
        torch.testing.assert_close(mean[name].b_SOr[0] @ mean[name].a_SrI[0], (of.b_SOr @ of.a_SrI).mean(0), rtol=1e-14, atol=1e-14)


def test_an_adapter_with_another_a_is_refused() -> None:
    *_, pairs = chunks_and_pairs(seed=4)
    with pytest.raises(UserError, match=r"(?s)A of expert 1\.2, gate_proj is not the one .*\n  give the seed .* or lora\.pairs=plain"):
        FixedA(site(), LORA, PROJECTIONS).chunk_of(2, pairs)


def inserted(group: dist.ProcessGroup, seed: int = 1) -> MoeModel:
    model = tiny("llama")
    targets = ("q_proj", "up_proj", "down_proj")
    plan = InsertionPlan(kind=MIXLORA, experts_per_layer=(3, 0, 2), top_k=2, lora=LORA, target_modules=targets, seed=seed)
    engine = EngineConfig(POLICIES["full"], local_topology(1, cuda=False))
    return insert_experts(model, find_gated_ffns(model), plan, engine, ExpertGroups(group, group))


def test_the_attention_s_a_is_fixed_too(one_rank: dist.ProcessGroup) -> None:
    moe, again, other = inserted(one_rank), inserted(one_rank), inserted(one_rank, seed=2)
    assert [name for name in moe.replicated_parameters() if "q_proj" in name] == [f"layers.{n}.self_attn.q_proj.B" for n in range(3)]
    assert not any("lora_A" in name for name in moe.model.state_dict())
    assert moe.drawn_digest == again.drawn_digest != other.drawn_digest
    for key, lora in moe.attention.items():
        a, b = lora.lora_A, torch.ones_like(lora.lora_B)
        assert a.equal(again.attention[key].lora_A)
        again.attention[key].set_pair(a.float(), b)
        assert again.attention[key].lora_A.equal(a)
        assert again.attention[key].lora_B.equal(b)
        with pytest.raises(UserError, match=r"A of layer \d\.self_attn\.q_proj is not the one"):
            other.attention[key].set_pair(a.float(), b)
