"""The low-rank pairs of experts over a linear layer, on every path, against the formula: output and every gradient, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts import routed_pairs as torch_path
from hecate.kernels.experts.masked_pairs import masking_pays, masking_pays_beside_kernels
from hecate.kernels.experts.reference import routed_pairs_reference
from hecate.kernels.experts.routed_pairs import routed_pairs, sorted_pairs
from hecate.kernels.experts.routed_pairs_triton import routed_pairs_triton
from tests.kernels.conftest import INTERPRETED
from tests.kernels.experts.cases import CASES, Case, Inputs, Results
from tests.kernels.grouping import poisoned
from tests.kernels.mixlora.cases import compare

__all__ = ["poisoned"]

OWN_CASES = {
    **{name: case for name, case in CASES.items() if not name.startswith("gelu")},
    "dropout": Case(dropout=0.3),
    "dropout, assignments elsewhere": Case(dropout=0.5, elsewhere=0.4, k=3, rank=5),
    "dropout, no tokens": Case(dropout=0.5, tokens=0),
    "narrower than wide": Case(hidden=40, ffn=8, rank=8, slots=3, elsewhere=0.2),
}
"""from `hidden` inputs to `ffn` outputs"""
interpreted = pytest.mark.skipif(not INTERPRETED, reason="these inputs are on the CPU")


def pairs_of(function: Any, case: Case, compute_in: torch.dtype | None = None) -> Results:
    given = Inputs(case, compute_in)
    a = given.named["A"] = given.normal(case.slots, case.rank, case.hidden, dtype=given.master)
    b = given.named["B"] = given.normal(case.slots, case.ffn, case.rank, dtype=given.master)
    token, expert = torch.randperm(case.tokens, generator=given.random) + 1000, torch.arange(case.slots) * 3 + 1
    dropout = Dropout(case.dropout, key=77) if case.dropout else None
    return given.results(function(given.routed(token, expert), LowRankPairs(a, b, 0.7), dropout=dropout))


@pytest.mark.parametrize("function", [routed_pairs, sorted_pairs])
@pytest.mark.parametrize("name", OWN_CASES)
def test_float64_on_the_cpu(name: str, function: Any) -> None:
    compare(pairs_of(function, OWN_CASES[name]), pairs_of(routed_pairs_reference, OWN_CASES[name]), 1e-12)


def test_tiles_smaller_than_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "_TILE_ROWS", 7)
    for case in (Case(tokens=75), Case(tokens=75, elsewhere=0.3, dropout=0.3)):
        compare(pairs_of(sorted_pairs, case), pairs_of(routed_pairs_reference, case), 1e-12)


MASKED = {
    "single ranks": Case(slots=64, rank=1, k=8),
    "assignments elsewhere": Case(slots=20, rank=3, k=2, elsewhere=0.4),
    "no tokens": Case(slots=16, rank=4, k=4, tokens=0),
    "all elsewhere": Case(slots=16, rank=1, k=1, elsewhere=1.0),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    ("function", "dtype"),
    [(routed_pairs, torch.float64), pytest.param(routed_pairs_triton, torch.float32, marks=interpreted)],
    ids=["torch", "triton"],
)
def test_many_tiny_pairs_are_multiplied_densely(name: str, function: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(MASKED[name], dtype=dtype)
    wanted = pairs_of(routed_pairs_reference, case, torch.float64)
    monkeypatch.setattr(torch_path, "assignment_tiles", None)  # nothing is sorted
    compare(pairs_of(function, case), wanted, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(
    ("slots", "rank", "k", "pays", "beside_kernels"),
    [
        (64, 1, 8, True, True),
        (64, 1, 1, True, False),
        (64, 4, 8, True, True),
        (64, 8, 8, False, False),
        (8, 1, 2, True, False),
        (8, 8, 1, True, False),
        (8, 16, 1, False, False),
        (8, 16, 4, True, False),
        (0, 8, 2, False, False),
        (1, 256, 1, True, False),
        (2, 256, 1, False, False),
    ],
)
def test_what_is_multiplied_densely_is_decided_by_sizes(slots: int, rank: int, k: int, pays: bool, beside_kernels: bool) -> None:
    routed = RoutedTokens(torch.zeros(3, 5), torch.zeros(3, k, dtype=torch.int64), torch.zeros(3, k))
    pairs = LowRankPairs(torch.zeros(slots, rank, 5), torch.zeros(slots, 7, rank), 1.0)
    assert (masking_pays(routed, pairs), masking_pays_beside_kernels(routed, pairs)) == (pays, beside_kernels)


def test_sorted_pairs_do_not_depend_on_the_others_by_a_bit() -> None:
    """What adapters that are trained at once must be: each as if it were alone. The sizes are those of a real linear."""
    given = Inputs(Case(tokens=192, hidden=576, slots=8, k=1, rank=8, ffn=320, dtype=torch.float32), None)
    a, b = given.normal(8, 8, 576, dtype=torch.float32), given.normal(8, 320, 8, dtype=torch.float32)
    x, weight, slot = given.named["x"].detach(), torch.ones(192, 1), given.slot

    def of(a: torch.Tensor, b: torch.Tensor, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, a, b)]
        y = sorted_pairs(RoutedTokens(leaves[0], slot, weight), LowRankPairs(leaves[1], leaves[2], 0.7))
        return (y, *torch.autograd.grad(y.square().sum(), leaves))

    y, dx, da, db = of(a, b, slot)
    for expert in range(8):
        rows = (slot == expert).flatten()
        assert rows.any()
        alone = of(a[expert : expert + 1], b[expert : expert + 1], torch.where(slot == expert, 0, -1))
        for one, among in zip(alone, (y, dx, da[expert : expert + 1], db[expert : expert + 1]), strict=True):
            assert torch.equal(one[rows], among[rows]) if len(one) == 192 else torch.equal(one, among)


@pytest.mark.parametrize("function", [routed_pairs, sorted_pairs])
def test_the_formula_by_finite_differences(function: Any) -> None:
    given = Inputs(Case(tokens=3, hidden=2, ffn=3, slots=2, elsewhere=0.2), None)

    def of(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return function(RoutedTokens(x, given.slot, weight), LowRankPairs(a, b, 0.7))

    assert torch.autograd.gradcheck(of, (given.named["x"], given.named["weight"], given.normal(2, 1, 2), given.normal(2, 3, 1)))


@pytest.mark.parametrize("function", [routed_pairs, sorted_pairs])
def test_an_input_that_needs_no_gradient_gets_none(function: Any) -> None:
    """The first layer's linears read embeddings, which are frozen."""
    given = Inputs(Case(), None)
    pairs = LowRankPairs(given.normal(4, 3, 6), given.normal(4, 10, 3), 0.7)
    routed = RoutedTokens(given.named["x"].detach(), given.slot, given.named["weight"])
    function(routed, pairs).sum().backward()
    assert pairs.a_SrI.grad is not None
    assert pairs.b_SOr.grad is not None


