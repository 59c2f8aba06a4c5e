"""MoLA (arXiv 2402.08562) without any of this project's machinery: one process, plain autograd, every formula written out.

It shares no code with hecate: only the values of the parameters are handed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.plain_mixlora import Product, product
from tests.plain_routers import PlainChoices

Made = Callable[[int, Sequence[Tensor]], tuple[Tensor, Tensor]]
"""from an expert's number and what of it trains to its A and B"""


def as_they_are(expert: int, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    a, b = parts
    return a, b


def nola_pair(a0: Tensor, u: Tensor, v: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A0 + sum a_i U_i / sqrt(K) and sum b_i V_i / sqrt(K)."""
    of_a, of_b = parts
    a = a0 + sum(of_a[k] * u[k] for k in range(len(u))) / math.sqrt(len(u))
    return a, torch.stack([of_b[k] * v[k] for k in range(len(v))]).sum(0) / math.sqrt(len(v))


class PlainMolaLinear(PlainChoices, nn.Module):
    """W x + bias + sum over a token's top k experts of weight_e · scale · B_e A_e x, one expert after the other over all tokens."""

    def __init__(
        self,
        base: nn.Linear,
        router: Tensor,
        bias: Tensor | float,
        experts: Sequence[Sequence[Tensor]],
        *,
        scale: float,
        top_k: int,
        logit_scale: float,
        of: Product = product,
        made: Made = as_they_are,
        choices: dict[str, Any] | None = None,
    ) -> None:
        """Args:
        experts: what of each trains.
        choices: of `PlainChoices.set_choices`; None: the largest of a softmax, renormalised.
        """
        super().__init__()
        self.base, self.scale, self.top_k, self.logit_scale = base, scale, top_k, logit_scale
        self.router, self.bias = nn.Parameter(router.clone()), bias
        self.experts = nn.ModuleList(nn.ParameterList(nn.Parameter(part.clone()) for part in parts) for parts in experts)
        self.of, self.made = of, made
        self.set_choices(**(choices or {"score": "softmax", "bias": "none", "bias_in_weights": False, "weights": "renormalised"}))
        self.valid: Tensor | None = None
        self.prob: Tensor | None = None
        self.expert_TK: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        valid = x.new_ones(len(x)).bool() if self.valid is None else self.valid
        prob, weight, expert_TK = self.choose(x @ (self.logit_scale * self.router).T + self.bias)
        self.prob, self.expert_TK = prob[valid], expert_TK[valid]
        y = self.base(x)
        for expert, parts in enumerate(self.experts):
            a, b = self.made(expert, list(parts))
            share = (weight * (expert_TK == expert)).sum(-1, keepdim=True) * valid[:, None]
            y = y + share * self.scale * self.of(x, a, b)
        return y.view(*hidden.shape[:-1], -1)


def plain_aux_by_layer(layers: Sequence[Sequence[PlainMolaLinear]]) -> Any:
    """The sum over decoder layers of E · sum over e of f P, over the tokens of all the layer's linears in one pile; f of all choices."""
    total: Any = 0.0
    for linears in layers:
        prob = _pile([linear.prob for linear in linears])
        expert_TK = _pile([linear.expert_TK for linear in linears])
        experts = prob.shape[1]
        share = F.one_hot(expert_TK.flatten(), experts).to(prob.dtype).mean(0)
        total = total + experts * (share * prob.mean(0)).sum()
    return total


def mola_parameters(linears: Sequence[tuple[int, int]], allocation: Sequence[int], rank: int) -> int:
    """Trained parameters: pairs and routers of linears (inputs, outputs) in layers with so many experts."""
    return sum(experts * (rank * (inputs + outputs) + inputs) for experts in allocation for inputs, outputs in linears)


def _pile(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])
