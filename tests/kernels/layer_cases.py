"""The layers whose kernels are compiled ahead of time: the benchmark's shapes, then one thing changed at a time. All on meta tensors.

Which kernels a layer launches, and how, is not written here: its own passes are run, forward and backward, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, TokenDropout
from hecate.kernels.common.ffn import PROJECTIONS, FfnBase, FfnShape
from hecate.kernels.common.kernel_launch import Launch, recorded
from hecate.kernels.common.lora_linear import lora_linear_triton
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.full_operators import full_ffn_triton
from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
from hecate.kernels.experts.routed_pairs_triton import routed_pairs_triton
from hecate.kernels.mixlora.operators import mixlora_ffn_triton
from hecate.parallel.values.expert_kinds import LoraShape

META = torch.device("meta")


@dataclass(frozen=True)
class LayerCase:
    """One layer; `launches` makes its launches for the GPU that `meta_tensors_are_on` names."""

    hidden: int
    ffn: int
    rank: int
    experts: int
    k: int
    tokens: int
    kind: str = "mixlora"
    """mixlora, moe_lora, full, or over a linear from `hidden` to `ffn`: one LoRA (linear), or experts (linears)"""
    dtype: torch.dtype = torch.bfloat16
    pair_dtype: torch.dtype | None = None
    """of the pairs, or of trained experts; None: `dtype`"""
    activation: str = "silu"
    dropout: float = 0.0
    projections: tuple[str, ...] = PROJECTIONS
    eta: float | None = None
    """of the gradient rule row_norm"""
    trains_a: bool = True

    def launches(self) -> list[Launch]:
        """Of the forward pass, then of the backward pass."""
        return _OF_KIND[self.kind](self)

    def tensor(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=META)

    def routed(self) -> RoutedTokens:
        slots = self.tensor(self.tokens, self.k, dtype=torch.int64)
        tokens, experts = self.tensor(self.tokens, dtype=torch.int64), self.tensor(self.experts, dtype=torch.int64)
        weights = self.tensor(self.tokens, self.k, dtype=torch.float32)
        return RoutedTokens(self.tensor(self.tokens, self.hidden).requires_grad_(), slots, weights.requires_grad_(), tokens, experts)

    def shape(self) -> FfnShape:
        return FfnShape(self.hidden, self.ffn, self.activation)

    def low_rank_pairs(self) -> dict[str, LowRankPairs]:
        pairs = {}
        for name in self.projections:
            wide, narrow = (self.ffn, self.hidden) if name == "down_proj" else (self.hidden, self.ffn)
            a, b = self.pair((self.experts, self.rank, wide), (self.experts, narrow, self.rank))
            pairs[name] = self.ruled(a, b)
        return pairs

    def ruled(self, a: Tensor, b: Tensor) -> LowRankPairs:
        rule = "none" if self.eta is None else "row_norm"
        return ruled_pairs(LoraShape(self.rank, 2.0, self.dropout, gradient_rule=rule, eta=self.eta), a, b)

    def pair(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A and B of these shapes; what trains requires a gradient, which is how the layers tell that A does not."""
        return self.tensor(*a, dtype=self.pair_dtype).requires_grad_(self.trains_a), self.tensor(*b, dtype=self.pair_dtype).requires_grad_()

    def dropout_or_none(self) -> Dropout | None:
        return Dropout(self.dropout, key=1) if self.dropout else None


_7B = LayerCase(hidden=4096, ffn=14336, rank=16, experts=8, k=2, tokens=8192)
_1B = LayerCase(hidden=2048, ffn=5632, rank=8, experts=8, k=2, tokens=16384)
_135M = LayerCase(hidden=576, ffn=1536, rank=8, experts=8, k=2, tokens=8192)
_FINE = LayerCase(hidden=2048, ffn=768, rank=16, experts=128, k=8, tokens=8192, kind="moe_lora")
_MIXTRAL = replace(_7B, kind="moe_lora")
_LINEAR = LayerCase(hidden=4096, ffn=1024, rank=16, experts=1, k=1, tokens=8192, kind="linear", pair_dtype=torch.float32, dropout=0.05)

_LINEARS = replace(_LINEAR, kind="linears", rank=8, experts=8, k=2)

