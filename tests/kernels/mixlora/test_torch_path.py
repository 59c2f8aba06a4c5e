"""The fast MixLoRA FFN against its reference: output and every gradient, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import ACTIVATIONS, FfnBase
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.mixlora import torch_path
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.kernels.mixlora.torch_path import mixlora_ffn
from tests.kernels.mixlora.cases import CASES, compare, results


def test_the_cases_cover_every_activation() -> None:
    assert {case.activation for case in CASES.values()} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", CASES)
def test_fp64(name: str) -> None:
    compare(results(mixlora_ffn, CASES[name]), results(mixlora_ffn_reference, CASES[name]), 1e-12)


@pytest.mark.parametrize("name", ["plain", "some assignments elsewhere", "dropout", "k 4", "rank 1 and odd sizes"])
def test_tiles_smaller_than_a_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows, the least, and groups of more than twice that, not a multiple of it."""
    monkeypatch.setattr(torch_path, "_TILE_BYTES", 1)
    case = dataclasses.replace(CASES[name], tokens=75)
    compare(results(mixlora_ffn, case), results(mixlora_ffn_reference, case), 1e-12)


@pytest.mark.parametrize("name", ["plain", "dropout", "gelu_tanh", "some assignments elsewhere"])
def test_fp32(name: str) -> None:
    case = dataclasses.replace(CASES[name], dtype=torch.float32)
    compare(results(mixlora_ffn, case), results(mixlora_ffn_reference, case, compute_in=torch.float64), 2e-6)


@pytest.mark.parametrize("name", ["plain", "gelu_tanh", "some assignments elsewhere"])
def test_bf16_with_fp32_pairs(name: str) -> None:
    """bf16 keeps 8 bits, an error of 2^-9 a rounding; a handful of roundings on the way of each element."""
    case = dataclasses.replace(CASES[name], dtype=torch.bfloat16, pair_dtype=torch.float32)
    got = results(mixlora_ffn, case)
    assert got["y"].dtype == got["d x"].dtype == torch.bfloat16
    assert {g.dtype for key, g in got.items() if key not in ("y", "d x")} == {torch.float32}
    compare(got, results(mixlora_ffn_reference, case, compute_in=torch.float64), 8 * 2**-9)


def test_gradients_of_slots_with_no_pairs_are_zero() -> None:
    got = results(mixlora_ffn, CASES["slots with no assignments"])
    for name, gradient in got.items():
        if name.endswith((".A", ".B")):
            assert [bool(g.any()) for g in gradient] == [False, True, False, True], name


def test_assignments_elsewhere_add_nothing() -> None:
    got = results(mixlora_ffn, CASES["all assignments elsewhere"])
    assert all(not value.any() for value in got.values())


def test_a_layer_without_adapters_is_our_mistake() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="without adapters"):
        mixlora_ffn(RoutedTokens(one, torch.zeros(1, 1, dtype=torch.int64), one), FfnBase(one, one, one, "silu"), {})


def test_tensors_that_are_not_contiguous() -> None:
    """x is a transpose, and the gradient of a sum an expanded scalar."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    wide, base = normal(4, 9), FfnBase(normal(5, 4), normal(5, 4), normal(4, 5), "silu")
    loras = {"up_proj": LowRankPairs(normal(2, 3, 4), normal(2, 5, 3), 1.0)}
    slot, weight = torch.randint(2, (9, 1), generator=random), torch.ones(9, 1, dtype=torch.float64)

    def both(function: Any) -> dict[str, torch.Tensor]:
        x = wide.clone().requires_grad_()
        y = function(RoutedTokens(x.T, slot, weight), base, loras)
        return {"y": y.detach(), "d x": torch.autograd.grad(y.sum(), x)[0]}

    compare(both(mixlora_ffn), both(mixlora_ffn_reference), 1e-12)
