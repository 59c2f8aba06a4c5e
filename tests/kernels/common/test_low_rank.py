from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hecate.kernels.common.dropout import Dropout, TokenDropout
from hecate.kernels.common.lora_linear import lora_linear_triton
from hecate.kernels.common.low_rank import LowRankPairs, PackedPairs, lora_linear

TOKENS, INPUTS, OUTPUTS, RANK, STREAM, SCALE = 11, 7, 5, 3, 4, 1.5


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
@pytest.mark.parametrize(("function", "dtype", "pair_dtype", "tolerance"), [
    (lora_linear, torch.float64, torch.float64, 1e-12),
    (lora_linear, torch.float32, torch.float32, 1e-5),
    (lora_linear, torch.bfloat16, torch.float32, 0.05),
    (lora_linear_triton, torch.float32, torch.float32, 1e-5),
    (lora_linear_triton, torch.bfloat16, torch.float32, 0.05),
])  # fmt: skip
def test_against_autograd(
    function: Any, p: float, biased: bool, tokens: int, dtype: torch.dtype, pair_dtype: torch.dtype, tolerance: float
) -> None:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(of)

    x, a, b = normal(tokens, INPUTS), normal(RANK, INPUTS, of=pair_dtype), normal(OUTPUTS, RANK, of=pair_dtype)
    weight, bias = normal(OUTPUTS, INPUTS), normal(OUTPUTS) if biased else None
    dy = normal(tokens, OUTPUTS)
    number = torch.randperm(tokens, generator=random) + 50
    dropout = Dropout(p, key=9) if p else None
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = function(
        leaves[0], weight, bias, LowRankPairs(leaves[1], leaves[2], SCALE), TokenDropout(dropout, number, STREAM) if dropout else None
    )
    got = [y, *torch.autograd.grad(y, leaves, dy)]

    wide = [t.double().requires_grad_() for t in (x, a, b)]
    dropped = wide[0] * dropout.mask(number, STREAM, INPUTS, torch.float64) if dropout else wide[0]
    plain = F.linear(wide[0], weight.double(), None if bias is None else bias.double())
    plain = plain + SCALE * F.linear(F.linear(dropped, wide[1]), wide[2])
    wanted = [plain, *torch.autograd.grad(plain, wide, dy.double())]
    assert [g.dtype for g in got] == [dtype, dtype, pair_dtype, pair_dtype]
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=tolerance, atol=tolerance * 4)


def test_an_input_that_needs_no_gradient() -> None:
    a, b = torch.ones(RANK, INPUTS).requires_grad_(), torch.ones(OUTPUTS, RANK).requires_grad_()
    lora_linear(torch.ones(2, INPUTS), torch.ones(OUTPUTS, INPUTS), None, LowRankPairs(a, b, SCALE)).sum().backward()
    assert a.grad is not None
    assert b.grad is not None


def test_triton_over_several_blocks_and_chunks_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 tokens of 45 numbers, in chunks of 32: masks are torch's bit for bit, so float32 results agree to its rounding."""
    monkeypatch.setattr("hecate.kernels.common.lora_linear.CHUNK_ROWS", 32)
    random = torch.Generator().manual_seed(2)
    x, a, b, weight = (torch.randn(*shape, generator=random) for shape in ((70, 45), (20, 45), (37, 20), (37, 45)))
    dy, dropout = torch.randn(70, 37, generator=random), TokenDropout(Dropout(0.3, key=-5), torch.arange(70) * 7, 1 << 29)
    results = []
    for function in (lora_linear, lora_linear_triton):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = function(leaves[0], weight, None, LowRankPairs(leaves[1], leaves[2], SCALE), dropout)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for plain, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-3)


def pairs_of(seed: int, scale: float) -> LowRankPairs:
    random = torch.Generator().manual_seed(seed)
    return LowRankPairs(torch.randn(2, 3, 5, generator=random), torch.randn(2, 7, 3, generator=random), scale)


def test_pairs_come_back_in_the_order_of_projections_with_dropout_in_their_scales() -> None:
    pairs = {"down_proj": pairs_of(0, 2.0), "gate_proj": pairs_of(1, 0.5)}
    packed = PackedPairs.of(pairs, Dropout(0.5, key=1))
    assert (packed.projections, packed.scales, packed.trains_a, packed.dropped_levels) == ("gate_proj down_proj", [1.0, 4.0], True, 1 << 15)
    again = packed.unpacked()
    assert list(again) == ["gate_proj", "down_proj"]
    assert all(again[name].a_SrI is pairs[name].a_SrI and again[name].b_SOr is pairs[name].b_SOr for name in pairs)
    assert [of.b_for_a_SOr for of in again.values()] == [None, None]


def test_what_stands_for_b_comes_back_beside_it_and_for_all_pairs_or_none() -> None:
    plain = pairs_of(0, 2.0)
    changed = replace(plain, b_for_a_SOr=2 * plain.b_SOr)
    (again,) = PackedPairs.of({"up_proj": changed}, None).unpacked().values()
    assert again == changed
    with pytest.raises(AssertionError, match="beside one without"):
        PackedPairs.of({"up_proj": changed, "gate_proj": plain}, None)


def test_gradients_of_b_alone_stand_where_those_of_a_and_b_do() -> None:
    plain, one = pairs_of(0, 2.0), torch.ones(1)
    both = PackedPairs.of({"up_proj": plain}, None)
    fixed = PackedPairs.of({"up_proj": LowRankPairs(plain.a_SrI, plain.b_SOr.clone().requires_grad_(), 1.0)}, None)
    assert (both.trains_a, fixed.trains_a) == (True, False)
    assert [len(both.trained), len(fixed.trained)] == [2, 1]
    assert both.gradients([one, one + 1]) == [one, one + 1]
    assert fixed.gradients([one]) == [None, one]
