"""MoLA (arXiv 2402.08562) without any of this project's machinery: one process, plain autograd, every formula written out.

It shares no code with hecate: only the values of the parameters are handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainMolaLinear(nn.Module):
    """W x + bias + sum over a token's top k experts of weight_e · scale · B_e A_e x, one expert after the other over all tokens."""

    def __init__(
        self,
        base: nn.Linear,
        router: Tensor,
        bias: Tensor | float,
        experts: Sequence[tuple[Tensor, Tensor]] | Sequence[Callable[[], tuple[Tensor, Tensor]]],
        *,
        scale: float,
        top_k: int,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.top_k, self.logit_scale = base, scale, top_k, logit_scale
        self.router, self.bias = nn.Parameter(router.clone()), bias
        own = [pair for pair in experts if not callable(pair)]
        self.a = nn.ParameterList(nn.Parameter(a.clone()) for a, _ in own)
        self.b = nn.ParameterList(nn.Parameter(b.clone()) for _, b in own)
        self.made = [pair for pair in experts if callable(pair)]
        """what makes A and B of each expert that has none of its own"""
        self.valid: Tensor | None = None
        self.logits: Tensor | None = None
        self.expert_TK: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        valid = x.new_ones(len(x)).bool() if self.valid is None else self.valid
        logits = x @ (self.logit_scale * self.router).T + self.bias
        weight, expert_TK = F.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        self.logits, self.expert_TK = logits[valid], expert_TK[valid]
        y = self.base(x)
        pairs = [make() for make in self.made] or list(zip(self.a, self.b, strict=True))
        for expert, (a, b) in enumerate(pairs):
            share = (weight * (expert_TK == expert)).sum(-1, keepdim=True) * valid[:, None]
            y = y + share * self.scale * (x @ a.T) @ b.T
        return y.view(*hidden.shape[:-1], -1)


def plain_aux_by_layer(layers: Sequence[Sequence[PlainMolaLinear]]) -> Any:
    """The sum over decoder layers of E · sum over k and e of f P, over the tokens of all the layer's linears in one pile."""
    total: Any = 0.0
    for linears in layers:
        prob = F.softmax(_pile([linear.logits for linear in linears]), dim=-1)
        expert_TK = _pile([linear.expert_TK for linear in linears])
        experts = prob.shape[1]
        for k in range(expert_TK.shape[1]):
            share = F.one_hot(expert_TK[:, k], experts).to(prob.dtype).mean(0)
            total = total + experts * (share * prob.mean(0)).sum()
    return total


def mola_parameters(linears: Sequence[tuple[int, int]], allocation: Sequence[int], rank: int) -> int:
    """Trained parameters: pairs and routers of linears (inputs, outputs) in layers with so many experts."""
    return sum(experts * (rank * (inputs + outputs) + inputs) for experts in allocation for inputs, outputs in linears)


def _pile(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])
