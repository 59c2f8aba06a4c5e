"""The fast FFN of experts with their own weights against its reference: output and every gradient, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import ACTIVATIONS
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts import torch_path
from hecate.kernels.experts.reference import full_ffn_reference, moe_lora_ffn_reference
from hecate.kernels.experts.torch_path import full_ffn, moe_lora_ffn
from tests.kernels.experts.cases import CASES, LORA_CASES, Case, Inputs, Run, full, lora
from tests.kernels.mixlora.cases import compare

KINDS: dict[str, tuple[Run, Any, Any]] = {
    "full": (full, full_ffn, full_ffn_reference),
    "lora": (lora, moe_lora_ffn, moe_lora_ffn_reference),
}


def test_the_cases_cover_every_activation() -> None:
    assert {case.activation for case in CASES.values()} == set(ACTIVATIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_fp64(name: str, kind: str) -> None:
    run, fast, reference = KINDS[kind]
    compare(run(fast, CASES[name], None), run(reference, CASES[name], None), 1e-12)


@pytest.mark.parametrize("name", LORA_CASES)
def test_adapters_on_some_projections_and_dropout(name: str) -> None:
    compare(lora(moe_lora_ffn, LORA_CASES[name]), lora(moe_lora_ffn_reference, LORA_CASES[name]), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_smaller_than_a_group(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "_TILE_ROWS", 7)
    run, fast, reference = KINDS[kind]
    for case in (Case(tokens=75), Case(tokens=75, elsewhere=0.3, dropout=0.3 * (kind == "lora"))):
        compare(run(fast, case, None), run(reference, case, None), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_and_bf16_with_fp32_masters(kind: str) -> None:
    """bf16 keeps 8 bits, an error of 2^-9 a rounding; a handful of roundings on the way of each element."""
    run, fast, reference = KINDS[kind]
    single = Case(dtype=torch.float32, elsewhere=0.3)
    compare(run(fast, single, None), run(reference, single, torch.float64), 2e-6)
    half = dataclasses.replace(single, dtype=torch.bfloat16, master_dtype=torch.float32, tokens=75)
    got = run(fast, half, None)
    assert got["y"].dtype == got["d x"].dtype == torch.bfloat16
    assert {gradient.dtype for name, gradient in got.items() if name not in ("y", "d x")} == {torch.float32}
    compare(got, run(reference, half, torch.float64), 8 * 2**-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_by_finite_differences(kind: str) -> None:
    """The references' gradients are autograd's; the fast versions' are written by hand, and checked here without either."""
    _, fast, _ = KINDS[kind]
    given = Inputs(Case(tokens=3, hidden=2, ffn=3, slots=2, elsewhere=0.2), None)
    if kind == "full":
        inputs = (given.named["x"], given.named["weight"], given.normal(2, given.shape.numel))
        assert torch.autograd.gradcheck(lambda x, w, e: fast(RoutedTokens(x, given.slot, w), e, given.shape), inputs)
        return
    frozen = [given.normal(given.shape.numel, grad=False) for _ in range(2)]
    sizes = {"gate_proj": (2, 3), "up_proj": (2, 3), "down_proj": (3, 2)}
    pairs = [t for wide, narrow in sizes.values() for t in (given.normal(2, 1, wide), given.normal(2, narrow, 1))]

    def of(x: torch.Tensor, weight: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        loras = {name: LowRankPairs(*pairs[2 * i : 2 * i + 2], 0.7) for i, name in enumerate(sizes)}
        return fast(RoutedTokens(x, given.slot, weight), frozen, loras, given.shape)

    assert torch.autograd.gradcheck(of, (given.named["x"], given.named["weight"], *pairs))


def test_experts_that_no_assignment_reaches_have_a_gradient_of_zero() -> None:
    gradient = full(full_ffn, CASES["slots with no assignments"])["d experts"]
    assert [bool(g.any()) for g in gradient] == [False, True, False, True]
