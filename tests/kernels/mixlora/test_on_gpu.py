"""The MixLoRA layer on a card at real sizes: against the formula, and against itself.

TRITON_INTERPRET=0 python -m pytest tests/kernels/mixlora/test_on_gpu.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import PROJECTIONS, FfnBase
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.mixlora.operators import mixlora_ffn_triton
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from tests.kernels.grouping import poisoned

__all__ = ["poisoned"]

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: Triton's kernels at real sizes are not checked"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: set it to 0 to run the kernels on the GPU"),
]
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Layer:
    tokens: int = 4096
    hidden: int = 2048
    ffn: int = 5632
    rank: int = 16
    slots: int = 8
    k: int = 2
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    dropout: float = 0.0
    hot: float = 0.0
    """share of assignments that all go to slot 1"""
    elsewhere: float = 0.0


LAYERS = {
    "bf16": Layer(),
    "bf16, dropout, assignments elsewhere": Layer(dropout=0.1, elsewhere=0.3),
    "bf16, a hot slot": Layer(hot=0.9),
    "bf16, k 8 of 64": Layer(slots=64, k=8, tokens=1024),
    "bf16, rank 1": Layer(rank=1),
    "bf16, rank 64, gelu": Layer(rank=64, activation="gelu", dropout=0.1),
    "bf16, rank 128": Layer(rank=128, dropout=0.1),
    "bf16, rank 256": Layer(rank=256, dropout=0.1),
    "bf16, odd sizes": Layer(tokens=1021, hidden=1003, ffn=2741, rank=5, slots=7, k=3, activation="gelu_tanh"),
    "fp16": Layer(dtype=torch.float16, dropout=0.1),
    "fp32": Layer(dtype=torch.float32, tokens=1024, dropout=0.1),
    "fp32, rank 64": Layer(dtype=torch.float32, tokens=1024, rank=64),
    "fp32, rank 256, odd sizes": Layer(dtype=torch.float32, tokens=517, hidden=515, ffn=1029, rank=256),
    "one token": Layer(tokens=1),
}


class Inputs:
    """Of a layer: activations of size one throughout, so that no element is only rounding."""

    def __init__(self, layer: Layer) -> None:
        self._random = torch.Generator("cuda").manual_seed(0)
        self.layer = layer
        hidden, ffn, dtype = layer.hidden, layer.ffn, layer.dtype
        self.leaves = {"x": self._normal(layer.tokens, hidden).to(dtype), "weight": self._normal(layer.tokens, layer.k).abs() + 0.1}
        self.base = [self._normal(*size).div_(size[1] ** 0.5).to(dtype) for size in ((ffn, hidden), (ffn, hidden), (hidden, ffn))]
        for name in PROJECTIONS:
            inputs, outputs = (ffn, hidden) if name == "down_proj" else (hidden, ffn)
            self.leaves[f"{name}.A"] = self._normal(layer.slots, layer.rank, inputs).div_(inputs**0.5)
            self.leaves[f"{name}.B"] = self._normal(layer.slots, outputs, layer.rank).div_(layer.rank**0.5)
        self.slot = torch.randint(layer.slots, (layer.tokens, layer.k), generator=self._random, device="cuda")
        self.slot[self._uniform() < layer.hot] = 1
        self.slot[self._uniform() < layer.elsewhere] = -1
        self.direction = self._normal(layer.tokens, hidden).to(dtype)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._random, device="cuda")

    def _uniform(self) -> Tensor:
        return torch.rand(self.slot.shape, generator=self._random, device="cuda")

    def results(self, function: Callable[..., Tensor], compute_in: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients by name; `compute_in`: of the same values, widened."""
        layer = self.layer
        leaves = {name: value.to(compute_in or value.dtype).detach().requires_grad_() for name, value in self.leaves.items()}
        base = FfnBase(*(value.to(compute_in or value.dtype) for value in self.base), layer.activation)
        token = torch.arange(layer.tokens, device="cuda") + 1000
        expert = torch.arange(layer.slots, device="cuda") * 3 + 1
        routed = RoutedTokens(leaves["x"], self.slot, leaves["weight"], token, expert)
        pairs = {name: LowRankPairs(leaves[f"{name}.A"], leaves[f"{name}.B"], 0.5) for name in PROJECTIONS}
        y = function(routed, base, pairs, dropout=Dropout(layer.dropout, key=7) if layer.dropout else None)
        grads = torch.autograd.grad(y, list(leaves.values()), self.direction.to(y.dtype))
        return {"y": y.detach(), **{f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("poisoned")
def test_against_the_formula_in_fp64(name: str) -> None:
    """Each result within eight roundings in the root mean square, and its worst element within sixteen of the largest."""
    inputs = Inputs(LAYERS[name])
    got, want = inputs.results(mixlora_ffn_triton), inputs.results(mixlora_ffn_reference, torch.float64)
    unit = UNIT[inputs.layer.dtype]
    for what in want:
        error = got[what].double() - want[what]
        assert got[what].isfinite().all(), f"{what} is not finite"
        assert float(error.norm() / want[what].norm().clamp(min=1e-30)) <= 8 * unit, f"{what} is off by {float(error.norm()):.1e}"
        assert float(error.abs().max() / want[what].abs().max().clamp(min=1e-30)) <= 16 * unit, f"{what}: one element is off"


@pytest.mark.parametrize("name", ["bf16, dropout, assignments elsewhere", "bf16, a hot slot", "fp32"])
def test_twenty_runs_are_equal_bit_for_bit(name: str) -> None:
    inputs = Inputs(LAYERS[name])
    first = inputs.results(mixlora_ffn_triton)
    for run in range(19):
        again = inputs.results(mixlora_ffn_triton)
        assert [what for what in first if not torch.equal(first[what], again[what])] == [], f"run {run + 2}"


def test_no_host_sync_in_the_layer() -> None:
    """Once its kernels are compiled; the copy of `expert_S`, which dropout brings, is not the layer's."""
    inputs = Inputs(Layer(tokens=256, elsewhere=0.2))
    inputs.results(mixlora_ffn_triton)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.results(mixlora_ffn_triton)
    finally:
        torch.cuda.set_sync_debug_mode("default")
