"""The layers whose kernels are compiled ahead of time: the benchmark's shapes, then one thing changed at a time. All on meta tensors.

Which kernels a layer launches, and how, is not written here: its own passes are run, forward and backward, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hecate.kernels import expert_ffn_sorted, mixlora_sorted
from hecate.kernels.dropout import Dropout
from hecate.kernels.expert_ffn_inputs import FfnShape
from hecate.kernels.full_ops import full_experts, full_experts_backward
from hecate.kernels.kernel_launch import Launch, recorded
from hecate.kernels.mixlora_inputs import PROJECTIONS, FfnBase, Lora
from hecate.kernels.moe_lora_ops import lora_experts, lora_experts_backward

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
    """mixlora, lora_experts or full_experts"""
    dtype: torch.dtype = torch.bfloat16
    pair_dtype: torch.dtype | None = None
    """of the pairs, or of trained experts; None: `dtype`"""
    activation: str = "silu"
    dropout: float = 0.0
    projections: tuple[str, ...] = PROJECTIONS

    def launches(self) -> list[Launch]:
        """Of the forward pass, then of the backward pass."""
        return _OF_KIND[self.kind](self)

    def tensor(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=META)

    def choices(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, slots and weights."""
        slots = self.tensor(self.tokens, self.k, dtype=torch.int64)
        return self.tensor(self.tokens, self.hidden), slots, self.tensor(self.tokens, self.k, dtype=torch.float32)

    def loras(self) -> dict[str, Lora]:
        pairs = {}
        for name in self.projections:
            wide, narrow = (self.ffn, self.hidden) if name == "down_proj" else (self.hidden, self.ffn)
            a, b = (self.experts, self.rank, wide), (self.experts, narrow, self.rank)
            pairs[name] = Lora(self.tensor(*a, dtype=self.pair_dtype), self.tensor(*b, dtype=self.pair_dtype), 2.0)
        return pairs

    def dropped(self) -> dict[str, Any]:
        """The arguments about dropout."""
        if not self.dropout:
            return {}
        of = {"token_T": self.tensor(self.tokens, dtype=torch.int64), "expert_S": self.tensor(self.experts, dtype=torch.int64)}
        return {"dropout": Dropout(self.dropout, key=1), **of}


_7B = LayerCase(hidden=4096, ffn=14336, rank=16, experts=8, k=2, tokens=8192)
_1B = LayerCase(hidden=2048, ffn=5632, rank=8, experts=8, k=2, tokens=16384)
_135M = LayerCase(hidden=576, ffn=1536, rank=8, experts=8, k=2, tokens=8192)
_FINE = LayerCase(hidden=2048, ffn=768, rank=16, experts=128, k=8, tokens=8192, kind="lora_experts")
_MIXTRAL = replace(_7B, kind="lora_experts")

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
    "1B, gelu": replace(_1B, activation="gelu"),
    "1B, gelu_tanh": replace(_1B, activation="gelu_tanh"),
    "1B, top-4 of 64": replace(_1B, experts=64, k=4),
    "1B, gate and up": replace(_1B, projections=("gate_proj", "up_proj")),
    "1B, down, dropout": replace(_1B, projections=("down_proj",), dropout=0.05),
    "135M, float32": replace(_135M, dtype=torch.float32),
    "135M, float32, rank 64, dropout": replace(_135M, dtype=torch.float32, rank=64, dropout=0.05),
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
    "Mixtral, down": replace(_MIXTRAL, projections=("down_proj",)),
    "OLMoE, float16": replace(_FINE, ffn=1024, experts=64, dtype=torch.float16),
    "full experts": replace(_FINE, kind="full_experts", experts=64),
    "full experts, float32 masters": replace(_FINE, kind="full_experts", experts=64, pair_dtype=torch.float32),
    "full experts, float32": replace(_135M, kind="full_experts", dtype=torch.float32),
}
SPREAD: Mapping[int, tuple[str, ...]] = {90: ("7B", "fine-grained"), 80: ("1B, down, dropout", "full experts")}
"""layers that every test run compiles, by sm number; the others are compiled when the table is written"""


def _mixlora(case: LayerCase) -> list[Launch]:
    x, slots, weights = case.choices()
    base = FfnBase(
        case.tensor(case.ffn, case.hidden), case.tensor(case.ffn, case.hidden), case.tensor(case.hidden, case.ffn), case.activation
    )

    def backward(given: Sequence[Any], kept: Sequence[Tensor]) -> None:
        mixlora_sorted.backward_passes(torch.empty_like(x), *given[:2], *kept, *given[2:])

    return _both_passes(
        (mixlora_sorted, "mixlora_forward"),
        mixlora_sorted.forward_passes,
        lambda: mixlora_sorted.mixlora_ffn_sorted(x, slots, weights, base, case.loras(), **case.dropped()),
        backward,
    )


def _lora_experts(case: LayerCase) -> list[Launch]:
    x, slots, weights = case.choices()
    shape = FfnShape(case.hidden, case.ffn, case.activation)
    frozen = list(case.tensor(case.experts, shape.numel))

    def backward(given: Sequence[Any], kept: Sequence[Tensor]) -> None:
        _plain(lora_experts_backward)(torch.empty_like(x), x, *given[2:7], *kept, *given[7:])

    return _both_passes(
        (expert_ffn_sorted, "lora_experts"),
        _plain(lora_experts),
        lambda: expert_ffn_sorted.moe_lora_ffn_sorted(x, slots, weights, frozen, case.loras(), shape, **case.dropped()),
        backward,
    )


def _full_experts(case: LayerCase) -> list[Launch]:
    x, slots, weights = case.choices()
    shape = FfnShape(case.hidden, case.ffn, case.activation)
    experts = case.tensor(case.experts, shape.numel, dtype=case.pair_dtype)

    def backward(given: Sequence[Any], kept: Sequence[Tensor]) -> None:
        _plain(full_experts_backward)(torch.empty_like(x), x, *given[2:4], *kept, *given[4:])

    return _both_passes(
        (expert_ffn_sorted, "full_experts"),
        _plain(full_experts),
        lambda: expert_ffn_sorted.full_ffn_sorted(x, slots, weights, experts, shape),
        backward,
    )


def _both_passes(
    operator: tuple[Any, str],
    forward: Callable[..., tuple[Tensor, ...]],
    layer: Callable[[], Tensor],
    backward: Callable[[Sequence[Any], Sequence[Tensor]], None],
) -> list[Launch]:
    """What a layer launches whose forward pass is one operator.

    Args:
        operator: where the layer looks it up. It would itself give meta tensors their shapes and launch nothing.
        forward: the function under it.
        backward: takes the operator's arguments, and its results but for the first.
    """
    calls: list[tuple[Sequence[Any], tuple[Tensor, ...]]] = []

    def noted(*given: Any) -> tuple[Tensor, ...]:
        calls.append((given, forward(*given)))
        return calls[-1][1]

    with recorded() as launches, mock.patch.object(*operator, noted), torch.no_grad():
        layer()
        for given, results in calls:
            backward(given, results[1:])
    return launches


def _plain(operator: Any) -> Callable[..., Any]:
    """The function that `torch.library.custom_op` made an operator of."""
    return operator._init_fn


_OF_KIND: Mapping[str, Callable[[LayerCase], list[Launch]]] = {
    "mixlora": _mixlora,
    "lora_experts": _lora_experts,
    "full_experts": _full_experts,
}
