"""The FFN of experts with their own weights on a real card, at the sizes of models: results, determinism, no waiting for the device.

TRITON_INTERPRET=0 python -m pytest tests/kernels/experts/test_on_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.full_operators import full_ffn_triton
from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
from hecate.kernels.experts.reference import full_ffn_reference, moe_lora_ffn_reference
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(),
    reason="no GPU, or TRITON_INTERPRET is not 0: grouped kernels are not run as compiled, nor at the sizes of models",
)


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    experts: int
    k: int
    tokens: int = 1024
    rank: int = 16
    dropout: float = 0.05
    dtype: torch.dtype = torch.bfloat16
    separate: bool = True


MODELS = {
    "Mixtral": Model(4096, 14336, experts=8, k=2),
    "Qwen3-MoE": Model(2048, 768, experts=128, k=8),
    "OLMoE": Model(2048, 1024, experts=64, k=8, separate=False),
    "OLMoE, rank 64, float16": Model(2048, 1024, experts=64, k=8, rank=64, dtype=torch.float16),
    "OLMoE, float32": Model(2048, 1024, experts=64, k=8, tokens=256, dtype=torch.float32),
    "odd sizes": Model(1000, 1500, experts=7, k=3, rank=5, tokens=333),
    "a token": Model(2048, 1024, experts=64, k=8, tokens=1),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8 * 2**-9, torch.float16: 8 * 2**-12}
"""over the largest value: a handful of roundings; float32 by sums over thousands"""
Results = dict[str, torch.Tensor]


class Layer:
    """Random inputs of a layer whose routing is uneven: the first expert is hot, the last idle, some assignments are elsewhere."""

    def __init__(self, model: Model) -> None:
        self.model, self.shape = model, FfnShape(model.hidden, model.ffn, "silu")
        self._random = torch.Generator("cuda").manual_seed(0)
        scores = torch.rand(model.tokens, model.experts, generator=self._random, device="cuda")
        scores[:, 0] += 0.5
        scores[:, -1] = -1.0
        self.slot = scores.topk(min(model.k, model.experts), dim=1).indices
        self.slot[torch.rand(self.slot.shape, generator=self._random, device="cuda") < 0.1] = -1
        self.x = self.normal(model.tokens, model.hidden)
        self.weight = torch.rand(self.slot.shape, generator=self._random, device="cuda")
        self.direction = self.normal(model.tokens, model.hidden)
        self.experts = self.normal(model.experts, self.shape.numel, by=model.hidden**-0.5)
        self.pairs = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            wide, narrow = (model.ffn, model.hidden) if name == "down_proj" else (model.hidden, model.ffn)
            a = self.normal(model.experts, model.rank, wide, by=wide**-0.5).float()
            self.pairs[name] = (a, self.normal(model.experts, narrow, model.rank, by=0.3).float())

    def normal(self, *shape: int, by: float = 1.0) -> torch.Tensor:
        return (by * torch.randn(shape, generator=self._random, device="cuda")).to(self.model.dtype)

    def full(self, function: Callable[..., torch.Tensor], dtype: torch.dtype) -> Results:
        named = {"x": self.x, "weight": self.weight, "experts": self.experts}
        leaves = {name: t.to(dtype).requires_grad_() for name, t in named.items()}
        y = function(RoutedTokens(leaves["x"], self.slot, leaves["weight"]), leaves["experts"], self.shape)
        return self._results(y, leaves)

    def lora(self, function: Callable[..., torch.Tensor], dtype: torch.dtype) -> Results:
        leaves = {"x": self.x.to(dtype).requires_grad_(), "weight": self.weight.clone().requires_grad_()}
        for name, (a, b) in self.pairs.items():
            leaves[f"{name}.A"], leaves[f"{name}.B"] = a.clone().requires_grad_(), b.clone().requires_grad_()
        frozen = [chunk.clone() if self.model.separate else chunk for chunk in self.experts.to(dtype)]
        token, expert = torch.arange(self.model.tokens, device="cuda") * 3, torch.arange(self.model.experts, device="cuda") + 5
        routed = RoutedTokens(leaves["x"], self.slot, leaves["weight"], token, expert)
        pairs = {name: LowRankPairs(leaves[f"{name}.A"], leaves[f"{name}.B"], 2.0) for name in self.pairs}
        return self._results(function(routed, frozen, pairs, self.shape, dropout=Dropout(self.model.dropout, key=77)), leaves)

    def _results(self, y: torch.Tensor, leaves: Results) -> Results:
        gradients = torch.autograd.grad(y, list(leaves.values()), self.direction.to(y.dtype))
        return {"y": y.detach(), **{f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}

    def run(self, kind: str, *, reference: bool = False) -> Results:
        """References run in a wider type, so that what is seen is the kernels' error."""
        wider = torch.float64 if self.model.dtype == torch.float32 else torch.float32
        dtype = wider if reference else self.model.dtype
        if kind == "full":
            return self.full(full_ffn_reference if reference else full_ffn_triton, dtype)
        return self.lora(moe_lora_ffn_reference if reference else moe_lora_ffn_triton, dtype)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_results(name: str, kind: str) -> None:
    layer = Layer(MODELS[name])
    got, want = layer.run(kind), layer.run(kind, reference=True)
    for what, value in want.items():
        assert got[what].isfinite().all(), what
        error = float((got[what].to(value.dtype) - value).abs().max() / value.abs().max())
        assert error <= TOLERANCE[layer.model.dtype], f"{what} is off by {error:.1e}"


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["Qwen3-MoE", "odd sizes"])
def test_twenty_runs_are_the_same_to_the_bit(name: str, kind: str) -> None:
    layer = Layer(MODELS[name])
    first = layer.run(kind)
    for _ in range(19):
        for what, value in layer.run(kind).items():
            assert torch.equal(value, first[what]), what


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    layer = Layer(MODELS["OLMoE"])
    layer.run(kind)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run(kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")
