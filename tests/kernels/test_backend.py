"""Which implementation computes the experts, by setting, device, type and rank; and that all of them compute the same."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from hecate.kernels.backend import Backend, expert_kernels, triton_problem
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.full_operators import full_ffn_triton
from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
from hecate.kernels.experts.torch_path import full_ffn, moe_lora_ffn
from hecate.kernels.mixlora.operators import mixlora_ffn_triton
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.kernels.mixlora.torch_path import mixlora_ffn
from tests.kernels.mixlora.cases import Case, compare, results

ON_CPU = torch.empty(0)
ON_GPU: Any = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
"""what `expert_kernels` looks at of a tensor on a GPU, which need not be here"""


def test_auto_is_torch_on_the_cpu_and_triton_on_a_gpu() -> None:
    assert expert_kernels("auto", ON_CPU).mixlora_ffn is mixlora_ffn
    on_gpu = expert_kernels("auto", ON_GPU, rank=256)
    assert on_gpu.mixlora_ffn is mixlora_ffn_triton
    assert on_gpu.full_ffn is full_ffn_triton
    assert on_gpu.moe_lora_ffn is moe_lora_ffn_triton


def test_auto_is_torch_where_triton_cannot() -> None:
    assert expert_kernels("auto", ON_GPU, rank=257).moe_lora_ffn is moe_lora_ffn
    wide: Any = type("Wide", (), {"device": torch.device("cuda"), "dtype": torch.float64})()
    assert expert_kernels("auto", wide).full_ffn is full_ffn


def test_triton_is_an_error_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ranks up to 256, got 257"):
        expert_kernels("triton", ON_GPU, rank=257)
    with pytest.raises(ValueError, match="not in float64"):
        expert_kernels("triton", ON_CPU.double())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        expert_kernels("triton", ON_CPU)
    assert triton_problem("cuda") is None


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_mixlora_of_every_backend(backend: Backend) -> None:
    case = Case(dtype=torch.float32, dropout=0.3, elsewhere=0.2)
    function = expert_kernels(backend, ON_CPU, case.rank).mixlora_ffn
    compare(results(function, case), results(mixlora_ffn_reference, dataclasses.replace(case), compute_in=torch.float64), 2e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_full_experts_of_every_backend(backend: Backend) -> None:
    random, shape = torch.Generator().manual_seed(0), FfnShape(6, 10, "silu")
    leaves = [torch.randn(size, generator=random).requires_grad_() for size in ((9, 6), (9, 2), (3, shape.numel))]
    slot = torch.randint(-1, 3, (9, 2), generator=random)

    def both(function: Any) -> list[torch.Tensor]:
        y = function(RoutedTokens(leaves[0], slot, leaves[1]), leaves[2], shape)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    for mine, theirs in zip(*map(both, (expert_kernels(backend, ON_CPU).full_ffn, full_ffn)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_frozen_experts_of_every_backend(backend: Backend) -> None:
    random, shape = torch.Generator().manual_seed(0), FfnShape(6, 10, "silu")
    x, weight, a, b = (torch.randn(size, generator=random).requires_grad_() for size in ((9, 6), (9, 2), (3, 4, 10), (3, 6, 4)))
    frozen = [torch.randn(shape.numel, generator=random) for _ in range(3)]
    slot = torch.randint(-1, 3, (9, 2), generator=random)

    def both(function: Any) -> list[torch.Tensor]:
        y = functools.partial(function, RoutedTokens(x, slot, weight), frozen, {"down_proj": LowRankPairs(a, b, 0.5)}, shape)()
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, weight, a, b])]

    for mine, theirs in zip(*map(both, (expert_kernels(backend, ON_CPU, 4).moe_lora_ffn, moe_lora_ffn)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