@pytest.mark.parametrize(
    "function", [routed_pairs, sorted_pairs, pytest.param(routed_pairs_triton, marks=interpreted)], ids=["torch", "sorted", "triton"]
)
@pytest.mark.parametrize("slots", [4, 20])
def test_half_precision_with_float32_masters(function: Any, slots: int) -> None:
    case = Case(dtype=torch.bfloat16, master_dtype=torch.float32, tokens=75, elsewhere=0.3, slots=slots)
    got = pairs_of(function, case)
    assert got["y"].dtype == got["d x"].dtype == torch.bfloat16
    assert {gradient.dtype for name, gradient in got.items() if name not in ("y", "d x")} == {torch.float32}
    compare(got, pairs_of(routed_pairs_reference, case, torch.float64), 8 * 2**-9)


@interpreted
@pytest.mark.parametrize("name", OWN_CASES)
def test_float32_on_grouped_kernels(name: str, poisoned: None) -> None:
    case = dataclasses.replace(OWN_CASES[name], dtype=torch.float32)
    compare(pairs_of(routed_pairs_triton, case), pairs_of(routed_pairs_reference, case, torch.float64), 1e-6)


@interpreted
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_ranks_on_grouped_kernels(rank: int, poisoned: None) -> None:
    case = Case(rank=rank, tokens=9, spread=0.5, dtype=torch.float32)
    compare(pairs_of(routed_pairs_triton, case), pairs_of(routed_pairs_reference, case, torch.float64), 1e-6)


@interpreted
def test_no_slots_on_grouped_kernels() -> None:
    routed = RoutedTokens(torch.randn(5, 6).requires_grad_(), torch.full((5, 2), -1), torch.ones(5, 2), torch.arange(5), torch.arange(0))
    pairs = LowRankPairs(torch.zeros(0, 3, 6, requires_grad=True), torch.zeros(0, 4, 3), 1.0)
    y = routed_pairs_triton(routed, pairs, dropout=Dropout(0.5, key=1))
    assert torch.equal(y, torch.zeros(5, 4))
    y.sum().backward()
    assert pairs.a_SrI.grad is not None
