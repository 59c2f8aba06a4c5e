"""Pairs of shards of a pool: which shards, what trains, and how large a pool is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hecate.errors import UserError
from hecate.experts.family import ExpertReplicas, Site, UnitExperts
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs.source import PairSource
from hecate.experts.pairs.source_table import PAIR_SOURCES
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.experts.pairs.sources.shards import ShardPairs
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnShape
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LinearSizes, LoraShape, ShardShape
from hecate.parallel.values.units import Unit, expert_name, parse_unit
from tests.hecate.experts.making import FFN, HIDDEN, base

PEERS = ((Unit(0), 3), (Unit(2), 2))
PROJECTIONS = ("gate_proj", "down_proj")
TOKENS = 12


def lora(rank: int = 3, equivalent: int = 2, per_vector: int = 2, private: int = 1, source: str = "shards") -> LoraShape:
    return LoraShape(rank, 0.5, 0.0, source, shards=ShardShape(equivalent, per_vector, private))


def site(layer: int = 2, seed: int = 3, peers: tuple[tuple[Unit, int], ...] = PEERS) -> Site:
    experts = dict(peers)[Unit(layer)]
    shape, dtype = FfnShape(HIDDEN, FFN, "silu"), torch.float64
    return Site(Unit(layer), experts, shape, seed, dtype, dtype, torch.device("cpu"), peers=peers)


def shards(layer: int = 2, seed: int = 3, names: tuple[str, ...] = PROJECTIONS, **of_lora: Any) -> ShardPairs:
    return ShardPairs(site(layer, seed), lora(**of_lora), names)


def family(kind: str, layer: int, pairs: PairSource) -> UnitExperts:
    if kind == "mixlora":
        return MixLoraExperts(site(layer), base(), pairs)
    own = torch.randn(3, 3 * HIDDEN * FFN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return MoeLoraExperts(site(layer), lambda expert: own[expert], pairs)


def computed(experts: UnitExperts, leaf: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    number = experts.num_experts
    slot = torch.arange(2 * TOKENS).view(-1, 2) % number
    weight = torch.full(slot.shape, 0.5, dtype=torch.float64)
    frozen = [experts.frozen_chunk(expert) for expert in range(number)] if experts.layout().frozen else []
    return experts.compute(RoutedTokens(x, slot, weight, None, torch.arange(number)), ExpertReplicas(leaf, frozen), None)


@pytest.mark.parametrize("layer", [0, 2])
def test_with_private_shards_alone_it_is_plain_lora_exactly(layer: int) -> None:
    """Of rank e = r = p, from the same initial values: the same outputs, and the same gradients in the blocks of its own experts."""
    own, plain = shards(layer, rank=2, private=2), PlainPairs(lora(2, source="plain"), PROJECTIONS, site().sizes)
    ours, theirs = family("mixlora", layer, own), family("mixlora", layer, plain)
    pool = ours.pool
    assert pool is not None
    assert pool.num_experts == 5
    blocks = torch.stack([pool.init_chunk(block) for block in range(5)])
    chunks = torch.stack([theirs.init_chunk(expert) for expert in range(theirs.num_experts)])
    assert ours.init_chunk(0).shape == (0,)
    pairs = {name: theirs.pair_source.stacked(chunks, torch.arange(len(chunks)))[name] for name in PROJECTIONS}
    for name, pair in ours.pair_source.stacked(blocks, torch.arange(len(chunks))).items():
        assert pair.a_SrI.equal(pairs[name].a_SrI)
        assert pair.b_SOr.equal(pairs[name].b_SOr)
    first, found = (0 if layer == 0 else 3), []
    with torch.no_grad():  # another B than zero, whose columns lie as rows in a block
        for expert, chunk in enumerate(chunks):
            for start, outputs in ((2 * HIDDEN, FFN), (2 * HIDDEN + 2 * FFN + 2 * FFN, HIDDEN)):
                b_Or = torch.randn(outputs, 2, generator=torch.Generator().manual_seed(expert), dtype=torch.float64)
                chunk[start : start + 2 * outputs] = b_Or.flatten()
                blocks[first + expert, start : start + 2 * outputs] = b_Or.T.flatten()
    for experts, values in ((ours, blocks), (theirs, chunks)):
        leaf = values.clone().requires_grad_()
        y = computed(experts, leaf, torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        y.square().sum().backward()
        assert leaf.grad is not None
        found.append((y.detach(), leaf.grad))
    assert found[0][0].equal(found[1][0])
    of_blocks = found[0][1]
    a = slice(0, 2 * HIDDEN)
    assert of_blocks[first : first + len(chunks), a].equal(found[1][1][:, a])
    b = of_blocks[first : first + len(chunks), 2 * HIDDEN : 2 * HIDDEN + 2 * FFN].view(-1, 2, FFN).transpose(1, 2)
    assert b.equal(found[1][1][:, 2 * HIDDEN : 2 * HIDDEN + 2 * FFN].view(-1, FFN, 2))
    others = [block for block in range(5) if not first <= block < first + len(chunks)]
    assert not of_blocks[others].any()


@pytest.mark.parametrize("kind", ["mixlora", "moe_lora"])
def test_the_gradient_of_a_pool_is_that_of_index_select(kind: str) -> None:
    """Beside plain pairs of the same A and B: the pool's gradient is theirs, at the places from which index_select has taken the shards."""
    names = PROJECTIONS if kind == "mixlora" else ("gate_up_proj", "down_proj")
    source, plain = shards(names=names), PlainPairs(lora(source="plain"), names, site().sizes)
    random = torch.Generator().manual_seed(1)
    pool = torch.randn(5, source.sizes.pooled_numel, generator=random, dtype=torch.float64)
    x = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    ours, theirs = family(kind, 2, source), family(kind, 2, plain)
    leaf = pool.clone().requires_grad_()
    y = computed(ours, leaf, x)
    y.square().sum().backward()

    again, start, pairs = pool.clone().requires_grad_(), 0, []
    for name in source.projections:
        of_name = []
        for spec in source.sizes.pooled:
            if spec.name.startswith(f"{name}."):
                flat = again[:, start : start + spec.numel].reshape(-1, spec.shape[1] // 2)
                start += spec.numel
                of_name.append(torch.stack([flat.index_select(0, row).view(3, -1) for row in source.index(spec.name)]))
        pairs.append((of_name[0], of_name[1].transpose(1, 2)))
    chunks = torch.cat([matrix.flatten(1) for pair in pairs for matrix in pair], dim=1)
    y_plain = computed(theirs, chunks, x)
    y_plain.square().sum().backward()
    torch.testing.assert_close(y, y_plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "equivalent", "per_vector", "private"), [(3, 2, 2, 1), (5, 3, 2, 2), (2, 1, 1, 0), (6, 2, 2, 1)])
