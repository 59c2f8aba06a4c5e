"""Cases of the FFNs of experts with their own weights, and their random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import PROJECTIONS, FfnShape
from hecate.kernels.common.low_rank import LowRankPairs


@dataclass(frozen=True)
class Case:
    tokens: int = 23
    hidden: int = 6
    ffn: int = 10
    k: int = 2
    slots: int = 4
    projections: tuple[str, ...] = PROJECTIONS
    activation: str = "silu"
    rank: int = 3
    spread: float = 1.0
    """standard deviation of all values"""
    dropout: float = 0.0
    absent: tuple[int, ...] = ()
    """slots without assignments"""
    elsewhere: float = 0.0
    """share of assignments that are computed elsewhere"""
    dtype: torch.dtype = torch.float64
    master_dtype: torch.dtype | None = None
    """of what is trained and of the weights; None: `dtype`"""


Results = dict[str, torch.Tensor]
Run = Callable[[Any, Case, torch.dtype | None], Results]


class Inputs:
    """Random values of a case. `compute_in`: the same values (rounded to the case's types), widened."""

    def __init__(self, case: Case, compute_in: torch.dtype | None) -> None:
        self.case, self._compute_in = case, compute_in
        self.random = torch.Generator().manual_seed(3)
        self.master = case.master_dtype or case.dtype
        self.shape = FfnShape(case.hidden, case.ffn, case.activation)
        present = torch.tensor([s for s in range(case.slots) if s not in case.absent])
        self.slot = present[torch.randint(len(present), (case.tokens, case.k), generator=self.random)]
        self.slot[torch.rand(self.slot.shape, generator=self.random) < case.elsewhere] = -1
        self.named = {"x": self.normal(case.tokens, case.hidden), "weight": self.normal(case.tokens, case.k, dtype=self.master)}

    def normal(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> torch.Tensor:
        value = (self.case.spread * torch.randn(*shape, generator=self.random, dtype=torch.float64)).to(dtype or self.case.dtype)
        return value.to(self._compute_in or value.dtype).requires_grad_(grad)

    def routed(self, token: torch.Tensor | None = None, expert: torch.Tensor | None = None) -> RoutedTokens:
        return RoutedTokens(self.named["x"], self.slot, self.named["weight"], token, expert)

    def results(self, y: torch.Tensor) -> Results:
        direction = torch.randn(y.shape, generator=self.random, dtype=torch.float64).to(self.case.dtype).to(y.dtype)
        gradients = torch.autograd.grad((y * direction).sum(), list(self.named.values()))
        return {"y": y.detach(), **{f"d {name}": g for name, g in zip(self.named, gradients, strict=True)}}


def full(function: Any, case: Case, compute_in: torch.dtype | None = None) -> Results:
    given = Inputs(case, compute_in)
    given.named["experts"] = given.normal(case.slots, given.shape.numel, dtype=given.master)
    return given.results(function(given.routed(), given.named["experts"], given.shape))


def lora(function: Any, case: Case, compute_in: torch.dtype | None = None) -> Results:
    given = Inputs(case, compute_in)
    frozen = [given.normal(given.shape.numel, grad=False) for _ in range(case.slots)]
    loras = {}
    for name in case.projections:
        wide, narrow = (case.ffn, case.hidden) if name == "down_proj" else (case.hidden, case.ffn * (1 + (name == "gate_up_proj")))
        a = given.named[f"{name}.A"] = given.normal(case.slots, case.rank, wide, dtype=given.master)
        b = given.named[f"{name}.B"] = given.normal(case.slots, narrow, case.rank, dtype=given.master)
        loras[name] = LowRankPairs(a, b, 0.5 + 0.25 * len(name))
    token, expert = torch.randperm(case.tokens, generator=given.random) + 1000, torch.arange(case.slots) * 3 + 1
    dropout = Dropout(case.dropout, key=77) if case.dropout else None
    return given.results(function(given.routed(token, expert), frozen, loras, given.shape, dropout=dropout))


CASES = {
    "plain": Case(),
    "gelu": Case(activation="gelu"),
    "gelu_tanh": Case(activation="gelu_tanh"),
    "slots with no assignments": Case(absent=(0, 2)),
    "last slot with no assignments": Case(absent=(3,)),
    "some assignments elsewhere": Case(elsewhere=0.5),
    "all assignments elsewhere": Case(elsewhere=1.1),
    "no tokens": Case(tokens=0),
    "a single token": Case(tokens=1),
    "k 1": Case(k=1),
    "odd sizes": Case(tokens=17, hidden=7, ffn=13, slots=5, k=3, elsewhere=0.2),
    "everything of size 1": Case(tokens=3, hidden=1, ffn=1, slots=1, k=1),
}
LORA_CASES = {
    "gate only": Case(projections=("gate_proj",)),
    "gate and up as one": Case(projections=("gate_up_proj", "down_proj"), dropout=0.3, absent=(1,)),
    "down only": Case(projections=("down_proj",)),
    "no gate": Case(projections=("up_proj", "down_proj")),
    "no down": Case(projections=("gate_proj", "up_proj")),
    "dropout": Case(dropout=0.3),
    "dropout, assignments elsewhere": Case(dropout=0.5, elsewhere=0.4, k=3),
    "dropout, no down": Case(dropout=0.5, projections=("up_proj",)),
    "dropout, no tokens": Case(dropout=0.5, tokens=0),
}