CASES: Mapping[str, LayerCase] = {
    "7B": _7B,
    "1B": _1B,
    "135M": _135M,
    "7B, dropout": replace(_7B, dropout=0.05),
    "7B, float32 pairs": replace(_7B, pair_dtype=torch.float32),
    "7B, rank 32": replace(_7B, rank=32),
    "7B, rank 64": replace(_7B, rank=64),
    "7B, rank 64, dropout": replace(_7B, rank=64, dropout=0.05),
    "1B, rank 128": replace(_1B, rank=128),
    "1B, rank 256": replace(_1B, rank=256),
    "1B, row_norm": replace(_1B, eta=1.0),
    "1B, row_norm, rank 64": replace(_1B, eta=1.0, rank=64),
    "1B, row_norm, rank 128": replace(_1B, eta=1.0, rank=128),
    "1B, fixed A": replace(_1B, trains_a=False),
    "1B, gelu": replace(_1B, activation="gelu"),
    "1B, gelu_tanh": replace(_1B, activation="gelu_tanh"),
    "1B, top-4 of 64": replace(_1B, experts=64, k=4),
    "1B, gate and up": replace(_1B, projections=("gate_proj", "up_proj")),
    "1B, down, dropout": replace(_1B, projections=("down_proj",), dropout=0.05),
    "135M, float32": replace(_135M, dtype=torch.float32),
    "135M, float32, rank 64, dropout": replace(_135M, dtype=torch.float32, rank=64, dropout=0.05),
    "135M, float32, row_norm, rank 64": replace(_135M, dtype=torch.float32, eta=1.0, rank=64),
    "135M, float16": replace(_135M, dtype=torch.float16),
    "135M, rank 1": replace(_135M, rank=1),
    "fine-grained": _FINE,
    "fine-grained, dropout": replace(_FINE, dropout=0.05),
    "fine-grained, rank 8, gelu": replace(_FINE, rank=8, activation="gelu"),
    "fine-grained, rank 64": replace(_FINE, rank=64),
    "fine-grained, float32": replace(_FINE, dtype=torch.float32),
    "Mixtral": _MIXTRAL,
    "Mixtral, rank 128, dropout": replace(_MIXTRAL, rank=128, dropout=0.05),
    "Mixtral, rank 256": replace(_MIXTRAL, rank=256),
    "Mixtral, row_norm": replace(_MIXTRAL, eta=1.0),
    "Mixtral, row_norm, rank 128": replace(_MIXTRAL, eta=1.0, rank=128),
    "Mixtral, fixed A": replace(_MIXTRAL, trains_a=False),
    "Mixtral, down": replace(_MIXTRAL, projections=("down_proj",)),
    "OLMoE, float16": replace(_FINE, ffn=1024, experts=64, dtype=torch.float16),
    "full experts": replace(_FINE, kind="full", experts=64),
    "full experts, float32 masters": replace(_FINE, kind="full", experts=64, pair_dtype=torch.float32),
    "full experts, float32": replace(_135M, kind="full", dtype=torch.float32),
    "linear": _LINEAR,
    "linear, no dropout": replace(_LINEAR, dropout=0.0),
    "linear, rank 8, float16": replace(_LINEAR, rank=8, dtype=torch.float16),
    "linear, rank 64": replace(_LINEAR, rank=64),
    "linear, rank 128": replace(_LINEAR, rank=128),
    "linear, rank 256": replace(_LINEAR, rank=256),
    "linear, float32": replace(_LINEAR, dtype=torch.float32),
    "linear, float32, rank 64": replace(_LINEAR, dtype=torch.float32, rank=64),
    "linear, float32, rank 256": replace(_LINEAR, dtype=torch.float32, rank=256),
    "linear, row_norm": replace(_LINEAR, dropout=0.0, eta=1.0),
    "linear, row_norm, rank 128": replace(_LINEAR, dropout=0.0, eta=1.0, rank=128),
    "linear, fixed A": replace(_LINEAR, trains_a=False),
    "experts over a linear": _LINEARS,
    "experts over a linear, no dropout": replace(_LINEARS, dropout=0.0),
    "experts over a linear, row_norm": replace(_LINEARS, dropout=0.0, eta=1.0),
    "experts over a linear, row_norm, rank 128": replace(_LINEARS, dropout=0.0, eta=1.0, rank=128),
    "experts over a linear, fixed A": replace(_LINEARS, trains_a=False),
    "experts over a linear, float32, rank 64": replace(_LINEARS, dtype=torch.float32, rank=64),
    "experts over a linear, single ranks": replace(_LINEARS, rank=1, experts=64, k=8),
}
SPREAD: Mapping[int, tuple[str, ...]] = {90: ("7B", "fine-grained"), 80: ("1B, down, dropout", "full experts")}
"""layers that every test run compiles, by sm number; the others are compiled when the table is written"""


def _mixlora(case: LayerCase) -> list[Launch]:
    base = FfnBase(
        case.tensor(case.ffn, case.hidden), case.tensor(case.ffn, case.hidden), case.tensor(case.hidden, case.ffn), case.activation
    )

    def layer() -> Tensor:
        return mixlora_ffn_triton(case.routed(), base, case.low_rank_pairs(), dropout=case.dropout_or_none())

    return _both_passes(layer)


def _moe_lora(case: LayerCase) -> list[Launch]:
    frozen = list(case.tensor(case.experts, case.shape().numel))

    def layer() -> Tensor:
        pairs, dropout = case.low_rank_pairs(), case.dropout_or_none()
        return moe_lora_ffn_triton(case.routed(), frozen, pairs, case.shape(), dropout=dropout)

    return _both_passes(layer)


def _full(case: LayerCase) -> list[Launch]:
    experts = case.tensor(case.experts, case.shape().numel, dtype=case.pair_dtype).requires_grad_()
    return _both_passes(lambda: full_ffn_triton(case.routed(), experts, case.shape()))


def _linear(case: LayerCase) -> list[Launch]:
    x, weight = case.tensor(case.tokens, case.hidden).requires_grad_(), case.tensor(case.ffn, case.hidden)
    a, b = case.pair((case.rank, case.hidden), (case.ffn, case.rank))
    how = case.dropout_or_none()
    dropout = None if how is None else TokenDropout(how, case.tensor(case.tokens, dtype=torch.int64), stream=5)
    with recorded() as launches:
        lora_linear_triton(x, weight, None, case.ruled(a, b), dropout).sum().backward()
    return launches


def _linears(case: LayerCase) -> list[Launch]:
    routed, (pairs,) = case.routed(), replace(case, projections=("up_proj",)).low_rank_pairs().values()
    leaves = [routed.x_TD, routed.weight_TK, pairs.b_SOr, *([pairs.a_SrI] if case.trains_a else [])]
    with recorded() as launches:
        torch.autograd.grad(routed_pairs_triton(routed, pairs, dropout=case.dropout_or_none()).sum(), leaves)
    return launches


def _both_passes(layer: Callable[[], Tensor]) -> list[Launch]:
    with recorded() as launches:
        layer().sum().backward()
    return launches


_OF_KIND: Mapping[str, Callable[[LayerCase], list[Launch]]] = {
    "mixlora": _mixlora,
    "moe_lora": _moe_lora,
    "full": _full,
    "linear": _linear,
    "linears": _linears,
}