def test_no_shard_comes_twice_and_private_ones_are_nobody_else_s(rank: int, equivalent: int, per_vector: int, private: int) -> None:
    of_block, taken = equivalent * per_vector, []
    for layer, experts in PEERS:
        source = shards(layer.layer, rank=rank, equivalent=equivalent, per_vector=per_vector, private=private)
        for tensor in ("gate_proj.A", "gate_proj.B", "down_proj.A"):
            index = source.index(tensor)
            assert index.shape == (experts, rank * per_vector)
            assert all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < 5 * of_block for row in index.tolist())
        assert not source.index("gate_proj.A").equal(source.index("gate_proj.B"))
        assert not source.index("gate_proj.A").equal(source.index("down_proj.A"))
        taken += source.index("gate_proj.A").tolist()
    for block, row in enumerate(taken):
        own = set(range(block * of_block, block * of_block + private * per_vector))
        assert own <= set(row)
        assert not any(own & set(other) for number, other in enumerate(taken) if number != block)
    public = {tuple(row[: (rank - private) * per_vector]) for row in taken}
    assert len(public) >= 4, "each takes others of the public ones, or in another order"


def test_the_index_follows_from_names_alone() -> None:
    """Not from what was drawn before, the number of threads, or who asks first."""
    first, second = shards(0), shards(2)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = shards(2), shards(0)
    finally:
        torch.set_num_threads(threads)
    assert [one.drawn_digest for one in (second, first)] == [one.drawn_digest for one in again]
    assert len({first.drawn_digest, second.drawn_digest, shards(0, seed=4).drawn_digest}) == 3


def test_a_pool_has_as_many_numbers_as_the_paper_says() -> None:
    """Of LLaMA-2-7B, table 1 of the paper: with e 2 an eighth of what LoRA r 16 has, with e 8 an eighth of r 64."""
    hidden, ffn, layers = 4096, 11008, 32
    linears = [(hidden, hidden)] * 4 + [(hidden, ffn)] * 2 + [(ffn, hidden)]
    found = {}
    for equivalent in (2, 8):
        shape = LoraShape(16, 1.0, 0.0, "shards", shards=ShardShape(equivalent, 4, 1))
        sizes = [PAIR_SOURCES["shards"].sizes(LinearSizes(*linear), [ONLY_PROJECTION], shape) for linear in linears]
        assert not any(one.trained for one in sizes)
        found[equivalent] = layers * sum(one.pooled_numel for one in sizes)
    plain = [PAIR_SOURCES["plain"].sizes(LinearSizes(*linear), [ONLY_PROJECTION], LoraShape(64, 1.0, 0.0)) for linear in linears]
    assert (found, layers * sum(one.trained_numel for one in plain)) == ({2: 4_997_120, 8: 19_988_480}, 159_907_840)


def test_a_pool_s_name_is_no_unit_s_and_parses_back() -> None:
    experts = family("mixlora", 2, shards())
    pool = experts.pool
    assert pool is not None
    assert expert_name(pool.unit, 4) == "0.ffn.pool.4"
    assert parse_unit(str(pool.unit)) == pool.unit
    assert family("mixlora", 0, shards(0)).pool.unit == pool.unit  # type: ignore[union-attr]


def test_sizes_that_cannot_be_cut_or_filled_are_refused() -> None:
    with pytest.raises(UserError, match=r"per_vector: 5 does not divide the 6 inputs and the 10 outputs of gate_proj\n  vectors are cut"):
        shards(per_vector=5)
    with pytest.raises(UserError, match=r"per_vector: 3 does not divide .* of one of lora\.target_modules"):
        PAIR_SOURCES["shards"].sizes(LinearSizes(9, 10), [ONLY_PROJECTION], lora(per_vector=3))
    what = r"takes the shards of 6 public vectors \(lora\.r 7 - private_rank 1\), but its pool has 5\n  of each of the 5 pairs"
    with pytest.raises(UserError, match=what):
        shards(rank=7)
    with pytest.raises(UserError, match="but its pool has 0"):
        shards(rank=3, private=2)


def test_an_adapter_does_not_say_of_which_shards_it_is_made() -> None:
    with pytest.raises(UserError, match=r"lora\.pairs: shards: training cannot begin with .*\n  leave lora\.init_from out"):
        shards().chunk_of(0, {})
