"""Pairs that are sums of drawn matrices: which matrices, what trains of them, and what a step does to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hecate.checkpoint.train_state import refuse_other_run
from hecate.config import Config, DataConfig, DataSource, LoraConfig, ModelConfig, to_yaml
from hecate.errors import UserError
from hecate.experts.family import ExpertReplicas, Site, UnitExperts
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs.source_table import PAIR_SOURCES, trains_a
from hecate.experts.pairs.sources.nola import Nola
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.experts.seeding import combined_digest, digest_of_drawn
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnShape
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.units import Unit
from tests.hecate.experts.making import FFN, HIDDEN, base

EXPERTS, TOKENS, BASES, RANK = 3, 12, 4, 2
PROJECTIONS = ("gate_proj", "down_proj")
OF_KIND = {"mixlora": PROJECTIONS, "moe_lora": ("gate_up_proj", "down_proj")}


def lora(source: str = "nola", bases: int = BASES) -> LoraShape:
    return LoraShape(rank=RANK, scale=0.5, dropout=0.0, source=source, bases=bases)


def site(unit: int = 1, seed: int = 3, dtype: torch.dtype = torch.float64) -> Site:
    return Site(Unit(unit), EXPERTS, FfnShape(HIDDEN, FFN, "silu"), seed, dtype, dtype, torch.device("cpu"))


def nola(bases: int = BASES, **of_site: Any) -> Nola:
    return Nola(site(**of_site), lora(bases=bases), PROJECTIONS)


def family(kind: str, pairs: Nola | PlainPairs) -> UnitExperts:
    if kind == "mixlora":
        return MixLoraExperts(site(), base(), pairs)
    own = torch.randn(EXPERTS, 3 * HIDDEN * FFN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return MoeLoraExperts(site(), lambda expert: own[expert], pairs)


def test_a_chunk_holds_coefficients_alone_whatever_the_projection_s_size() -> None:
    source = nola()
    assert [(spec.name, spec.shape) for spec in source.sizes.trained] == [
        ("gate_proj.a", (BASES,)),
        ("gate_proj.b", (BASES,)),
        ("down_proj.a", (BASES,)),
        ("down_proj.b", (BASES,)),
    ]
    pair = source.stacked(source.initial(0)[None], torch.arange(1))["gate_proj"]
    assert pair.a_SrI[0].equal(source.drawn["gate_proj.A0"]), "without A0 neither A nor B would have a gradient"
    assert not pair.b_SOr.any(), "an expert begins as the base"
    smollm2, all_three = FfnSizes(576, 1536), ("gate_proj", "up_proj", "down_proj")
    numbers = {name: PAIR_SOURCES[name].sizes(smollm2, all_three, LoraShape(16, 1.0, 0.0, name)) for name in ("plain", "nola")}
    assert (4 * numbers["nola"].trained_numel, 4 * numbers["plain"].trained_numel) == (6144, 405504)
    assert numbers["nola"].flops == numbers["plain"].flops


def test_one_coefficient_is_one_drawn_matrix() -> None:
    source = nola()
    chunks_SC = torch.zeros(2, 4 * BASES, dtype=torch.float64)
    chunks_SC[0, 2], chunks_SC[1, 3 * BASES + 1] = 1, 1  # a_2 of gate_proj; b_1 of down_proj
    pairs = source.stacked(chunks_SC, torch.arange(2))
    drawn, root = source.drawn, BASES**0.5
    torch.testing.assert_close(pairs["gate_proj"].a_SrI[0] - drawn["gate_proj.A0"], drawn["gate_proj.U"][2] / root)
    torch.testing.assert_close(pairs["down_proj"].b_SOr[1], drawn["down_proj.V"][1] / root)
    for rest in (pairs["gate_proj"].b_SOr, pairs["down_proj"].b_SOr[0], pairs["down_proj"].a_SrI - drawn["down_proj.A0"]):
        assert not rest.any()


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_coefficient_s_gradient_is_its_matrix_s_part_of_the_pair_s_gradient(kind: str) -> None:
    """Beside plain pairs of the same A and B: the same outputs and dx, and da_i = <dA, U_i> / sqrt(K), db_i = <dB, V_i> / sqrt(K)."""
    names = OF_KIND[kind]
    source, plain = Nola(site(), lora(), names), PlainPairs(lora("plain"), names, FfnSizes(HIDDEN, FFN))
    random = torch.Generator().manual_seed(1)
    chunks_SC = torch.randn(EXPERTS, source.sizes.trained_numel, generator=random, dtype=torch.float64)
    made = source.stacked(chunks_SC, torch.arange(EXPERTS))
    whole_SC = torch.stack([plain.chunk_of(e, {name: (of.a_SrI[e], of.b_SOr[e]) for name, of in made.items()}) for e in range(EXPERTS)])
    x = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    slot, weight = torch.arange(2 * TOKENS).view(-1, 2) % EXPERTS, torch.rand(TOKENS, 2, generator=random, dtype=torch.float64)
    found = []
    for pairs, chunks in ((source, chunks_SC), (plain, whole_SC)):
        experts, leaf, x_leaf = family(kind, pairs), chunks.clone().requires_grad_(), x.clone().requires_grad_()
        frozen = [experts.frozen_chunk(e) for e in range(EXPERTS)] if kind == "moe_lora" else []
        y = experts.compute(RoutedTokens(x_leaf, slot, weight, None, torch.arange(EXPERTS)), ExpertReplicas(leaf, frozen), None)
        y.square().sum().backward()
        found.append((y.detach(), x_leaf.grad, leaf.grad))
    (y, dx, dchunk), (y_plain, dx_plain, dwhole) = found
    torch.testing.assert_close(y, y_plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, dx_plain, rtol=1e-12, atol=1e-12)
    assert dwhole is not None
    assert dchunk is not None
    gradients = dict(zip([spec.name for spec in plain.sizes.trained], dwhole.split([s.numel for s in plain.sizes.trained], 1), strict=True))
    wanted = []
    for name in names:
        for letter, matrices in (("A", "U"), ("B", "V")):
            each = [(gradients[f"{name}.{letter}"] * drawn.flatten()).sum(1) for drawn in source.drawn[f"{name}.{matrices}"]]
            wanted.append(torch.stack(each, dim=1) / BASES**0.5)
    torch.testing.assert_close(dchunk, torch.cat(wanted, dim=1), rtol=1e-10, atol=1e-12)


def test_autograd_keeps_nothing_of_a_chunk_but_views() -> None:
    """The engine frees and refills a chunk's memory between forward and backward pass."""
    source, kept = nola(), []
    chunks_SC = torch.randn(EXPERTS, source.sizes.trained_numel, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        pairs = source.stacked(chunks_SC, torch.arange(EXPERTS))
    drawn = {tensor.untyped_storage().data_ptr() for tensor in source.drawn.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= drawn | {chunks_SC.untyped_storage().data_ptr()}
    sum((of.a_SrI.sum() + of.b_SOr.sum() for of in pairs.values()), torch.zeros(())).backward()
    before, chunks_SC.grad = chunks_SC.grad, None
    pairs = source.stacked(chunks_SC, torch.arange(EXPERTS))
    chunks_SC.data.fill_(float("nan"))
    sum((of.a_SrI.sum() + of.b_SOr.sum() for of in pairs.values()), torch.zeros(())).backward()
    assert chunks_SC.grad is not None
    assert chunks_SC.grad.equal(before)


def test_with_as_many_bases_as_numbers_any_a_is_a_sum_of_them() -> None:
    numbers = RANK * HIDDEN
    source = nola(bases=numbers)
    orthonormal = torch.linalg.qr(source.drawn["gate_proj.U"].flatten(1)).Q
    source.drawn["gate_proj.U"].copy_(orthonormal.view(numbers, RANK, HIDDEN) * numbers**0.5)
    wanted = torch.randn(RANK, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start, columns = source.drawn["gate_proj.A0"], source.drawn["gate_proj.U"].flatten(1).T / numbers**0.5
    chunk = source.initial(0)
    chunk[:numbers] = torch.linalg.lstsq(columns, (wanted - start).flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(source.stacked(chunk[None], torch.arange(1))["gate_proj"].a_SrI[0], wanted, rtol=1e-12, atol=1e-12)


PINNED = "82598d4df06964b3ac6846d6f84e4aac"
"""of the matrices of seed 3: whoever changes how they are drawn makes checkpoints of earlier versions useless"""


def test_what_is_drawn_depends_on_names_alone() -> None:
    """Each source is gone before the next one draws. With 4000 bases there are enough numbers for torch to share out among threads."""
    threads, digests = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(number)
            digests.add(nola(bases=4000).drawn_digest)
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1
    ours, single = nola(), nola(dtype=torch.float32)
    assert ours.drawn_digest == single.drawn_digest == PINNED
    assert all(single.drawn[name].equal(tensor.float()) for name, tensor in ours.drawn.items())
    assert not any(tensor.equal(ours.drawn[name]) for name, tensor in nola(seed=4).drawn.items())
    for name, tensor in ours.drawn.items():
        bound = (HIDDEN if name.startswith("gate") else FFN) ** -0.5 if name.endswith(".A0") else 1.0
        assert 0.7 * bound < float(tensor.abs().max()) <= bound


def test_units_share_what_is_drawn_and_the_last_one_frees_it() -> None:
    first, second = nola(unit=1, seed=9), nola(unit=2, seed=9)
    other_rank = Nola(site(seed=9), LoraShape(3, 0.5, 0.0, "nola", bases=BASES), PROJECTIONS)
    assert all(first.drawn[name] is second.drawn[name] for name in first.drawn)
    assert not any(first.drawn[name] is other_rank.drawn[name] for name in first.drawn)
    first.drawn["gate_proj.U"].zero_()
    assert not second.drawn["gate_proj.U"].any()
    del first, second
    assert nola(seed=9).drawn["gate_proj.U"].all()


def test_digests() -> None:
    one, other = torch.ones(3), torch.zeros(3)
    assert digest_of_drawn([one, other]) == digest_of_drawn([one.double(), other]) != digest_of_drawn([other, one])
    assert combined_digest(["", "a", "a"]) == "a"
    assert combined_digest(["", ""]) == ""
    assert combined_digest(["a", "b"]) != combined_digest(["b", "a"])


def test_an_adapter_is_no_beginning() -> None:
    with pytest.raises(
        UserError, match=r"(?s)lora\.pairs: nola: training cannot begin with .*\n  leave lora\.init_from out, or use lora\.pairs=plain"
    ):
        nola().chunk_of(0, {})


def test_a_run_does_not_go_on_with_other_matrices() -> None:
    data = DataConfig(train=(DataSource(path="a.jsonl", name="a"),))
    config = Config(model=ModelConfig(name_or_path="model"), data=data, output_dir="out", max_steps=1, lora=LoraConfig(pairs="nola"))
    early, ours = {"config": to_yaml(config)}, nola().drawn_digest
    meta = {**early, "drawn": ours}
    refuse_other_run(Path("checkpoint-1"), meta, config, "", ours)
    refuse_other_run(Path("checkpoint-1"), early, config, "", ours)
    with pytest.raises(
        UserError, match=r"(?s)lora\.pairs=nola its run drew other matrices from seed 0 .*\n.*resume with the version of torch"
    ):
        refuse_other_run(Path("checkpoint-1"), meta, config, "", nola(seed=4).drawn_digest)


def test_the_attention_s_adapters_stay_plain() -> None:
    assert trains_a(lora())
