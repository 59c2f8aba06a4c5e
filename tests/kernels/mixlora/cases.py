"""Cases of the MixLoRA FFN, their random inputs, and the comparison of an implementation with its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import PROJECTIONS, FfnBase
from hecate.kernels.common.low_rank import LowRankPairs


@dataclass(frozen=True)
class Case:
    tokens: int = 23
    hidden: int = 6
    ffn: int = 10
    k: int = 2
    slots: int = 4
    rank: int = 3
    projections: tuple[str, ...] = PROJECTIONS
    activation: str = "silu"
    dropout: float = 0.0
    absent: tuple[int, ...] = ()
    """slots without assignments"""
    elsewhere: float = 0.0
    """share of assignments that are computed elsewhere"""
    dtype: torch.dtype = torch.float64
    pair_dtype: torch.dtype | None = None
    """of the pairs and weights; None: `dtype`"""


def results(function: Any, case: Case, compute_in: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients by name. `compute_in`: the same values (rounded to the case's types), widened."""
    random = torch.Generator().manual_seed(3)
    pair_dtype = case.pair_dtype or case.dtype

    def normal(*shape: int, dtype: torch.dtype = case.dtype, grad: bool = True) -> torch.Tensor:
        value = torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)
        return value.to(compute_in or dtype).requires_grad_(grad)

    inputs = {"x": normal(case.tokens, case.hidden)}
    inputs["weight"] = normal(case.tokens, case.k, dtype=pair_dtype)
    base = FfnBase(
        normal(case.ffn, case.hidden, grad=False),
        normal(case.ffn, case.hidden, grad=False),
        normal(case.hidden, case.ffn, grad=False),
        case.activation,
    )
    loras = {}
    for name in case.projections:
        wide, narrow = (case.ffn, case.hidden) if name == "down_proj" else (case.hidden, case.ffn)
        inputs[f"{name}.A"] = normal(case.slots, case.rank, wide, dtype=pair_dtype)
        inputs[f"{name}.B"] = normal(case.slots, narrow, case.rank, dtype=pair_dtype)
        loras[name] = LowRankPairs(inputs[f"{name}.A"], inputs[f"{name}.B"], 0.5 + 0.25 * len(name))
    present = torch.tensor([s for s in range(case.slots) if s not in case.absent])
    slot = present[torch.randint(len(present), (case.tokens, case.k), generator=random)]
    slot[torch.rand(slot.shape, generator=random) < case.elsewhere] = -1
    token, expert = torch.randperm(case.tokens, generator=random) + 1000, torch.arange(case.slots) * 3 + 1
    routed = RoutedTokens(inputs["x"], slot, inputs["weight"], token, expert)
    y = function(routed, base, loras, dropout=Dropout(case.dropout, key=77) if case.dropout else None)
    direction = torch.randn(y.shape, generator=random, dtype=torch.float64).to(case.dtype).to(y.dtype)
    gradients = torch.autograd.grad((y * direction).sum(), list(inputs.values()))
    return {"y": y.detach(), **{f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}}


def compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Largest error relative to the largest entry, by name."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].shape == wanted[name].shape, name
        if got[name].numel():
            assert got[name].isfinite().all(), f"{name} is not finite"
            scale = wanted[name].double().abs().max().clamp(min=1e-30)
            error = float((got[name].double() - wanted[name].double()).abs().max() / scale)
            assert error <= tolerance, f"{name} is off by {error:.1e}"


CASES = {
    "plain": Case(),
    "gelu": Case(activation="gelu"),
    "gelu_tanh": Case(activation="gelu_tanh"),
    "gate only": Case(projections=("gate_proj",)),
    "up only": Case(projections=("up_proj",)),
    "down only": Case(projections=("down_proj",)),
    "no gate": Case(projections=("up_proj", "down_proj"), activation="gelu"),
    "no down": Case(projections=("gate_proj", "up_proj")),
    "slots with no assignments": Case(absent=(0, 2)),
    "last slot with no assignments": Case(absent=(3,)),
    "some assignments elsewhere": Case(elsewhere=0.5),
    "all assignments elsewhere": Case(elsewhere=1.1),
    "no tokens": Case(tokens=0),
    "no tokens, dropout": Case(tokens=0, dropout=0.3),
    "a single token": Case(tokens=1),
    "a single token, a single slot": Case(tokens=1, slots=1, k=1),
    "k 1": Case(k=1),
    "k 4": Case(k=4, elsewhere=0.2),
    "rank 1 and odd sizes": Case(tokens=17, hidden=7, ffn=13, rank=1, slots=5, k=3),
    "everything of size 1": Case(tokens=3, hidden=1, ffn=1, rank=1, slots=1, k=1),
    "dropout": Case(dropout=0.3),
    "dropout, assignments elsewhere": Case(dropout=0.5, elsewhere=0.4, k=3, activation="gelu_tanh"),
    "dropout, down only": Case(dropout=0.5, projections=("down_proj",)),
}
